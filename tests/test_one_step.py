"""The operators' form for a cell: one step, without the axes of steps and directions."""

from __future__ import annotations

import pytest
import torch

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
