"""The raw operators, given what does not fit: an error that names the argument, never a crash."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusedrnn
import oracle
from fusedrnn import _C, _layer

T, B, INPUT, HIDDEN = 5, 3, 4, 6
forward_op = torch.ops.fusedrnn.layer_forward.default
backward_op = torch.ops.fusedrnn.layer_backward.default
ERRORS = (ValueError, TypeError, RuntimeError)


def test_a_wide_projection_with_resets() -> None:
    """torch.nn's constructor refuses P >= H, the functional form need not: nothing may be read
    beyond the kernel's zeros."""
    outputs = 200
    params = [
        torch.randn(4 * HIDDEN, INPUT) / 4, torch.randn(4 * HIDDEN, outputs) / 50,
        torch.randn(4 * HIDDEN), torch.randn(4 * HIDDEN), torch.randn(outputs, HIDDEN) / 4,
    ]  # fmt: skip
    x, reset = torch.randn(T, B, INPUT), torch.rand(T, B) < 0.5
    args = ("LSTM", x, None, None, reset, None, None, params, True, False)
    found = forward_op(*args, False)[:3]
    expected = fusedrnn.reference.layer_forward(*args)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_an_input_without_features(mode: str, isa: str) -> None:
    """The functional form takes it: the biases and the state are all there is."""
    rows = fusedrnn.reference.GATES[mode] * 64
    params = [torch.randn(rows, n) / 8 for n in (0, 64)] + [torch.randn(rows) for _ in range(2)]
    x = torch.zeros(6, 40, 0)

    def results(layer: Callable, dtype: torch.dtype, learns: bool) -> list[torch.Tensor]:
        own = [p.to(dtype).requires_grad_(learns) for p in params]
        y = layer(mode, x.to(dtype), None, None, None, None, None, own, True, False)[0]
        return [y, *torch.autograd.grad(y.square().sum(), own[1:])] if learns else [y]

    for learns in (False, True):
        expected = results(fusedrnn.reference.layer_forward, torch.float64, learns)
        for count in (1, 2):
            with oracle.num_threads(count):
                found = results(_layer.layer, torch.float32, learns)
            for got, right in zip(found, expected, strict=True):
                torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


def test_a_projection_to_nothing() -> None:
    params = [torch.randn(256, n) for n in (64, 0)] + [torch.randn(256)] * 2 + [torch.randn(0, 64)]
    x = torch.randn(2, 64, 64)
    with pytest.raises(ValueError, match=r"w_hh.*proj_size > 0, got \[256, 0\]"):
        forward_op("LSTM", x, None, None, None, None, None, params, True, False, False)


@pytest.mark.parametrize("mode", ["GRU", "RNN_TANH"])
def test_a_gradient_of_a_cell_state_that_is_not_there(mode: str) -> None:
    call = RawCall(mode)
    with pytest.raises(ValueError, match="dc_n: only the LSTM has a cell state"):
        call.backward(dc_n=torch.ones(1))


class RawCall:
    """A good call of the raw operators, to be spoilt one argument at a time."""

    FORWARD = ("mode", "x", "lengths", "batch_sizes", "reset", "h0", "c0", "params", "has_biases",
               "bidirectional", "save")  # fmt: skip
    BACKWARD = ("mode", "dy", "dh_n", "dc_n", "x", "lengths", "batch_sizes", "reset", "h0", "c0",
                "params", "y", "gates", "cells", "has_biases", "bidirectional",
                "output_mask")  # fmt: skip

    def __init__(self, mode: str, packed: bool = False, both: bool = True) -> None:
        directions = 2 if both else 1
        state = torch.randn(directions, B, HIDDEN)
        lstm = mode == "LSTM"
        x = torch.randn(9, INPUT) if packed else torch.randn(T, B, INPUT)
        self.args: dict[str, Any] = {
            "mode": mode,
            "x": x,
            "lengths": None,
            "batch_sizes": torch.tensor([3, 3, 2, 1]) if packed else None,
            "reset": None,
            "h0": state,
            "c0": state if lstm else None,
            "params": [
                p.float() for p in oracle.module_params(mode, INPUT, HIDDEN, bidirectional=both)
            ],
            "has_biases": True,
            "bidirectional": both,
            "save": True,
        }
        y, _, _, gates, cells = self.forward()
        self.args |= {
            "dy": torch.randn_like(y),
            "dh_n": state,
            "dc_n": state if lstm else None,
            "y": y,
            "gates": gates,
            "cells": cells,
            "output_mask": [True, True, lstm] + [True] * len(self.args["params"]),
        }

    def forward(self, **changed: Any) -> Any:
        args = self.args | changed
        return forward_op(*(args[name] for name in self.FORWARD))

    def backward(self, **changed: Any) -> Any:
        args = self.args | changed
        return backward_op(*(args[name] for name in self.BACKWARD))


