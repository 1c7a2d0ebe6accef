"""sigmoid and tanh of every instruction set, over every exponent and both signs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedrnn

MANTISSAS = 65_536
NAMES = ("sigmoid", "tanh")


def activation(name: str, isa: str, x: Tensor) -> Tensor:
    return torch.ops.fusedrnn.activation(name, isa, x)


@pytest.fixture(params=fusedrnn.cpu_isas())
def kernels(request: pytest.FixtureRequest) -> str:
    """An instruction set, by name."""
    return request.param


def floats_of_exponent(exponent: int) -> np.ndarray:
    """65,536 mantissas: the 2^15 at either end of a random sample of all 2^23, of both signs."""
    rng = np.random.default_rng(exponent)
    mantissas = np.arange(MANTISSAS, dtype=np.uint32) << 7
    mantissas |= rng.integers(0, 128, MANTISSAS, dtype=np.uint32)
    mantissas[:8] = np.arange(8)
    mantissas[-8:] = 2**23 - 1 - np.arange(8)
    positive = mantissas | np.uint32(exponent << 23)
    return np.concatenate([positive, positive | np.uint32(1 << 31)]).view(np.float32)


def exact_float(name: str, x: np.ndarray) -> np.ndarray:
    """In float64, by torch: some 1e-16 of relative error, a billionth of a float's ULP."""
    wide = torch.from_numpy(x.astype(np.float64))
    return getattr(torch, name)(wide).numpy()


def ulps(found: np.ndarray, exact: np.ndarray, kind: type = np.float32) -> np.ndarray:
    """Errors in units in the last place of the exact results, rounded to ``kind``."""
    unit = np.spacing(np.abs(exact).astype(kind)).astype(np.float64)
    return np.abs(found.astype(np.float64) - exact) / unit


@pytest.mark.parametrize("name", NAMES)
def test_float32_over_every_exponent(name: str, kernels: str) -> None:
    tiny = np.finfo(np.float32).tiny
    worst = 0.0
    for begin in range(0, 255, 15):
        x = np.concatenate([floats_of_exponent(e) for e in range(begin, begin + 15)])
        assert np.isfinite(x).all()
        found = activation(name, kernels, torch.from_numpy(x)).numpy()
        exact = exact_float(name, x)
        errors = ulps(found, exact)
        # What is below the smallest normal number may be flushed to zero, of the right sign.
        flushed = (np.abs(exact) < tiny) & (found == 0)
        errors[flushed] = 0
        worst = max(worst, errors.max())
        index = errors.argmax()
        assert worst <= 2, f"{name}({x[index]!r}) = {found[index]!r}, {errors[index]:.2f} ULP off"
        if name == "tanh":
            assert (np.signbit(found) == np.signbit(x)).all()
        else:
            assert not np.signbit(found).any()
    assert worst > 0.4, "correctly rounded everywhere: the comparison compares nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits(kernels: str, dtype: torch.dtype) -> None:
    inf, big = math.inf, torch.finfo(dtype).max
    x = torch.tensor([inf, -inf, 0.0, -0.0, big, -big, math.nan, -math.nan], dtype=dtype)
    for repeats in (1, 5):  # whole vectors, and their tails
        s, t = (activation(n, kernels, x.repeat(repeats)).reshape(repeats, -1) for n in NAMES)
        for row in s:
            assert row[:6].tolist() == [1, 0, 0.5, 0.5, 1, 0]
            assert row[6:].isnan().all()
        for row in t:
            assert row[:6].tolist() == [1, -1, 0, 0, 1, -1]
            assert row[:6].signbit().tolist() == [False, True, False, True, False, True]
            assert row[6:].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_float64_sample(name: str, kernels: str) -> None:
    mpmath = pytest.importorskip(
        "mpmath", reason="the exact values come from mpmath, which torch needs"
    )
    rng = np.random.default_rng(1)
    exponents = np.repeat(np.arange(-60, 12), 20)
    x = np.ldexp(rng.uniform(1, 2, exponents.size), exponents) * rng.choice([-1, 1], exponents.size)
    x = np.concatenate([x, rng.uniform(-20, 20, 1000), rng.uniform(-708, -600, 50)])
    found = activation(name, kernels, torch.from_numpy(x)).numpy()
    with mpmath.workdps(60):
        functions = {"tanh": mpmath.tanh, "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v))}
        exact = [functions[name](mpmath.mpf(float(v))) for v in x]
        errors = []
        for value, mine in zip(exact, found, strict=True):
            unit = float(np.spacing(abs(float(value))))
            if abs(value) < np.finfo(np.float64).tiny and mine == 0:
                continue
            errors.append(float(abs(mpmath.mpf(float(mine)) - value)) / unit)
    assert max(errors) <= 4
    assert max(errors) > 0.4, "correctly rounded everywhere: the comparison compares nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_tails_and_lanes_agree(name: str, kernels: str, dtype: torch.dtype) -> None:
    """A value's result does not depend on its place in the vector, nor on its neighbours."""
    x = torch.randn(67, dtype=dtype) * 5
    whole = activation(name, kernels, x)
    for start in range(20):
        assert activation(name, kernels, x[start:]).equal(whole[start:])
    assert torch.stack([activation(name, kernels, v.reshape(1))[0] for v in x]).equal(whole)


@pytest.mark.parametrize("name", NAMES)
def test_monotonic_where_it_matters(name: str, kernels: str) -> None:
    """No jump backwards of more than rounding at the seams between the ways to compute it."""
    x = torch.linspace(-100, 100, 400_001)
    y = activation(name, kernels, x).double()
    assert ((y[1:] - y[:-1]) >= -(2**-23)).all()


def test_bad_arguments() -> None:
    x, isa = torch.randn(3), fusedrnn.cpu_isas()[0]
    with pytest.raises(ValueError, match="name: expected 'sigmoid' or 'tanh', got 'relu'"):
        activation("relu", isa, x)
    with pytest.raises(ValueError, match="isa: 'mmx' is not usable"):
        activation("tanh", "mmx", x)
    with pytest.raises(TypeError, match="x: expected float32 or float64, got Half"):
        activation("tanh", isa, x.half())


def test_the_comparison_can_fail() -> None:
    x = floats_of_exponent(127)
    found = np.tanh(x) * np.float32(1 + 4e-7)
    assert ulps(found, exact_float("tanh", x)).max() > 2
