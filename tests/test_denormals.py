"""Subnormal numbers: flushed inside a call alone, neither slow nor wrong."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import oracle


def denormals_survive() -> bool:
    """Whether this thread, and the threads that torch computes with, keep subnormal numbers."""
    tiny = torch.full((100_000,), 1e-40)
    return bool((tiny * 1 != 0).all()) and torch.tensor([1e-40]).mul(1).item() != 0


@pytest.mark.parametrize("count", [1, 2])
def test_the_callers_mode_is_unchanged(count: int) -> None:
    torch.set_num_threads(count)
    assert denormals_survive()
    net = oracle.fused("LSTM", (32, 64))
    x = torch.randn(20, 48, 32) * 1e-40
    oracle.trained(net, x)
    assert denormals_survive()
    with pytest.raises(ValueError, match="lengths"):
        net(x, lengths=torch.full((48,), 99))
    assert denormals_survive()


def test_a_caller_that_flushes_still_flushes() -> None:
    net = oracle.fused("GRU", (4, 5))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        net(torch.randn(3, 2, 4))
        assert torch.tensor([1e-40]).mul(1).item() == 0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_denormal_inputs_give_right_results(mode: str, isa: str) -> None:
    """Inputs, states, weights and gradients among the subnormals: right up to their flushing."""
    torch.set_num_threads(1)
    net = oracle.fused(mode, (4, 5))
    with torch.no_grad():
        net.weight_ih_l0[::2] *= 1e-39
        net.weight_hh_l0[1::2] *= 1e-39
    options = {"nonlinearity": net.nonlinearity} if mode.startswith("RNN") else {}
    double = getattr(nn, type(net).__name__)(4, 5, dtype=torch.float64, **options)
    double.load_state_dict(net.state_dict())
    for scale in (1e-38, 1e-40, 1e-44):
        x = torch.randn(3, 2, 4) * scale
        found, expected = oracle.trained(net, x), oracle.trained(double, x.double())
        for mine, theirs in zip(found, expected, strict=True):
            tolerance = 32 * torch.finfo(torch.float32).eps * theirs.abs().max() + 1e-36
            assert (mine.double() - theirs).abs().max() <= tolerance


@pytest.mark.alone
def test_denormals_are_not_slow() -> None:
    """Without flushing, products of subnormal numbers take up to a hundred times as long."""
    torch.set_num_threads(1)
    net = oracle.fused("LSTM", (128, 128))
    with torch.no_grad():
        for bias in (net.bias_ih_l0, net.bias_hh_l0):
            bias.zero_()
    normal = torch.randn(50, 16, 128)
    with torch.no_grad():
        net(normal)
        seconds: dict[float, list[float]] = {1.0: [], 1e-40: []}
        for _ in range(7):
            for scale, times in seconds.items():
                x = normal * scale
                begin = time.perf_counter()
                net(x)
                times.append(time.perf_counter() - begin)
    assert min(seconds[1e-40]) < 3 * min(seconds[1.0])
