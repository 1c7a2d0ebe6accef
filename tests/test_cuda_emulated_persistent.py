"""The persistent CUDA kernels on the host, whose blocks wait for each other at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cuda_cases
import oracle

pytestmark = pytest.mark.usefixtures("one_thread", "without_tf32")


@cuda_cases.each_of(cuda_cases.smooth("persistent"), "mode", "dtype")
@pytest.mark.parametrize(
    ("batch", "hidden_size", "blocks"),
    [(1, 64, 2), (8, 65, 3), (9, 33, 8), (17, 40, 4), (20, 1, 1), (11, 130, 5)],
    ids="{}".format,
)
def test_sizes_of_persistent(
    ops: Any,
    strategy: str,
    mode: str,
    dtype: torch.dtype,
    batch: int,
    hidden_size: int,
    blocks: int,
    device: Callable[..., None],
) -> None:
    """Blocks along rows and units, some partly empty, and a batch in one launch or several."""
    device(blocks)
    call = cuda_cases.Call(
        mode, dtype, both=True, reset=True, batch=batch, hidden_size=hidden_size, steps=4
    )
    cuda_cases.check(ops, call)


FORMS = [  # dtype, batch, hidden_size, blocks that the device holds: form, rows of a launch
    (torch.bfloat16, 3, 40, 8, (16, 4, 8), 8),
    (torch.bfloat16, 17, 64, 8, (32, 2, 8), 24),
    (torch.bfloat16, 9, 520, 34, (16, 4, 16), 16),
    (torch.bfloat16, 9, 64, 2, (32, 2, 16), 16),
    (torch.bfloat16, 17, 64, 4, (32, 2, 16), 32),
    (torch.bfloat16, 40, 64, 4, (32, 2, 16), 32),
    (torch.bfloat16, 35, 530, 34, (16, 4, 32), 32),
    (torch.bfloat16, 3, 1500, 94, (16, 8, 8), 8),
    (torch.bfloat16, 20, 1030, 66, (16, 8, 16), 16),
    (torch.float32, 9, 100, 8, (16, 4, 16), 16),
    (torch.float32, 3, 900, 58, (16, 8, 8), 8),
    (torch.float32, 20, 520, 34, (16, 8, 8), 8),
]


@pytest.mark.parametrize("strategy", ["persistent"], indirect=True)
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
@pytest.mark.parametrize(
    ("dtype", "batch", "hidden_size", "blocks", "form", "rows"), FORMS, ids=lambda v: str(v)
)
def test_each_form_of_persistent(
    ops: Any,
    strategy: str,
    mode: str,
    dtype: torch.dtype,
    batch: int,
    hidden_size: int,
    blocks: int,
    form: tuple[int, int, int],
    rows: int,
    device: Callable[..., None],
) -> None:
    """It is the one that was meant, and right."""
    device(blocks)
    call = cuda_cases.Call(mode, dtype, batch=batch, hidden_size=hidden_size, steps=2)
    assert ops.persistent_form(**call.arguments()) == [*form, rows, 1]
    cuda_cases.check(ops, call)


SIDES = [  # batch, blocks that the device holds: form, rows and directions of a launch
    (3, 8, (16, 4, 8), 8, 2),
    (3, 3, (32, 2, 8), 8, 1),
    (17, 8, (32, 2, 16), 32, 2),
    (17, 6, (32, 2, 8), 24, 1),  # two launches either way
]


@pytest.mark.parametrize("strategy", ["persistent"], indirect=True)
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize(("batch", "blocks", "form", "rows", "sides"), SIDES, ids=str)
def test_both_directions_at_a_time(
    ops: Any,
    strategy: str,
    mode: str,
    batch: int,
    blocks: int,
    form: tuple[int, int, int],
    rows: int,
    sides: int,
    device: Callable[..., None],
) -> None:
    """Where the device has the CTAs for both and that saves launches; the bits are the same."""
    device(blocks)
    call = cuda_cases.Call(mode, torch.bfloat16, batch=batch, hidden_size=40, both=True, reset=True)
    assert ops.persistent_form(**call.arguments()) == [*form, rows, sides]
    cuda_cases.check(ops, call)
    found = cuda_cases.answer(ops, call)
    device(2)
    assert ops.persistent_form(**call.arguments())[-1] == 1
    assert oracle.same_bits(cuda_cases.answer(ops, call), found)


@pytest.mark.parametrize("strategy", ["persistent"], indirect=True)
def test_a_device_too_small_for_the_persistent_kernels(
    ops: Any, strategy: str, device: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps one by one take their place."""
    device(2)
    call = cuda_cases.Call("GRU", torch.bfloat16, hidden_size=65, **cuda_cases.FORMS["reset"])
    found = cuda_cases.answer(ops, call)
    monkeypatch.setenv("FUSEDRNN_CUDA_STRATEGY", "per_step")
    assert oracle.same_bits(found, cuda_cases.answer(ops, call))