def spoilt(raw: RawCall) -> dict[str, tuple[dict[str, Any], str]]:
    """What to change, and what the message must name."""
    a = raw.args
    params, x, h0 = a["params"], a["x"], a["h0"]
    packed = a["batch_sizes"] is not None
    bad: dict[str, tuple[dict[str, Any], str]] = {
        "mode": ({"mode": "lstm"}, "mode: expected 'LSTM'"),
        "empty mode": ({"mode": ""}, "mode: expected"),
        "x's dtype": ({"x": x.long()}, "x: expected a float32"),
        "x's rank": ({"x": x[0]}, "x: expected shape"),
        "x's features": ({"x": x[..., 1:]}, "w_ih: expected shape"),
        "x's dtype unlike the weights'": ({"x": x.double()}, "expected dtype"),
        "no params": ({"params": []}, "params: expected 4 or 5 tensors"),
        "too few params": ({"params": params[:-1]}, "params: expected"),
        "too many params": ({"params": params * 2}, "params: expected"),
        "a weight of rank 1": ({"params": [params[0][0], *params[1:]]}, "w_ih"),
        "a weight of rank 0": ({"params": [params[0][0, 0], *params[1:]]}, "w_ih"),
        "w_hh of rank 1": ({"params": [params[0], params[1][0], *params[2:]]}, "w_hh"),
        "an empty weight": ({"params": [params[0][:0], *params[1:]]}, "w_ih"),
        "w_hh too narrow": ({"params": [params[0], params[1][:, 1:], *params[2:]]}, "w_hh"),
        "b_ih too short": ({"params": [*params[:2], params[2][1:], *params[3:]]}, "b_ih: expected"),
        "b_hh's dtype": (
            {"params": [*params[:3], params[3].half(), *params[4:]]},
            "b_hh: expected",
        ),
        "bias flag": ({"has_biases": False}, "params: expected"),
        "h0's shape": ({"h0": h0[:, 1:]}, "h0: expected shape"),
        "h0's rank": ({"h0": h0[0]}, "h0: expected shape"),
        "h0's dtype": ({"h0": h0.double()}, "h0: expected dtype"),
    }
    if a["c0"] is None:
        bad["a cell state"] = ({"c0": h0}, "c0: only the LSTM")
    else:
        bad["c0's shape"] = ({"c0": h0[..., 1:]}, "c0: expected shape")
    if packed:
        ints = torch.tensor
        bad |= {
            "increasing batch sizes": (
                {"batch_sizes": ints([2, 3, 3, 1])},
                "batch_sizes: .*step 1",
            ),
            "negative batch sizes": ({"batch_sizes": ints([3, 3, 4, -1])}, "batch_sizes"),
            "wrong sum": ({"batch_sizes": ints([3, 3, 2, 2])}, "batch_sizes: expected a sum of 9"),
            "no batch sizes": (
                {"batch_sizes": ints([]).long()},
                "batch_sizes: expected a non-empty",
            ),
            "int32 sizes": ({"batch_sizes": ints([3, 3, 2, 1]).int()}, "batch_sizes: expected"),
            "sizes of rank 2": ({"batch_sizes": ints([[3, 3, 2, 1]])}, "batch_sizes: expected"),
            "huge sizes": ({"batch_sizes": ints([2**62, 2**62, 2**62, 2**62])}, "batch_sizes|h0"),
            "lengths too": ({"lengths": ints([4, 3, 2])}, "lengths: not accepted"),
            "reset too": ({"reset": torch.zeros(4, 3).bool()}, "reset: not accepted"),
        }
    else:
        bad |= {
            "no steps": ({"x": x[:0]}, "x: expected a sequence length"),
            "batch sizes": ({"batch_sizes": torch.tensor([3] * 5)}, "x: expected shape"),
            "negative length": (
                {"lengths": torch.tensor([1, -1, 2])},
                "lengths: .*got -1 at row 1",
            ),
            "length beyond T": ({"lengths": torch.tensor([1, 2, 6])}, "lengths: .*got 6 at row 2"),
            "lengths' shape": ({"lengths": torch.tensor([1, 2])}, "lengths: expected shape"),
            "lengths' dtype": ({"lengths": torch.ones(3)}, "lengths: expected dtype int64"),
            "reset's shape": ({"reset": torch.zeros(B, T).bool()}, "reset: expected shape"),
            "reset's dtype": ({"reset": torch.zeros(T, B)}, "reset: expected dtype bool"),
        }
    return bad


