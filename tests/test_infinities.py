"""Infinite values reach what they reach in torch.nn, and nothing else: above all not the units that
pad a layer's width to whole vectors, and from there every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
import oracle

T, B, INPUT = 4, 3, 5


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small."""


def results(module: nn.Module, x: Tensor, h0: Tensor) -> dict[str, Tensor]:
    x, h0 = x.clone().requires_grad_(), h0.clone().requires_grad_()
    hx = (h0, torch.zeros_like(h0)) if module.mode == "LSTM" else h0
    y, _ = module(x, hx)
    leaves = {"x": x, "h0": h0, **dict(module.named_parameters())}
    return oracle.results((y,), leaves, [torch.ones_like(y)])


@pytest.mark.parametrize("where", ["x", "h0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hidden_size", [4, 16, 33])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_as_far_as_in_torch(
    isa: str, mode: str, hidden_size: int, dtype: torch.dtype, where: str
) -> None:
    torch.manual_seed(0)
    module = getattr(nn, mode.split("_")[0])(INPUT, hidden_size, dtype=dtype)
    x, h0 = torch.randn(T, B, INPUT, dtype=dtype), torch.randn(1, B, hidden_size, dtype=dtype)
    if where == "x":
        x[2, 1, 0] = torch.inf
    else:
        h0[0, 1, 0] = torch.inf
    theirs, ours = results(module, x, h0), results(oracle.twin(module), x, h0)
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name],
            expected,
            rtol=1e-4,
            atol=1e-4,
            equal_nan=True,
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.mark.parametrize("proj_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinite_gradient_through_a_projection(
    isa: str, dtype: torch.dtype, proj_size: int
) -> None:
    """Values that are kept two to a word have a neighbour, which stays zero."""
    module = fusedrnn.LSTM(3, 4, proj_size=proj_size, dtype=dtype)
    with torch.no_grad():
        for param in module.parameters():
            param.abs_().add_(0.05)
    x = torch.rand(3, 1, 3).to(dtype).requires_grad_()
    h0, c0 = torch.rand(1, 1, proj_size).to(dtype), torch.rand(1, 1, 4).to(dtype)
    y, _ = module(x, (h0, c0))
    dy = torch.zeros_like(y)
    dy[2] = torch.inf
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.isposinf().all()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
def test_a_nan_gradient_at_a_reset(isa: str, mode: str, dtype: torch.dtype, batch: int) -> None:
    """It meets a state of zeros, and is seen: one row of a single step has a way of its own."""
    module = getattr(fusedrnn, mode)(3, 4, dtype=dtype)
    x = torch.randn(1, batch, 3).to(dtype)
    y, _ = module(x, reset=torch.ones(1, batch, dtype=torch.bool))
    for param in torch.autograd.grad(y, module.all_weights[0], torch.full_like(y, torch.nan)):
        assert param.isnan().all()
