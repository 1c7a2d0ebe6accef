"""The operators' form for a cell: one step, without the axes of steps and directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cuda_cases
import oracle
from fusedrnn import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
with_modes = pytest.mark.parametrize("mode", cuda_cases.MODES)


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small."""


@with_modes
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_a_sequence_of_one_step(
    mode: str, states: bool, batch: int, dtype: torch.dtype
) -> None:
    call = cuda_cases.Call(mode, dtype, steps=1, batch=batch, states=states)
    cuda_cases.check_one_step(torch.ops.fusedrnn, call)


@with_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", [True, False])
def test_opcheck(mode: str, dtype: torch.dtype, save: bool) -> None:
    call = cuda_cases.Call(mode, dtype, steps=1, batch=2)
    arguments = cuda_cases.of_one_step(call.arguments()) | {"save": save}
    forward = torch.ops.fusedrnn.layer_forward.default
    torch.library.opcheck(forward, (), arguments)
    if save:
        saved = forward(**arguments)
        torch.library.opcheck(
            torch.ops.fusedrnn.layer_backward.default,
            (),
            cuda_cases.backward_of_one_step(call, arguments, saved),
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [("lengths", torch.tensor([1, 1])), ("reset", torch.ones(1, 2, dtype=torch.bool))],
)
def test_what_it_does_not_take(name: str, value: torch.Tensor) -> None:
    arguments = cuda_cases.of_one_step(
        cuda_cases.Call("GRU", torch.float32, steps=1, batch=2).arguments() | {"save": False}
    )
    with pytest.raises(ValueError, match=rf"x: expected shape \(T, B, input_size\) with {name}"):
        torch.ops.fusedrnn.layer_forward(**(arguments | {name: value}))
    both = arguments | {"bidirectional": True, "params": arguments["params"] * 2}
    with pytest.raises(ValueError, match="with two directions"):
        torch.ops.fusedrnn.layer_forward(**both)
    with pytest.raises(ValueError, match="h0: expected shape"):
        torch.ops.fusedrnn.layer_forward(**(arguments | {"h0": arguments["h0"][None]}))


def check_backward(call: cuda_cases.Call) -> None:
    """In float64, against the reference."""
    arguments = call.arguments()
    y, _, _, gates, cells = torch.ops.fusedrnn.layer_forward(**arguments, save=True)
    saved = {"y": y, "gates": gates, "cells": cells, "output_mask": call.mask()}
    found = torch.ops.fusedrnn.layer_backward(**arguments, **call.cotangents(), **saved)
    exact = reference.layer_backward(**arguments, **call.cotangents())
    pairs = zip([*found[:3], *found[3]], [*exact[:3], *exact[3]], call.mask(), strict=True)
    for ours, truth, wanted in pairs:
        if wanted:
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("states", [True, False])
def test_gradients_of_a_single_row(isa: str, mode: str, states: bool) -> None:
    """Whose outer products have a way of their own."""
    check_backward(
        cuda_cases.Call(
            mode, torch.float64, steps=1, batch=1, states=states, input_size=37, hidden_size=21
        )
    )


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_gradients_where_a_single_row_comes_first_or_last(mode: str) -> None:
    """Of 257 steps, 256 are one part; both directions leave the last one to a part of its own."""
    check_backward(
        cuda_cases.Call(mode, torch.float64, steps=257, batch=1, both=True, hidden_size=256)
    )


@pytest.mark.parametrize("name", oracle.CELLS)
@pytest.mark.parametrize("batch", [1, 3, 8, 19])
@pytest.mark.parametrize("threads", [1, 2])
def test_weights_that_leave_a_cache_are_read_back_and_forth(
    isa: str, name: str, batch: int, threads: int
) -> None:
    """From either end in turn, which changes no bit."""
    size = 1100 if name == "RNN" else 520  # 6 MB and more, and no whole panels
    torch.manual_seed(0)
    theirs = getattr(nn, f"{name}Cell")(size, size)
    x, *states = (torch.randn(batch, size) for _ in range(3 if name == "LSTM" else 2))

    def run(module: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        given = [t.to(dtype) for t in states]
        return oracle.tensors(module(x.to(dtype), given if name == "LSTM" else given[0]))

    with oracle.num_threads(threads), torch.no_grad():
        exact = run(oracle.twin(theirs, torch.float64), torch.float64)
        first, *others = map(run, [oracle.twin(theirs)] * 4)
        expected = run(theirs)
    for mine, other, truth in zip(first, expected, exact, strict=True):
        assert oracle.error_excess(mine, other, truth) <= oracle.FLOOR_ULPS[torch.float32]
    for again in others:
        assert all(map(torch.equal, again, first))


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("hidden_size", [150, 200, 600])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_a_single_step_of_many_rows(
    isa: str, mode: str, hidden_size: int, threads: int
) -> None:
    """W_ih goes through dx by blocks of 512 rows, the last of which is shorter here."""
    with oracle.num_threads(threads):
        check_backward(
            cuda_cases.Call(
                mode,
                torch.float64,
                steps=1,
                batch=19,
                states=False,
                input_size=64,
                hidden_size=hidden_size,
            )
        )
