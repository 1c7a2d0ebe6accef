"""The compiled extension. Importing it registers the operators ``torch.ops.fusedrnn.*``."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

_Array = TypeVar("_Array", Tensor, np.ndarray)

def cpu_isas() -> list[str]:
    """Instruction sets that are compiled in and that this machine can run, the best one last."""

def get_cpu_isa() -> str:
    """The instruction set in use."""

def set_cpu_isa(name: str) -> None:
    """Use the instruction set ``name`` from now on; ValueError unless ``cpu_isas()`` lists it."""

def assume_threads(distance: str) -> None:
    """Take threads for ``"near"`` or ``"far"`` from now on; ``"measured"``: as they are. For tests.

    Short calls use two threads or one accordingly, with the same results.
    """

def cuda_strategy(hidden_size: int, proj_size: int, dtype: torch.dtype) -> str:
    """How a CUDA device runs such a layer's recurrence, see ``fusedrnn.cuda_strategy``."""

def layer(
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
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer (y, h_n, c_n), recorded for autograd where an input requires grad.

    ``recompute``: backward makes the gates anew, instead of their being kept. For eager calls
    outside ``torch.func`` transforms and forward-mode levels.
    """

def plain_layer(
    mode: str,
    input: Any,
    hx: Any,
    params: list[Tensor | None],
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    recompute: bool,
) -> tuple[Tensor, Any] | None:
    """A module's (output, state) of one layer, recorded for autograd where an input requires grad.

    None where an argument is of another kind or does not fit, or autocast, a ``torch.func``
    transform or a forward-mode level is on. ``params`` is trusted to fit together. For eager calls.
    """

def cell_step(cell: Module, mode: str, x: Any, h: Any, c: Any) -> tuple[Tensor, Tensor] | None:
    """One step of a cell, x (B, I), h and c (B, H), to (h', c'), recorded for autograd.

    None where an argument does not fit, the cell's parameters are no plain ones, or autocast, a
    ``torch.func`` transform or a forward-mode level is on. For eager calls.
    """

class Stream:
    """What fusedrnn.Stream wraps: layers as (mode, [w_ih, w_hh, b_ih, b_hh, w_hr]), contiguous
    float32; the format of their weights; the batch size."""

    def __init__(
        self, layers: Sequence[tuple[str, Sequence[Tensor | None]]], weights: str, batch: int
    ) -> None: ...
    def step(self, x: _Array) -> _Array: ...
    def run(self, x: _Array) -> _Array: ...
    def get_state(self, layer: int) -> tuple[Tensor, Tensor]: ...
    def set_state(self, layer: int, h: Tensor | None, c: Tensor | None) -> None: ...
    def fork(self) -> Stream: ...

def empty_cache() -> None:
    """Give the memory that is kept for the next calls back to the system."""

segment_rows: int
"""About how many (step, row) pairs a segment of ``recompute`` has."""

unit_alignment: int
"""Hidden units of saved tensors are rounded up to a multiple of this."""

def build_info() -> dict[str, str]:
    """How the extension was built: compiler, versions, switches."""
