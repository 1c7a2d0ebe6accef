"""The compiled extension. Importing it registers the operators ``torch.ops.fusedrnn.*``."""

from collections.abc import Sequence

from torch import Tensor

def cpu_isas() -> list[str]:
    """Instruction sets that are compiled in and that this machine can run, the best one last."""

def get_cpu_isa() -> str:
    """The instruction set in use."""

def set_cpu_isa(name: str) -> None:
    """Use the instruction set ``name`` from now on; ValueError unless ``cpu_isas()`` lists it."""

def layer_forward(
    mode: str,
    x: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    bidirectional: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.fusedrnn.layer_forward`` with less to do in Python, for eager calls that record
    no derivative: the refusal of derivatives is left out. Not traced by Dynamo."""

def layer_backward(
    mode: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    has_biases: bool,
    bidirectional: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """``torch.ops.fusedrnn.layer_backward`` in the same way."""

def empty_cache() -> None:
    """Give the memory that is kept for the next calls back to the system."""

unit_alignment: int
"""Hidden units of saved tensors are rounded up to a multiple of this."""

def build_info() -> dict[str, str]:
    """How the extension was built: compiler, versions, switches."""
