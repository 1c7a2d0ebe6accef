"""Contestants that are no other library: fusedrnn in another setting, and the machine's products.

As elsewhere, what fusedrnn computes has been compared with torch.nn in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .cases import checked, copied, inference, layer_call, module_of, step
from .peers import FUSED, make_input
from .shapes import Shape
from .timing import Call

SGEMM = "torch.mm, as many operations"
TIME_MAJOR = "fusedrnn, time-major and copies"
ONE_THREAD = "fusedrnn, one thread"
ORDINARY = "fusedrnn, ordinary values"

# Multiplications a row and step, forward: gates * H * (I + H). Training adds twice as many.
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
SIDE = 2048  # of the square matrices whose product is the machine's rate


def both_checked(cell: str, shape: Shape, train: bool) -> Call:
    """fusedrnn's call over the layer, compared with float64."""
    module = module_of(cell, shape)
    exact = layer_call(copied(module, False, torch.float64), shape, train)
    call = layer_call(copied(module), shape, train)
    return checked(f"{cell} {shape}", {FUSED: call}, exact)[FUSED]


def multiplications(cell: str, shape: Shape, train: bool) -> int:
    batch, steps, inputs, hidden = shape
    forward = GATES[cell] * hidden * (inputs + hidden) * batch * steps
    return 3 * forward if train else forward


def sgemm_calls(cell: str, shape: Shape, train: bool) -> dict[str, Call]:
    """Against torch.mm of square matrices, as many rows of them as make the same work."""
    rows = round(multiplications(cell, shape, train) / SIDE**2)
    a, b, out = (torch.randn(SIDE, SIDE) for _ in range(3))

    def products() -> None:
        left = rows
        while left > 0:
            take = min(left, SIDE)
            torch.mm(a[:take], b, out=out[:take])
            left -= take

    return {FUSED: both_checked(cell, shape, train), SGEMM: products}


def thread_calls(cell: str, shape: Shape, train: bool) -> dict[str, Call]:
    call, threads = both_checked(cell, shape, train), torch.get_num_threads()

    def with_threads(count: int) -> object:
        torch.set_num_threads(count)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return {FUSED: partial(with_threads, threads), ONE_THREAD: partial(with_threads, 1)}


def batch_first_calls(cell: str, shape: Shape, train: bool) -> dict[str, Call]:
    """(B, T, I) in and out, against the same layer, time-major, between two copies."""
    module = module_of(cell, shape)
    x = make_input(shape).transpose(0, 1).contiguous()

    def batch_first(m: nn.Module, data: Tensor) -> Sequence[Tensor]:
        m.batch_first = True
        return m(data)[:1]

    def copies(m: nn.Module, data: Tensor) -> Sequence[Tensor]:
        m.batch_first = False
        output = m(data.transpose(0, 1).contiguous())[0]
        return [output.transpose(0, 1).contiguous()]

    def contestant(module: nn.Module, run: Callable[..., Sequence[Tensor]]) -> Call:
        data = x.to(next(module.parameters()).dtype, copy=True).requires_grad_(train)
        if train:
            return step(module, lambda m: run(m, data), [data])
        return inference(module, lambda m: run(m, data))

    calls = {
        FUSED: contestant(copied(module), batch_first),
        TIME_MAJOR: contestant(copied(module), copies),
    }
    exact = contestant(copied(module, False, torch.float64), batch_first)
    return checked(f"batch_first {cell} {shape}", calls, exact)


def denormal_calls(cell: str, shape: Shape, train: bool) -> dict[str, Call]:
    """Denormal inputs to a layer without biases, whose states are then denormal too."""
    module = module_of(cell, shape, bias=False)

    def contestant(module: nn.Module, factor: float) -> Call:
        dtype = next(module.parameters()).dtype
        data = (make_input(shape).to(dtype) * factor).requires_grad_(train)

        def run(m: nn.Module) -> Sequence[Tensor]:
            return m(data)[:1]

        return step(module, run, [data]) if train else inference(module, run)

    calls = {ORDINARY: contestant(copied(module), 1.0)}
    exact = contestant(copied(module, False, torch.float64), 1.0)
    checked(f"{cell} without biases {shape}", calls, exact)
    return {FUSED: contestant(copied(module), 1e-39), **calls}
