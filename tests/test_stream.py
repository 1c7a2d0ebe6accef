"""fusedrnn.Stream: the module's own results, step by step, in three formats of its weights."""

from __future__ import annotations

import copy
import pickle
import resource
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusedrnn
import oracle
from fusedrnn import _C, Stream

KINDS = {
    "LSTM": (nn.LSTM, {}),
    "LSTM projected": (nn.LSTM, {"proj_size": 7}),
    "GRU": (nn.GRU, {}),
    "RNN": (nn.RNN, {}),
    "RNN relu": (nn.RNN, {"nonlinearity": "relu"}),
}
# (input, hidden, layers, batch): less than a vector, odd, whole vectors, several threads.
SIZES = [(3, 8, 1, 1), (19, 37, 2, 3), (64, 64, 1, 1), (33, 100, 3, 5), (130, 270, 1, 2)]
STEPS = 12


def make(kind: str, size: tuple[int, int, int, int], bias: bool = True) -> nn.RNNBase:
    cls, options = KINDS[kind]
    torch.manual_seed(3)
    return cls(size[0], size[1], num_layers=size[2], bias=bias, **options)


def make_input(size: tuple[int, int, int, int], steps: int = STEPS) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(steps, size[3], size[0], generator=generator)


@pytest.fixture(params=fusedrnn.cpu_isas())
def isa(request: pytest.FixtureRequest):
    before = _C.get_cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


# ---- the definition, with rounded operands ------------------------------------------------------


def exact(t: Tensor) -> Tensor:
    return t.double()


def rounded_to_bfloat16(t: Tensor) -> Tensor:
    return t.float().bfloat16().double()


def rounded_to_int8(t: Tensor) -> Tensor:
    """Each row to 255 levels between the largest size and its negative."""
    rows = t.float()
    factor = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / factor.clamp_min(1e-37)).round().double() * factor.double()


ROUNDED = {
    torch.float32: exact,
    torch.bfloat16: rounded_to_bfloat16,
    torch.int8: rounded_to_int8,
}