@pytest.mark.parametrize("strategy", ["persistent"], indirect=True)
def test_a_block_that_never_comes(ops: Any, strategy: str, device: Callable[..., None]) -> None:
    """Waiting ends with an error, not never."""
    call = cuda_cases.Call("LSTM", torch.bfloat16, hidden_size=40)
    device(2, clock_rate=60_000, lost=1)
    with pytest.raises(RuntimeError, match="a block waited for the others for too long"):
        ops.layer_forward(**call.arguments(), save=False)
    device(2)
    cuda_cases.check(ops, call)


@cuda_cases.each_of(cuda_cases.ways("persistent", dtypes=cuda_cases.DTYPES), "mode", "dtype")
def test_a_nan_is_handed_on(ops: Any, strategy: str, mode: str, dtype: torch.dtype) -> None:
    """It stays in its row; and its bits, those of memory that is not written yet, stop nobody."""
    call = cuda_cases.Call(mode, dtype, hidden_size=40, batch=3)
    arguments = call.arguments()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    ones = torch.full_like(arguments["h0"], -1, dtype=bits).view(dtype)
    arguments["h0"][0, 1] = ones[0, 1]
    y = ops.layer_forward(**arguments, save=False)[0]
    assert y[:, 1].isnan().all()
    assert not y[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("strategy", ["persistent"], indirect=True)
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_precision_of_the_persistent_kernels(
    ops: Any,
    strategy: str,
    mode: str,
    switches: Callable[[str, str], None],
    device: Callable[..., None],
) -> None:
    """With TF32 off as exact as torch.nn; with it on, off by what rounding to 11 bits costs."""
    device(20)
    cuda_cases.check_tf32(ops, mode, switches)
    switches("ieee", "ieee")
    cuda_cases.check(ops, cuda_cases.Call(mode, torch.float32, hidden_size=300, steps=3))


def rounded_to_tf32(t: torch.Tensor) -> torch.Tensor:
    """To 11 bits, ties away from zero."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("strategy", ["persistent"], indirect=True)
@pytest.mark.parametrize("mode", ["LSTM", "RNN_TANH"])
def test_tf32_is_rounded_to(
    ops: Any, strategy: str, mode: str, switches: Callable[[str, str], None]
) -> None:
    """The state and W_hh are; what is rounded already gives the same with TF32 off."""
    call = cuda_cases.Call(mode, torch.float32, steps=1)
    given = call.arguments()
    switches("tf32", "ieee")
    found = ops.layer_forward(**given, save=False)[0]
    given["h0"] = rounded_to_tf32(given["h0"])
    given["params"][1] = rounded_to_tf32(given["params"][1])
    switches("ieee", "ieee")
    # Another order of sums; what the rounding to TF32 changes is a hundred times as large.
    exact = ops.layer_forward(**given, save=False)[0]
    torch.testing.assert_close(exact, found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", ["persistent"], indirect=True)
def test_exact_sums_are_rounded(ops: Any, strategy: str, device: Callable[..., None]) -> None:
    """Tensor cores cut sums off. Over positive products that adds up to an error in one direction,
    a unit in the last place for every few of the 1,024: float32's sums must not show it."""
    device(64)
    call = cuda_cases.Call(
        "RNN_RELU", torch.float32, bias=False, batch=1, steps=1, input_size=1, hidden_size=1024
    )
    with torch.no_grad():
        call.net.weight_ih_l0.zero_()
        call.net.weight_hh_l0.uniform_(0.5, 1).copy_(call.net.weight_hh_l0.float())
    call.h0.uniform_(0.5, 1).copy_(call.h0.float())
    assert ops.persistent_form(**call.arguments()) == [16, 8, 8, 8, 1]
    y = ops.layer_forward(**call.arguments(), save=False)[0].double()
    error = y / call.net(call.x, call.h0)[0].detach() - 1
    unit = torch.finfo(torch.float32).eps
    assert error.abs().max() <= 4 * unit
    assert error.mean().abs() <= unit / 2
