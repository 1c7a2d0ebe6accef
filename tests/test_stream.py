"""fusedrnn.Stream: the module's own results, step by step, in three formats of its weights."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fusedrnn
import oracle
from fusedrnn import Stream
from stream_oracle import KINDS, ROUNDED, SIZES, make, make_input, plain
from test_memory import in_a_process_of_its_own

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


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_8_bit_values_add_up(sign: int, isa) -> None:
    """All at an end of their range: instructions that sum pairs in 16 bits may saturate."""
    module = nn.RNN(64, 32, nonlinearity="relu", bias=False).requires_grad_(False)
    module.weight_ih_l0.fill_(0.5 * sign)
    y = Stream(module, weights=torch.int8).run(torch.full((1, 64), float(sign)))
    torch.testing.assert_close(y, torch.full((1, 32), 32.0), rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("batch", [1, 2])
def test_steps_of_weights_that_leave_a_cache(kind: str, batch: int, isa) -> None:
    """They take W_ih and W_hh panel by panel, from either end in turn."""
    hidden = 1100 if kind == "RNN" else 520
    size = (hidden, hidden, 1, batch)
    module, x = make(kind, size), make_input(size, 3)
    exact = plain(module, x, torch.float32)[0]
    stream = Stream(module, batch_size=batch)
    y = torch.stack([stream.step(row) for row in x])
    assert (y.double() - exact).abs().max() <= 2e-6
    stream.reset()
    assert y.equal(torch.stack([stream.step(row) for row in x]))


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


def test_a_fork_of_a_subclass() -> None:
    class Own(Stream):
        pass

    assert type(Own(make("GRU", (3, 4, 1, 1))).fork()) is Own


def test_the_state_is_float32_whatever_the_default() -> None:
    stream = Stream(make("LSTM", (3, 4, 1, 1)))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert all(s.dtype == torch.float32 for s in stream.state)
    finally:
        torch.set_default_dtype(default)


def test_a_weight_that_a_hook_computes_is_refused() -> None:
    """It may be older than the parameters: here they change after it was computed."""
    module = nn.GRU(3, 4)
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)
    with torch.no_grad():
        module.weight_hh_l0_orig.mul_(3)
    with pytest.raises(ValueError, match="module: weight_hh_l0 is computed by a hook"):
        Stream(module)
    prune.remove(module, "weight_hh_l0")
    x = torch.randn(6, 3)
    torch.testing.assert_close(Stream(module).run(x), module(x)[0])


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


def threads_of(call: Callable[[], object]) -> float:
    """How many threads were at work in it."""
    own, everyone = time.thread_time(), time.process_time()
    call()
    return (time.process_time() - everyone) / (time.thread_time() - own)


@pytest.mark.alone
def test_a_second_thread_helps_where_steps_follow_closely() -> None:
    stream, x = Stream(fusedrnn.LSTM(512, 512)), torch.randn(512)

    def steps(pause: float) -> None:
        for _ in range(20 if pause else 2000):
            time.sleep(pause)
            stream.step(x)

    with oracle.num_threads(2):
        assert threads_of(lambda: steps(0.0)) > 1.5
        time.sleep(0.1)  # until nobody spins any more
        assert threads_of(lambda: steps(0.01)) < 1.3


@pytest.mark.parametrize("weights", ROUNDED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_pace_of_steps_changes_no_bit(kind: str, weights: torch.dtype) -> None:
    size = (300, 400, 2, 1)
    stream, x = Stream(make(kind, size), weights=weights), make_input(size, 20)
    with oracle.num_threads(2):
        together = [stream.step(row) for row in x]
        stream.reset()
        for row, expected in zip(x, together, strict=True):
            time.sleep(0.006)
            assert stream.step(row).equal(expected)


def test_another_thread_is_refused() -> None:
    stream = Stream(make("LSTM", (128, 256, 1, 1)))
    x = torch.randn(20000, 128)
    refusals = []

    def attempt(call: Callable[[Tensor], object], given: Tensor) -> None:
        try:
            call(given)
        except RuntimeError as error:  # whichever of the two threads came second
            refusals.append(str(error))

    worker = threading.Thread(target=attempt, args=(stream.run, x))
    worker.start()
    while worker.is_alive():
        attempt(stream.step, x[0])
    worker.join()
    assert refusals
    assert all("another thread" in message for message in refusals)
    stream.step(x[0])


def test_bounded_memory() -> None:
    in_a_process_of_its_own("""
    import torch, fusedrnn, test_memory
    stream = fusedrnn.Stream(fusedrnn.GRU(16, 32, num_layers=2), weights=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def spend(count):
        for steps in torch.randint(0, 900, (count,), generator=generator).tolist():
            stream.run(torch.zeros(steps, 16))
        return test_memory.peak()

    before = spend(200)
    grown = spend(1000) - before
    assert grown < 4 << 20, grown
    """)


def test_negated_views() -> None:
    """A tensor may be the negative of what lies in its memory."""
    module = nn.GRU(3, 4).requires_grad_(False)
    h = torch.randn(1, 1, 4)
    x = torch.randn(1, 3)
    streams = fusedrnn.Stream(module), fusedrnn.Stream(module)
    streams[0].state, streams[1].state = -h, torch._neg_view(h)
    assert streams[1].step(torch._neg_view(x)).equal(streams[0].step(-x))
    module.weight_ih_l0 = nn.Parameter(torch._neg_view(-module.weight_ih_l0), False)
    assert fusedrnn.Stream(module).step(x).equal(fusedrnn.Stream(module).step(x.clone()))
    torch.testing.assert_close(fusedrnn.Stream(module).step(x), module(x[None])[0][0])