def plain(module: nn.RNNBase, x: Tensor, weights: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n, c_n in float64, a step at a time, weights and what they multiply rounded first."""
    r = ROUNDED[weights]
    finals = []
    for layer in range(module.num_layers):

        def own(name: str, layer: int = layer) -> Tensor | None:
            value = getattr(module, f"{name}_l{layer}", None)
            return None if value is None else value.detach()

        w_ih, w_hh, w_hr = own("weight_ih"), own("weight_hh"), own("weight_hr")
        b_ih = 0 if own("bias_ih") is None else own("bias_ih").double()
        b_hh = 0 if own("bias_hh") is None else own("bias_hh").double()
        h = torch.zeros(x.shape[1], w_hh.shape[1], dtype=torch.float64)
        c = torch.zeros(x.shape[1], module.hidden_size, dtype=torch.float64)
        outputs = []
        for step in x.double():
            a = r(step) @ r(w_ih).T + b_ih
            b = r(h) @ r(w_hh).T + b_hh
            if module.mode == "LSTM":
                i, f, g, o = (a + b).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                if w_hr is not None:
                    h = r(h) @ r(w_hr).T
            elif module.mode == "GRU":
                (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
                n, z = (an + (ar + br).sigmoid() * bn).tanh(), (az + bz).sigmoid()
                h = (1 - z) * n + z * h
            else:
                h = (a + b).relu() if module.mode == "RNN_RELU" else (a + b).tanh()
            outputs.append(h)
        x = torch.stack(outputs)
        finals.append((h, c))
    return x, torch.stack([h for h, _ in finals]), torch.stack([c for _, c in finals])


# A value near the middle of two levels may go either way: then a state is one level off.
LEVEL = {torch.float32: 0.0, torch.bfloat16: 2e-3, torch.int8: 8e-3}


@pytest.mark.parametrize("weights", ROUNDED, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_results(kind: str, size: tuple[int, int, int, int], weights: torch.dtype, isa) -> None:
    for bias in (True, False):
        module = make(kind, size, bias)
        x = make_input(size)
        expected = plain(module, x, weights)
        stream = Stream(module, weights=weights, batch_size=size[3])
        y = stream.run(x)
        h, c = stream.state if module.mode == "LSTM" else (stream.state, expected[2])
        for found, right in zip((y, h, c), expected, strict=True):
            assert found.shape == right.shape
            error = (found.double() - right).abs()
            scale = max(1.0, right.abs().max().item())
            assert error.max() <= 2e-6 * scale + LEVEL[weights] * scale
            # few values are near the middle: on average the roundings agree
            assert error.mean() <= 1e-6 * scale + LEVEL[weights] * scale / 10


def test_float32_is_as_exact_as_torch() -> None:
    for kind in KINDS:
        size = (64, 128, 2, 3)
        module, x = make(kind, size), make_input(size, 50)
        expected = plain(module, x, torch.float32)[0]
        with torch.no_grad():
            theirs = module(x)[0]
        ours = Stream(module, batch_size=3).run(x)
        assert oracle.error_excess(ours, theirs, expected) <= 0


@pytest.mark.parametrize(
    ("weights", "bound"), [(torch.float32, 4e-6), (torch.bfloat16, 1e-2), (torch.int8, 3e-2)]
)
def test_error_against_exact_weights(weights: torch.dtype, bound: float) -> None:
    """The figures of the documentation."""
    for kind in ("LSTM", "GRU", "RNN"):
        for hidden in (64, 512):
            size = (hidden, hidden, 1, 1)
            module, x = make(kind, size), make_input(size, 100)
            expected = plain(module, x, torch.float32)[0]
            error = (Stream(module, weights=weights).run(x).double() - expected).abs()
            assert error.max() <= bound
            assert error.square().mean().sqrt() <= bound / 4


# ---- steps, kinds of arrays, state --------------------------------------------------------------


@pytest.mark.parametrize("weights", ROUNDED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_a_run(kind: str, weights: torch.dtype) -> None:
    size = (19, 37, 2, 3)
    module, x = make(kind, size), make_input(size)
    stream = Stream(module, weights=weights, batch_size=3)
    whole = stream.run(x)
    assert whole.dtype == torch.float32
    stream.reset()
    before = x.clone()
    parts = [stream.step(x[0]), stream.step(x[1]), *stream.run(x[2:5]), *stream.run(x[5:])]
    torch.testing.assert_close(torch.stack(parts), whole, rtol=0, atol=1e-6 + LEVEL[weights])
    assert x.equal(before)
    stream.reset()
    array = stream.run(x.numpy())
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert torch.from_numpy(array).equal(whole)


def test_one_row_needs_no_batch_axis() -> None:
    module = make("GRU", (5, 9, 1, 1))
    x = torch.randn(4, 5)
    stream = Stream(module)
    flat = stream.run(x)
    assert flat.shape == (4, 9)
    stream.reset()
    assert stream.run(x.unsqueeze(1)).squeeze(1).equal(flat)
    stream.reset()
    torch.testing.assert_close(stream.step(x[0]), flat[0], rtol=0, atol=1e-6)
    assert stream.step(x[1].numpy()).shape == (9,)
    assert stream.run(x[:0]).shape == (0, 9)


def test_any_strides_and_readonly_arrays() -> None:
    module = make("LSTM", (6, 8, 1, 2))
    x = torch.randn(2, 7, 6).transpose(0, 1)
    expected = Stream(module, batch_size=2).run(x.contiguous())
    assert Stream(module, batch_size=2).run(x).equal(expected)
    array = x.numpy()
    array.flags.writeable = False
    assert np.array_equal(Stream(module, batch_size=2).run(array), expected.numpy())
    loaded = pickle.loads(pickle.dumps(np.ascontiguousarray(array)))
    assert np.array_equal(Stream(module, batch_size=2).run(loaded), expected.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_state(kind: str) -> None:
    size = (19, 37, 2, 3)
    module, x = make(kind, size), make_input(size)
    with torch.no_grad():
        _, middle = module(x[:5])
        expected, last = module(x[5:], middle)
    stream = Stream(module, batch_size=3)
    stream.state = middle
    torch.testing.assert_close(stream.state, middle, rtol=0, atol=0)
    torch.testing.assert_close(stream.run(x[5:]), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(stream.state, last, rtol=0, atol=1e-6)
    stream.state = None
    states = stream.state if module.mode == "LSTM" else [stream.state]
    assert all(not s.any() for s in states)


def test_a_fork_has_its_own_state() -> None:
    module, x = make("LSTM", (19, 37, 2, 1)), torch.randn(6, 19)
    first = Stream(module, weights=torch.int8)
    first.run(x[:3])
    second = first.fork()
    alone = Stream(module, weights=torch.int8)
    expected = [alone.run(x[:3]), alone.run(x[3:])]
    assert second.run(x[:3]).equal(expected[0])
    assert first.run(x[3:]).equal(expected[1])
    del first
    assert second.run(x[3:]).equal(expected[1])
    assert repr(second) == (
        "Stream(LSTM, layers=2, input_size=19, output_size=37, weights=torch.int8, batch_size=1)"
    )


def test_frozen() -> None:
    module, x = make("GRU", (5, 9, 1, 1)), torch.randn(4, 5)
    before = copy.deepcopy(module.state_dict())
    stream = Stream(module)
    expected = stream.run(x)
    assert all(before[name].equal(value) for name, value in module.state_dict().items())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    stream.reset()
    assert stream.run(x).equal(expected)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("package", [nn, fusedrnn])
def test_cells(kind: str, package) -> None:
    torch.manual_seed(0)
    cell = getattr(package, kind)(5, 9)
    x = torch.randn(6, 2, 5)
    stream = Stream(cell, batch_size=2)
    state = None
    for step in x:
        with torch.no_grad():
            state = cell(step, state)
        h = state[0] if kind == "LSTMCell" else state
        torch.testing.assert_close(stream.step(step), h, rtol=0, atol=1e-6)


def test_fused_modules_and_other_dtypes() -> None:
    module = make("LSTM", (5, 9, 2, 1))
    x = torch.randn(4, 5)
    expected = Stream(module).run(x)
    assert Stream(fusedrnn.convert(copy.deepcopy(module))).run(x).equal(expected)
    assert Stream(copy.deepcopy(module).double()).run(x).equal(expected)


def test_more_threads_change_nothing_that_matters() -> None:
    module, x = make("LSTM", (256, 300, 2, 1)), torch.randn(30, 256)
    threads = torch.get_num_threads()
    try:
        for weights in ROUNDED:
            results = []
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                results.append(Stream(module, weights=weights).run(x))
            for other in results[1:]:
                torch.testing.assert_close(
                    other, results[0], rtol=0, atol=1e-6 + LEVEL[weights] / 4
                )
    finally:
        torch.set_num_threads(threads)


def test_long_runs_in_pieces() -> None:
    """More steps than the scratch holds at once."""
    size = (6, 20, 2, 3)
    module, x = make("GRU", size), make_input(size, 700)
    with torch.no_grad():
        expected = module(x)[0]
    torch.testing.assert_close(Stream(module, batch_size=3).run(x), expected, rtol=0, atol=1e-5)


# ---- bad input ----------------------------------------------------------------------------------


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
    for batch in (0, -1, 2.0):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
            Stream(nn.GRU(3, 4), batch_size=batch)


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


def test_another_thread_is_refused() -> None:
    stream = Stream(make("LSTM", (128, 256, 1, 1)))
    x = torch.randn(20000, 128)
    worker = threading.Thread(target=stream.run, args=(x,))
    refusals = []
    worker.start()
    while worker.is_alive():
        try:
            stream.step(x[0])
        except RuntimeError as error:
            refusals.append(str(error))
    worker.join()
    assert refusals
    assert all("another thread" in message for message in refusals)
    stream.step(x[0])


def test_bounded_memory() -> None:
    module = make("GRU", (16, 32, 2, 1))
    stream = Stream(module, weights=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def spend(count: int) -> int:
        for steps in torch.randint(0, 900, (count,), generator=generator).tolist():
            stream.run(torch.zeros(steps, 16))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = spend(200)
    assert spend(1000) - before < 4096, "kilobytes"
