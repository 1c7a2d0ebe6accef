"""Bad input: a Python error that names the argument and what was expected, and never a crash."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
import oracle
from fusedrnn import _C, functional

T, B, INPUT, HIDDEN = 5, 3, 4, 6
forward_op = torch.ops.fusedrnn.layer_forward.default
backward_op = torch.ops.fusedrnn.layer_backward.default
ERRORS = (ValueError, TypeError, RuntimeError)


@pytest.fixture(params=oracle.CELLS)
def net(request: pytest.FixtureRequest) -> torch.nn.Module:
    return getattr(fusedrnn, request.param)(INPUT, HIDDEN)


# --- lengths and reset --------------------------------------------------------------------------

BAD_LENGTHS: dict[str, tuple[Any, type, str]] = {
    "a list": ([5, 3, 1], TypeError, "lengths must be an int64 tensor of shape .*got list"),
    "int32": (
        torch.ones(B, dtype=torch.int32),
        ValueError,
        r"lengths .*torch\.int64.*torch\.int32",
    ),
    "float": (
        torch.ones(B),
        ValueError,
        r"lengths must have dtype torch\.int64, got torch\.float32",
    ),
    "too many": (torch.ones(B + 1).long(), ValueError, r"lengths must have shape \(3,\).*\(4,\)"),
    "rank 2": (torch.ones(B, 1).long(), ValueError, r"lengths must have shape \(3,\).*\(3, 1\)"),
    "rank 0": (torch.tensor(3), ValueError, r"lengths must have shape \(3,\).*\(\)"),
    "negative": (torch.tensor([1, -1, 2]), ValueError, r"lengths must lie in 0\.\.5.*-1 to 2"),
    "beyond T": (torch.tensor([1, 6, 2]), ValueError, r"lengths must lie in 0\.\.5.*1 to 6"),
    "huge": (torch.tensor([1, 2**62, 2]), ValueError, r"lengths must lie in 0\.\.5"),
    "meta": (torch.ones(B, device="meta").long(), ValueError, "lengths must be on the CPU.*meta"),
}


@pytest.mark.parametrize("bad", BAD_LENGTHS)
def test_lengths(net: torch.nn.Module, bad: str) -> None:
    lengths, kind, message = BAD_LENGTHS[bad]
    with pytest.raises(kind, match=message):
        net(torch.randn(T, B, INPUT), lengths=lengths)


BAD_RESETS: dict[str, tuple[Any, type, str]] = {
    "a list": ([True], TypeError, r"reset must be a bool tensor of shape \(5, 3\), got list"),
    "uint8": (torch.ones(T, B).byte(), ValueError, r"reset must have dtype torch\.bool.*uint8"),
    "transposed": (
        torch.ones(B, T).bool(),
        ValueError,
        r"reset must have shape \(5, 3\).*\(3, 5\)",
    ),
    "rank 1": (torch.ones(T).bool(), ValueError, r"reset must have shape \(5, 3\).*\(5,\)"),
    "meta": (torch.ones(T, B, device="meta").bool(), ValueError, "reset must be on .*cpu.*meta"),
}


@pytest.mark.parametrize("bad", BAD_RESETS)
def test_reset(net: torch.nn.Module, bad: str) -> None:
    reset, kind, message = BAD_RESETS[bad]
    with pytest.raises(kind, match=message):
        net(torch.randn(T, B, INPUT), reset=reset)


def test_reset_is_shaped_as_the_caller_sees_input() -> None:
    net = fusedrnn.GRU(INPUT, HIDDEN, batch_first=True)
    with pytest.raises(ValueError, match=r"reset must have shape \(3, 5\).*\(5, 3\)"):
        net(torch.randn(B, T, INPUT), reset=torch.ones(T, B).bool())
    with pytest.raises(ValueError, match=r"reset must have shape \(5,\).*\(5, 1\)"):
        net(torch.randn(T, INPUT), reset=torch.ones(T, 1).bool())


def test_where_they_have_no_meaning(net: torch.nn.Module) -> None:
    packed = pack_sequence([torch.randn(n, INPUT) for n in (3, 2)])
    for name, value in (("lengths", torch.tensor([3, 2])), ("reset", torch.zeros(3, 2).bool())):
        with pytest.raises(ValueError, match=f"{name} is not supported with a PackedSequence"):
            net(packed, **{name: value})
    with pytest.raises(ValueError, match="lengths is not supported with unbatched"):
        net(torch.randn(T, INPUT), lengths=torch.tensor([3]))


def test_states_of_a_wrong_dtype_or_device(net: torch.nn.Module) -> None:
    lstm = isinstance(net, fusedrnn.LSTM)
    x, h = torch.randn(T, B, INPUT), torch.randn(1, B, HIDDEN)
    name = "hidden[0]" if lstm else "hidden"
    for bad, message in (
        (h.double(), f"Expected {name} dtype torch.float32 as the input's, got torch.float64"),
        (h.to("meta"), "found input tensor at cpu and hidden tensor at meta"),
    ):
        with pytest.raises(RuntimeError) as caught:
            net(x, (bad, h) if lstm else bad)
        assert message in str(caught.value)
    if lstm:
        with pytest.raises(
            TypeError, match=r"hx to be a tuple \(h_0, c_0\) of tensors, got a tensor"
        ):
            net(x, h)
        with pytest.raises(RuntimeError, match="two hidden states"):
            net(x, (h, h, h))
        with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] dtype torch\.float32"):
            net(x, (h, h.double()))


def test_input_on_another_device(net: torch.nn.Module) -> None:
    with pytest.raises(RuntimeError, match="input tensor at meta and parameter tensor at cpu"):
        net(torch.randn(T, B, INPUT, device="meta"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_input_of_a_kind_without_kernels(net: torch.nn.Module, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"RNN input dtype .* does not match weight dtype"):
        net(torch.ones(T, B, INPUT).to(dtype))


def test_complex_weights() -> None:
    with pytest.raises(ERRORS, match=r"float32, float64, bfloat16 or float16.*Complex"):
        fusedrnn.GRU(2, 3, dtype=torch.complex64)(torch.randn(4, 1, 2, dtype=torch.complex64))


# --- fusedrnn.functional ------------------------------------------------------------------------


def params_of(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    mode = "RNN_TANH" if name == "RNN" else name
    return [p.to(dtype) for p in oracle.module_params(mode, INPUT, HIDDEN, **options)]


def stateless(name: str) -> Any:
    return getattr(functional, name.lower())


@pytest.mark.parametrize("name", oracle.CELLS)
def test_functional_parameters(name: str) -> None:
    call, x, good = stateless(name), torch.randn(T, B, INPUT), params_of(name)
    gates = fusedrnn.reference.GATES["RNN_TANH" if name == "RNN" else name] * HIDDEN

    def replaced(index: int, value: Any) -> list[Any]:
        return [value if i == index else p for i, p in enumerate(good)]

    bad: list[tuple[Any, type, str]] = [
        ([], ValueError, "params must hold 4"),
        (good[:3], ValueError, "params must hold 4 .*got 3"),
        (good * 2, ValueError, "got 8"),
        (replaced(0, [1.0]), TypeError, r"params\[0\] must be a tensor, got list"),
        (replaced(0, good[0][0]), ValueError, r"must be 2-D weights"),
        (replaced(0, good[0].t()), ValueError, rf"params\[0\] must have shape \({gates}, "),
        (replaced(1, good[1][:, 1:]), ValueError, r"params\[1\] must have shape"),
        (replaced(2, good[2][1:]), ValueError, rf"params\[2\] must have shape \({gates},\)"),
        (replaced(3, good[3].double()), ValueError, r"params\[3\].*float32.*got torch\.float64"),
        (replaced(3, good[3].to("meta")), ValueError, r"params\[3\].*cpu.*meta"),
    ]
    for params, kind, message in bad:
        with pytest.raises(kind, match=message):
            call(x, None, params)
    with pytest.raises(ValueError, match="params must hold 2 "):
        call(x, None, good, has_biases=False)
    with pytest.raises(ValueError, match="for each of 2 layers"):
        call(x, None, good, num_layers=2)
    with pytest.raises(ValueError, match="num_layers must be greater than zero"):
        call(x, None, good, num_layers=0)
    with pytest.raises(ValueError, match="2 directions"):
        call(x, None, good, bidirectional=True)


def test_functional_nonlinearity() -> None:
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        functional.rnn(torch.randn(T, B, INPUT), None, params_of("RNN"), nonlinearity="gelu")


def test_functional_input_and_states() -> None:
    params, x = params_of("GRU"), torch.randn(T, B, INPUT)
    for bad in (x.double(), x[..., 1:], x[0, 0], x[None], x[:0]):
        with pytest.raises(ERRORS, match=r"(?i)input|expected"):
            functional.gru(bad, None, params)
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 3, 6\), got \[1, 3, 5\]"):
        functional.gru(x, torch.randn(1, B, 5), params)


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
    try:
        found = forward_op(*args, False)[:3]
    except ValueError as error:
        assert "proj" in str(error) or "w_hh" in str(error)  # noqa: PT017
        return
    expected = fusedrnn.reference.layer_forward(*args)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- the raw operators --------------------------------------------------------------------------


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
            "params": params_of("RNN" if mode[:3] == "RNN" else mode, bidirectional=both),
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
    if mode in ("LSTM", "GRU"):
        _, _, _, gates, cells = raw.forward(save=False)
        bad["nothing saved"] = ({"gates": gates, "cells": cells}, "save=True")
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
