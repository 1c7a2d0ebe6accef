"""Contestants that differentiate twice, or forward: a gradient penalty, and tangents.

As in cases.py, each is a call without arguments, and its results have been compared with
torch.nn's in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .cases import checked, copied, module_of
from .peers import FUSED, TORCH, make_input
from .shapes import Shape
from .timing import Call


def penalty_call(module: nn.Module, shape: Shape) -> Call:
    """The input's gradient, and the parameters' gradients of its squared norm: WGAN-GP's step."""
    dtype = next(module.parameters()).dtype
    x = make_input(shape).to(dtype).requires_grad_()
    parameters = list(module.parameters())

    def call() -> Sequence[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        dx.square().sum().backward(inputs=parameters)
        return [dx, *(parameter.grad for parameter in parameters)]

    return call


def tangent_call(module: nn.Module, shape: Shape) -> Call:
    """The outputs and their derivative along one direction of the input, without a graph."""
    dtype = next(module.parameters()).dtype
    x, along = (make_input(shape, seed).to(dtype) for seed in (1, 2))

    def call() -> Sequence[Tensor]:
        with torch.no_grad(), forward_ad.dual_level():
            y, _ = module(forward_ad.make_dual(x, along))
            return forward_ad.unpack_dual(y)

    return call


def penalty_calls(cell: str, shape: Shape) -> dict[str, Call]:
    return _calls(f"gradient penalty, {cell} {shape}", penalty_call, cell, shape)


def tangent_calls(cell: str, shape: Shape) -> dict[str, Call]:
    """oneDNN's LSTM has no tangents, so that torch.nn's has none on the CPU."""
    return _calls(f"tangent, {cell} {shape}", tangent_call, cell, shape)


def _calls(
    what: str, contestant: Callable[[nn.Module, Shape], Call], cell: str, shape: Shape
) -> dict[str, Call]:
    module = module_of(cell, shape)
    calls = {
        TORCH: contestant(copied(module, False), shape),
        FUSED: contestant(copied(module), shape),
    }
    exact = contestant(copied(module, False, torch.float64), shape)
    return checked(what, calls, exact)
