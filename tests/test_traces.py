"""torch.jit.trace, and traces with symbols for sizes: make_fx and AOTAutograd without Dynamo."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import aot_module, nop
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fusedrnn
import oracle

NAMES = ("RNN", "LSTM", "GRU")
MODULES = [*((name, layers) for name in NAMES for layers in (1, 2)), *((n, 0) for n in NAMES)]


def build(name: str, layers: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A stack of so many layers, or a cell, and inputs of two sizes."""
    if layers == 0:
        return getattr(fusedrnn, name + "Cell")(3, 4), torch.randn(2, 3), torch.randn(5, 3)
    net = getattr(fusedrnn, name)(3, 4, layers, bidirectional=True)
    return net, torch.randn(5, 2, 3), torch.randn(7, 3, 3)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize(("name", "layers"), MODULES)
def test_jit_trace(name: str, layers: int) -> None:
    """As it is called by default, gradients on and the trace checked; a program for inference."""
    net, x, other = build(name, layers)
    traced = torch.jit.trace(net, x)
    for some in (x, other):
        torch.testing.assert_close(
            oracle.tensors(traced(some)), oracle.tensors(net(some)), rtol=0, atol=0
        )
    with pytest.raises(RuntimeError, match="derivative for fusedrnn::layer_forward is not impl"):
        oracle.tensors(traced(x))[0].sum().backward()


@pytest.mark.parametrize(("name", "layers"), MODULES)
def test_make_fx(name: str, layers: int) -> None:
    net, x, other = build(name, layers)
    traced = make_fx(
        lambda x: oracle.tensors(net(x)), tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(x)
    torch.testing.assert_close(traced(other), oracle.tensors(net(other)), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "layers"), MODULES)
def test_aot_module(name: str, layers: int) -> None:
    net, x, other = build(name, layers)
    compiled = aot_module(net, nop, dynamic=True)
    for some in (x, other):
        gradients = []
        for call in (net, compiled):
            loss = sum(t.square().sum() for t in oracle.tensors(call(some)))
            gradients.append(torch.autograd.grad(loss, list(net.parameters())))
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
