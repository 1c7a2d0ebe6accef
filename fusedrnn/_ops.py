"""The dispatcher operators: loads the compiled extension, and adds what torch wants in Python.

``fusedrnn::layer_forward``, ``fusedrnn::layer_backward`` and ``fusedrnn::layer_tangents`` work on
one layer with all its directions; their schemas and kernels live in ``csrc``, their batching rules
in ``_batching.py``, their numbers of operations in ``_flops.py``. Here are their fake kernels:
shapes without data, for ``torch.compile`` and ``torch.export``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn._batching import register_rules
from fusedrnn._flops import register_formulas
from fusedrnn.reference import GATES

try:
    from fusedrnn import _C
except ImportError as error:
    raise ImportError(
        "fusedrnn's compiled extension could not be loaded. Build it for the installed torch "
        f"{torch.__version__}: pip install --no-build-isolation ."
    ) from error

__all__ = ["_C", "layer_backward", "layer_forward", "layer_tangents"]

layer_forward = torch.ops.fusedrnn.layer_forward.default
layer_backward = torch.ops.fusedrnn.layer_backward.default
layer_tangents = torch.ops.fusedrnn.layer_tangents.default


def _check_devices(x: Tensor, *others: Tensor | None) -> None:
    """One tensor on meta among real ones brings a real call here: it must not get empty results."""
    for other in others:
        if other is not None and other.device != x.device and other.device.type != "cpu":
            raise ValueError(f"expected tensors on {x.device} like x, got one on {other.device}")


@torch.library.register_fake("fusedrnn::layer_forward")
def _layer_forward_fake(
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
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_devices(x, lengths, batch_sizes, reset, h0, c0, *params)
    directions = 2 if bidirectional else 1
    gate_rows, proj_size = params[1].shape
    hidden_size = gate_rows // GATES[mode]
    one_step = x.dim() == 2 and batch_sizes is None
    if one_step:
        rows = batch = x.shape[0]
    elif batch_sizes is None:
        rows, batch = x.shape[0] * x.shape[1], x.shape[1]
    else:
        # The batch is a value inside batch_sizes; only a given state shows it in a shape.
        rows = x.shape[0]
        batch = torch.library.get_ctx().new_dynamic_size() if h0 is None else h0.shape[1]
    lstm = mode == "LSTM"
    leading = (batch,) if one_step else (directions, batch)
    y = x.new_empty((0,) if one_step else (*x.shape[:-1], directions * proj_size))
    h_n = x.new_empty((*leading, proj_size))
    c_n = x.new_empty((*leading, hidden_size) if lstm else (0,))
    padded = -(-hidden_size // _C.unit_alignment) * _C.unit_alignment
    has_gates = save and not recompute and mode in ("LSTM", "GRU")
    width = 4 * padded
    if width * x.element_size() % 2048 == 0:  # row_stride() in csrc/recurrence.h
        width += 64 // x.element_size()
    gates = x.new_empty((rows, directions, width) if has_gates else (0,))
    cell_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if recompute:  # Layer::cells_shape() in csrc/layer.cpp
        steps = 1 if one_step else (x if batch_sizes is None else batch_sizes).shape[0]
        each = torch.sym_max(1, _C.segment_rows // torch.sym_max(1, batch))
        rows = ((steps + each - 1) // each - 1) * batch
    cells = x.new_empty((rows, directions, padded) if save and lstm else (0,), dtype=cell_dtype)
    return y, h_n, c_n, gates, cells


@torch.library.register_fake("fusedrnn::layer_backward")
def _layer_backward_fake(
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
    _check_devices(x, lengths, batch_sizes, reset, h0, c0, *params, dy, dh_n, dc_n, y, gates, cells)

    def gradient(of: Tensor | None, wanted: bool) -> Tensor:
        return x.new_empty(of.shape if wanted and of is not None else (0,))

    dx, dh0, dc0 = (gradient(t, m) for t, m in zip((x, h0, c0), output_mask[:3], strict=True))
    return dx, dh0, dc0, [gradient(p, m) for p, m in zip(params, output_mask[3:], strict=True)]


@torch.library.register_fake("fusedrnn::layer_tangents")
def _layer_tangents_fake(
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    *of_backward, tangents, gradient_tangents, has_biases, bidirectional, output_mask = args
    mode, _, _, _, x, *inputs = of_backward[:11]
    _check_devices(x, *(t for t in (*tangents, *gradient_tangents) if t is not None))
    outputs = _layer_forward_fake(mode, x, *inputs, has_biases, bidirectional, False)[:3]
    gradients = _layer_backward_fake(*of_backward, has_biases, bidirectional, output_mask)
    return (*outputs, *gradients)


register_rules(layer_forward, layer_backward, layer_tangents)
register_formulas(torch.ops.fusedrnn)
