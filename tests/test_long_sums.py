"""Sums over thousands of units: the error must not grow faster than torch.nn's.

One sum over all of k in turn has an error that grows with k's root; torch.nn's products cut k.
Root mean squares are compared, as a single largest deviation is a random thing; the rule of
oracle.py holds besides.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import oracle

HIDDEN = 2048


def results(module: nn.Module, x: Tensor) -> oracle.Results:
    dtype = next(module.parameters()).dtype
    x = x.to(dtype, copy=True).requires_grad_()
    y, h_n = module(x)
    dy = torch.cos(torch.arange(y.numel())).view_as(y)
    return oracle.results((y, h_n), {"x": x, **dict(module.named_parameters())}, [dy, None])


def root_mean_square(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).pow(2).mean().sqrt().item()


@pytest.mark.parametrize("steps", [3, 1])
@pytest.mark.parametrize("batch", [4, 20])
@pytest.mark.parametrize("mode", ["GRU", "RNN_TANH"])
def test_errors_of_long_sums(isa: str, mode: str, steps: int, batch: int) -> None:
    torch.manual_seed(0)
    module = getattr(nn, mode.split("_")[0])(HIDDEN // 2, HIDDEN)
    x = torch.randn(steps, batch, HIDDEN // 2)
    exact = results(oracle.twin(module, torch.float64), x)
    theirs, ours = results(module, x), results(oracle.twin(module), x)
    for name, truth in exact.items():
        error = root_mean_square(ours[name], truth)
        assert error <= 2 * root_mean_square(theirs[name], truth), name
