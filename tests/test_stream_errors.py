"""fusedrnn.Stream with values, modules, inputs and states that are not right."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fusedrnn
from fusedrnn import Stream
from stream_oracle import ROUNDED, make, plain


@pytest.mark.parametrize("weights", ROUNDED, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(weights: torch.dtype, value: float) -> None:
    module = make("RNN relu", (5, 9, 1, 2))
    x = torch.randn(3, 2, 5)
    x[1, 1, 2] = value
    y = Stream(module, weights=weights, batch_size=2).run(x)
    assert y[:, 0].isfinite().all(), "the other row"
    assert y[0].isfinite().all()
    assert not y[1:, 1].isfinite().all()


def test_weights_that_are_not_finite_are_seen() -> None:
    module = make("RNN", (5, 9, 1, 1))
    with torch.no_grad():
        module.weight_ih_l0[3, 2] = float("nan")
    for weights in ROUNDED:
        y = Stream(module, weights=weights).step(torch.randn(5))
        assert y[3].isnan()
        assert y[:3].isfinite().all()


def test_extreme_scales() -> None:
    """Rows of zeros, of tiny and of huge values have scales of their own."""
    module = make("RNN relu", (16, 9, 1, 4))
    x = torch.randn(1, 4, 16) * torch.tensor([0.0, 1e-30, 1.0, 1e30]).view(1, 4, 1)
    with torch.no_grad():
        module.weight_ih_l0[0].zero_()
        module.weight_ih_l0[1].mul_(1e-3)
        module.bias_ih_l0.zero_()
        module.bias_hh_l0.zero_()
    for weights in ROUNDED:
        y = Stream(module, weights=weights, batch_size=4).step(x[0])
        expected = plain(module, x, weights)[0][0]
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-37)


def test_bad_modules() -> None:
    for module in (nn.LSTM(4, 5, bidirectional=True), fusedrnn.GRU(4, 5, bidirectional=True)):
        with pytest.raises(ValueError, match="module is bidirectional"):
            Stream(module)
    with pytest.raises(TypeError, match=r"module must be an RNN, LSTM, GRU .* got Linear"):
        Stream(nn.Linear(3, 4))
    with pytest.raises(TypeError, match=r"weights must be torch.float32, .* got torch.float16"):
        Stream(nn.GRU(3, 4), weights=torch.float16)
    for batch in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
            Stream(nn.GRU(3, 4), batch_size=batch)


def test_modules_that_compute_something_else() -> None:
    class Doubled(nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    parametrized = parametrize.register_parametrization(
        Doubled(3, 4), "weight_hh_l0", nn.Identity()
    )
    patched, patched_cell = fusedrnn.GRU(3, 4), nn.GRUCell(3, 4)
    patched.forward = patched_cell.forward = lambda input: input
    for module in (Doubled(3, 4), parametrized, patched, patched_cell):
        with pytest.raises(ValueError, match="has a forward of its own"):
            Stream(module)
    for register in ("register_forward_pre_hook", "register_forward_hook"):
        for module in (nn.RNN(3, 4), fusedrnn.LSTMCell(3, 4)):
            handle = getattr(module, register)(lambda *_: None)
            with pytest.raises(ValueError, match="module has forward hooks"):
                Stream(module)
            handle.remove()
            Stream(module)
    unknown = nn.RNNCell(3, 4)
    unknown.nonlinearity = "foo"
    with pytest.raises(ValueError, match="Unknown nonlinearity 'foo'"):
        Stream(unknown)

    class Renamed(fusedrnn.GRU):
        pass

    Stream(Renamed(3, 4))
    Stream(parametrize.register_parametrization(nn.GRU(3, 4), "weight_hh_l0", nn.Identity()))


def test_bad_input() -> None:
    stream = Stream(nn.GRU(3, 4))
    pair = Stream(nn.GRU(3, 4), batch_size=2)
    for wrong, message in (
        (torch.randn(4), r"x: expected shape \(1, 3\) or \(3,\), got \(4,\)"),
        (torch.randn(2, 3), r"x: expected shape \(1, 3\) or \(3,\), got \(2, 3\)"),
        (torch.tensor(1.0), r"got \(\)"),
        (np.zeros((1, 1, 3), np.float32), r"got \(1, 1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.step(wrong)
    with pytest.raises(ValueError, match=r"x: expected shape \(T, 2, 3\), got \(2, 3\)"):
        pair.run(torch.randn(2, 3))
    for wrong in (torch.randn(3).double(), torch.ones(3, dtype=torch.int64)):
        with pytest.raises(TypeError, match="x: expected a float32 tensor on the CPU, got"):
            stream.step(wrong)
    with pytest.raises(TypeError, match=r"x: expected a float32 tensor on the CPU, .* meta"):
        stream.step(torch.randn(3, device="meta"))
    for wrong in (np.zeros(3), np.zeros(3, ">f4"), np.zeros(3, np.int32)):
        with pytest.raises(TypeError, match="x: expected a float32 array, got"):
            stream.step(wrong)
    for wrong in ([1.0, 2.0, 3.0], None, 1):
        with pytest.raises(TypeError, match=r"x: expected a torch.Tensor or a numpy.ndarray, got"):
            stream.step(wrong)
    with pytest.raises(RuntimeError, match="x requires grad"):
        stream.step(torch.randn(3, requires_grad=True))
    with torch.no_grad():
        stream.step(torch.randn(3, requires_grad=True))


def test_bad_states() -> None:
    lstm, gru = Stream(nn.LSTM(3, 4)), Stream(nn.GRU(3, 4))
    with pytest.raises(TypeError, match=r"state must be a pair \(h, c\)"):
        lstm.state = torch.zeros(1, 1, 4)
    with pytest.raises(
        ValueError, match=r"state\[1\] must have shape \(1, 1, 4\), got \(1, 2, 4\)"
    ):
        lstm.state = (torch.zeros(1, 1, 4), torch.zeros(1, 2, 4))
    with pytest.raises(TypeError, match="state must be a tensor, got list"):
        gru.state = [0.0]
    with pytest.raises(ValueError, match="state must have shape"):
        gru.state = torch.zeros(4)


def test_rows_too_long_for_int8_sums() -> None:
    """127 * 127 times the number of products must fit 32 bits."""
    most = (2**31 - 1) // 127**2
    for size, fits in ((most, True), (most + 1, False)):
        module = nn.RNN(size, 1, nonlinearity="relu").requires_grad_(False)
        for p in module.parameters():
            p.zero_()
        module.weight_ih_l0.fill_(1 / size)
        if not fits:
            with pytest.raises(ValueError, match=f"weights: int8 sums hold at most {most}"):
                fusedrnn.Stream(module, weights=torch.int8)
            continue
        y = fusedrnn.Stream(module, weights=torch.int8).run(torch.ones(1, size))
        torch.testing.assert_close(y, torch.ones(1, 1), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight_hh_l0", (3, 8)),
        ("weight_hh_l1", (24, 7)),
        ("weight_ih_l1", (24, 5)),
        ("weight_ih_l0", (2, 3)),
        ("bias_hh_l0", (3,)),
        ("bias_ih_l1", (24, 1)),
    ],
)
def test_parameters_that_do_not_fit_together(name: str, shape: tuple[int, ...]) -> None:
    module = nn.GRU(3, 8, 2)
    setattr(module, name, nn.Parameter(torch.zeros(shape)))
    with pytest.raises(ValueError, match="module: expected "):
        Stream(module)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_values_that_are_no_floating_point_numbers() -> None:
    with pytest.raises(TypeError, match=r"expected floating-point values, got torch\.complex64"):
        Stream(nn.GRU(3, 4).to(torch.complex64))


def test_a_projection_of_another_size() -> None:
    module = nn.LSTM(3, 8, proj_size=4)
    module.weight_hr_l0 = nn.Parameter(torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"expected weight_hr of shape \(4, 8\) in layer 0"):
        Stream(module)


def test_copies_keep_their_own_state() -> None:
    stream = Stream(nn.LSTM(3, 4, 2))
    stream.step(torch.randn(3))
    for other in (copy.copy(stream), copy.deepcopy(stream)):
        for mine, theirs in zip(other.state, stream.state, strict=True):
            assert mine.equal(theirs)
        before = stream.state[0]
        other.step(torch.randn(3))
        assert stream.state[0].equal(before)
        assert not other.state[0].equal(before)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(stream)
