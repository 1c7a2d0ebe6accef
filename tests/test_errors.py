"""Bad input: a Python error that names the argument and what was expected, and never a crash."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
import oracle
from fusedrnn import functional

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


@pytest.mark.parametrize("dropout", [-0.5, 1.5, float("nan")])
@pytest.mark.parametrize("name", oracle.CELLS)
def test_functional_dropout(name: str, dropout: float) -> None:
    with pytest.raises(ValueError, match=r"dropout must be a number in range \[0, 1\], got"):
        stateless(name)(torch.randn(T, B, INPUT), None, params_of(name), dropout=dropout)
