"""The operators' form for a cell: one step, without the axes of steps and directions."""

from __future__ import annotations

import pytest
import torch

import cuda_cases
import oracle
from fusedrnn import _C, reference

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


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest):
    before = _C.get_cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("states", [True, False])
def test_gradients_of_a_single_row(isa: str, mode: str, states: bool) -> None:
    """Whose outer products have a way of their own."""
    call = cuda_cases.Call(
        mode, torch.float64, steps=1, batch=1, states=states, input_size=37, hidden_size=21
    )
    arguments = call.arguments()
    y, _, _, gates, cells = torch.ops.fusedrnn.layer_forward(**(arguments | {"save": True}))
    mask = [t is not None for t in (call.x, call.h0, call.c0)] + [True] * len(call.params)
    given = [arguments[n] for n in ("lengths", "batch_sizes", "reset", "h0", "c0", "params")]
    *states_of, dparams = torch.ops.fusedrnn.layer_backward(
        call.mode, call.dy, call.dh_n, call.dc_n, call.x, *given, y, gates, cells, True, False, mask
    )
    *exact, exact_params = reference.layer_backward(
        call.mode, call.dy, call.dh_n, call.dc_n, call.x, *given, True, False
    )
    ours, truth = [*states_of, *dparams], [*exact, *exact_params]
    for found, right, wanted in zip(ours, truth, mask, strict=True):
        if wanted:
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)