def refused(call: Callable[[], Any], message: str, what: str) -> None:
    try:
        call()
    except ERRORS as error:
        assert re.search(message, str(error)), f"{what}: {error}"  # noqa: PT017
    else:
        pytest.fail(f"{what}: accepted")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("mode", oracle.MODES)
def test_raw_operators(mode: str, packed: bool) -> None:
    raw = RawCall(mode, packed)
    raw.backward()
    for what, (changed, message) in spoilt(raw).items():
        for call in (raw.forward, raw.backward):
            refused(lambda call=call, changed=changed: call(**changed), message, what)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_raw_backward(mode: str) -> None:
    raw = RawCall(mode)
    a = raw.args
    dy, mask = a["dy"], a["output_mask"]
    bad: dict[str, tuple[dict[str, Any], str]] = {
        "dy's shape": ({"dy": dy[1:]}, "dy: expected shape"),
        "dy's dtype": ({"dy": dy.double()}, "dy: expected dtype"),
        "dh_n's shape": ({"dh_n": a["dh_n"][:, 1:]}, "dh_n: expected shape"),
        "y's shape": ({"y": a["y"][..., 1:]}, "y: expected shape"),
        "short mask": ({"output_mask": mask[:-1]}, "output_mask: expected"),
        "long mask": ({"output_mask": [*mask, True]}, "output_mask: expected"),
        "empty mask": ({"output_mask": []}, "output_mask: expected"),
    }
    if mode == "LSTM":
        bad["dc_n's shape"] = ({"dc_n": a["dc_n"][:, 1:]}, "dc_n: expected shape")
        bad["cells' shape"] = ({"cells": a["cells"][1:]}, "cells: expected shape")
        # Without them backward could do with a GRU's: it makes the gates anew.
        _, _, _, gates, cells = raw.forward(save=False)
        bad["nothing saved"] = ({"gates": gates, "cells": cells}, "save=True")
    if mode in ("LSTM", "GRU"):
        bad["gates' shape"] = ({"gates": a["gates"][..., 1:]}, "gates: expected shape")
    for what, (changed, message) in bad.items():
        refused(lambda changed=changed: raw.backward(**changed), message, what)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize("name", ["x", "h0", "dy", "y", "gates", "lengths", "reset"])
def test_raw_operators_with_one_tensor_on_meta(mode: str, name: str) -> None:
    """Devices that do not fit raise, or give meta tensors: no data pointer of theirs is read."""
    raw = RawCall(mode)
    value = raw.args[name]
    if name == "lengths":
        value = torch.tensor([1, 2, 3])
    if name == "reset":
        value = torch.zeros(T, B).bool()
    calls = [raw.backward] + ([raw.forward] if name in RawCall.FORWARD else [])
    for call in calls:
        try:
            outputs = call(**{name: value.to("meta")})
        except (*ERRORS, NotImplementedError):
            continue
        assert all(t.is_meta for t in oracle.tensors(outputs))


def test_instruction_sets_by_name() -> None:
    before = _C.get_cpu_isa()
    for bad in ("", "AVX2", "neon", "baseline "):
        with pytest.raises(ValueError, match=r"is not available: expected one of .*baseline"):
            _C.set_cpu_isa(bad)
    with pytest.raises(TypeError):
        _C.set_cpu_isa(None)
    assert _C.get_cpu_isa() == before


def test_the_process_still_works() -> None:
    """After all that, a good call gives good numbers."""
    test = RawCall("LSTM")
    args = {k: test.args[k] for k in RawCall.FORWARD[:-1]}
    expected = fusedrnn.reference.layer_forward(*args.values())
    torch.testing.assert_close(test.forward()[:3], expected, rtol=1e-5, atol=1e-6)
