"""What ``torch.utils.flop_counter.FlopCounterMode`` counts: the products' multiplications and
additions, as of torch's own operators. Rows are counted with their padding: which they are is a
matter of values."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch.utils.flop_counter import register_flop_formula

__all__ = ["register_formulas"]

Shape = Sequence[int]  # a formula is given each tensor's


def register_formulas(ops: Any) -> None:
    """Registers the formulas of ``torch.ops.fusedrnn``."""
    register_flop_formula(ops.layer_forward)(_forward)
    register_flop_formula(ops.layer_backward)(_backward)
    register_flop_formula(ops.layer_tangents)(_tangents)


def _forward(mode: str, x: Shape, *args: Any, **_: Any) -> int:
    params, _, bidirectional = args[5:8]
    return _products(x, params, bidirectional)


def _backward(mode: str, *args: Any, **_: Any) -> int:
    return _products(args[3], args[9], args[14], args[5], args[15])


def _tangents(mode: str, *args: Any, **_: Any) -> int:
    """Each product of both passes, with values and with tangents."""
    x, batch_sizes, params, bidirectional, mask = (args[i] for i in (3, 5, 9, 16, 17))
    backward = _products(x, params, bidirectional, batch_sizes, mask)
    return 2 * (_products(x, params, bidirectional) + backward)


def _products(
    x: Shape,
    params: Sequence[Shape],
    bidirectional: bool,
    batch_sizes: Shape | None = None,
    mask: Sequence[bool] | None = None,
) -> int:
    """Of the forward pass, or where there is a mask of what is wanted, of the backward pass."""
    rows, directions = prod(x[:-1]), 2 if bidirectional else 1
    passes_x = passes_h = rows
    if mask is not None:
        passes_x = rows if mask[0] else 0
        if not mask[1] and batch_sizes is None:  # through W_hh none to the initial state
            passes_h = rows - x[-2]
    count = len(params) // directions
    total = 0
    for i, shape in enumerate(params):
        if len(shape) == 2:
            passes = (passes_x, passes_h, *[rows] * count)[i % count]
            wanted = rows if mask is not None and mask[3 + i] else 0
            total += 2 * prod(shape) * (passes + wanted)
    return total
