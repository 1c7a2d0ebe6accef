"""``lengths`` and ``reset``: forward and every gradient, against row-by-row loops of torch.nn.

The padding holds NaN or infinity throughout, in the input and in the incoming gradients: reading
any of it would show.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
import oracle
from oracle import Results

T, B, INPUT, HIDDEN = 7, 5, 4, 9


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """The row-by-row loops of torch.nn are small work."""


def build(mode: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    if mode.startswith("RNN"):
        options["nonlinearity"] = mode[4:].lower()
    sizes = (options.pop("input_size", INPUT), options.pop("hidden_size", HIDDEN))
    return getattr(nn, mode.split("_")[0])(*sizes, dtype=dtype, **options)


LENGTHS = {
    "mixed": (3, 7, 0, 5, 1),
    "ascending": (1, 2, 3, 5, 7),
    "nobody to the end": (4, 0, 2, 4, 3),
    "all empty": (0,) * B,
    "fewer steps in all than rows": (0, 3, 0, 0, 1),
    "one step": (1, 0, 1, 1, 0),
    "all whole": (T,) * B,
    "none given": None,
}


def make_reset(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    reset = torch.rand(T, B) < {"some": 0.3, "few": 0.1, "no": 0.0, "all": 1.0}[kind]
    if kind == "some":
        reset[0, ::2] = True  # the first step cuts off hx
    return reset


class Given:
    """Arguments in float64, the padding of x still clean."""

    def __init__(self, net: nn.Module, lengths: tuple[int, ...] | None, reset: str) -> None:
        rows = net.num_layers * (2 if net.bidirectional else 1)
        width = (2 if net.bidirectional else 1) * (net.proj_size or net.hidden_size)
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.reset = make_reset(reset)
        self.x = torch.randn(T, B, net.input_size)
        self.h = torch.randn(rows, B, net.proj_size or net.hidden_size)
        self.c = torch.randn(rows, B, net.hidden_size)
        self.cotangents = [torch.randn(T, B, width), *map(torch.randn_like, (self.h, self.c))]
        ends = torch.full((B,), T) if lengths is None else self.lengths
        self.padding = (torch.arange(T).unsqueeze(1) >= ends).unsqueeze(-1)

    def leaves(self, net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        dtype = net.weight_ih_l0.dtype
        found = {"x": x.to(dtype), "h_0": self.h.to(dtype)}
        if net.mode == "LSTM":
            found["c_0"] = self.c.to(dtype)
        return {n: t.clone().requires_grad_() for n, t in found.items()} | dict(
            net.named_parameters()
        )

    def expected(self, net: nn.Module) -> Results:
        leaves = self.leaves(net, self.x)
        y, h_n, c_n = oracle.ragged(
            net, leaves["x"], self.lengths, self.reset, leaves["h_0"], leaves.get("c_0")
        )
        outputs = (y, h_n, c_n) if net.mode == "LSTM" else (y, h_n)
        dys = [dy.to(y.dtype) for dy in self.cotangents[: len(outputs)]]
        return oracle.results(outputs, leaves, dys)

    def ours(self, net: nn.Module, poison: float) -> Results:
        """The fused module's results with the padding poisoned, both ways."""
        leaves = self.leaves(net, self.x.masked_fill(self.padding, poison))
        lstm = net.mode == "LSTM"
        hx = (leaves["h_0"], leaves["c_0"]) if lstm else leaves["h_0"]
        x, reset = leaves["x"], self.reset
        if net.batch_first:
            x, reset = x.transpose(0, 1), None if reset is None else reset.t()
        y, state = net(x, hx, lengths=self.lengths, reset=reset)
        y = y.transpose(0, 1) if net.batch_first else y
        dy = self.cotangents[0].masked_fill(self.padding, poison)
        dys = [dy, *self.cotangents[1 : 3 if lstm else 2]]
        return oracle.results((y, state), leaves, [d.to(y.dtype) for d in dys])


def check(net: nn.Module, given: Given, poison: float = float("nan")) -> None:
    exact = given.expected(oracle.twin(net, torch.float64))
    theirs = given.expected(net)
    ours = given.ours(oracle.twin(net), poison)
    oracle.agree(ours, theirs, exact)
    padding = given.padding
    for name in ("output 0", "grad x"):
        dead = ours[name].masked_select(padding)
        assert oracle.same_bits(dead, torch.zeros_like(dead)), name
    if given.lengths is not None:
        empty = given.lengths == 0
        for name, state in (("output 1", given.h), ("output 2", given.c)):
            if name in ours:
                assert ours[name][:, empty].equal(state[:, empty].to(ours[name].dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("reset", ["none", "some", "all"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("mode", oracle.MODES)
def test_one_layer(
    mode: str, bidirectional: bool, lengths: str, reset: str, dtype: torch.dtype
) -> None:
    net = build(mode, dtype, bidirectional=bidirectional)
    check(net, Given(net, LENGTHS[lengths], reset))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("mode", oracle.MODES)
def test_stacked(mode: str, bidirectional: bool, batch_first: bool) -> None:
    net = build(mode, num_layers=3, bidirectional=bidirectional, batch_first=batch_first)
    for lengths, reset in (("mixed", "few"), ("none given", "some")):
        # the row loops are time-major
        check(net, Given(net, LENGTHS[lengths], reset))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_projection(bias: bool, bidirectional: bool) -> None:
    net = build("LSTM", num_layers=2, proj_size=3, bias=bias, bidirectional=bidirectional)
    for lengths, reset in itertools.product(("mixed", "all empty", "none given"), ("none", "some")):
        check(net, Given(net, LENGTHS[lengths], reset))


@pytest.mark.parametrize("mode", oracle.MODES)
def test_few_steps_of_large_weights(mode: str) -> None:
    """Several steps, though no more (step, row) pairs than rows; weights that leave a cache."""
    size = 1100 if mode.startswith("RNN") else 520
    net = build(mode, input_size=size, hidden_size=size)
    check(net, Given(net, LENGTHS["fewer steps in all than rows"], "none"))


@pytest.mark.parametrize("mode", oracle.MODES)
def test_each_instruction_set(mode: str, isa: str) -> None:
    for hidden in (1, 8, 17, 33):
        net = build(mode, hidden_size=hidden, bidirectional=True)
        check(net, Given(net, LENGTHS["mixed"], "some"))


@pytest.mark.parametrize("mode", oracle.MODES)
def test_two_threads(mode: str) -> None:
    """Enough work for the rows, or the units, to be split."""
    net = build(mode, hidden_size=80, input_size=40, bidirectional=mode == "GRU")
    given = Given(net, LENGTHS["mixed"], "some")
    exact, theirs = given.expected(oracle.twin(net, torch.float64)), given.expected(net)
    torch.set_num_threads(2)
    oracle.agree(given.ours(oracle.twin(net), float("nan")), theirs, exact)


@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), 1e38])
@pytest.mark.parametrize("mode", oracle.MODES)
def test_infinite_padding(mode: str, poison: float) -> None:
    net = build(mode, num_layers=2, bidirectional=True)
    check(net, Given(net, LENGTHS["mixed"], "few"), poison)


@pytest.mark.parametrize(
    ("dtype", "hidden_size"), [(torch.float32, 128), (torch.float64, 64)], ids=str
)
@pytest.mark.parametrize("mode", oracle.MODES)
def test_rows_of_gates_laid_further_apart(mode: str, dtype: torch.dtype, hidden_size: int) -> None:
    """Rows of whole multiples of 2 KiB; of two bytes a value, see test_halves."""
    net = build(mode, dtype, hidden_size=hidden_size, bidirectional=True)
    check(net, Given(net, LENGTHS["mixed"], "some"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("hidden_size", [HIDDEN, 256], ids="H={}".format)
@pytest.mark.parametrize("mode", oracle.MODES)
def test_halves(mode: str, hidden_size: int, dtype: torch.dtype) -> None:
    net = build(mode, dtype, hidden_size=hidden_size, bidirectional=True)
    given = Given(net, LENGTHS["mixed"], "some")
    for name in ("x", "h", "c"):
        setattr(given, name, getattr(given, name).to(dtype).float())
    given.cotangents = [dy.to(dtype).float() for dy in given.cotangents]
    check(net, given)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_many_chunks_of_time(mode: str) -> None:
    """A long sequence, whose chunks must hand states and gradients on to each other."""
    steps = 700
    net = build(mode, torch.float64, hidden_size=3, input_size=2, bidirectional=True)
    x = torch.randn(steps, 3, 2, dtype=torch.float64)
    lengths, reset = torch.tensor([700, 0, 555]), torch.rand(steps, 3) < 0.01
    params = list(net.parameters())
    leaves = [x.requires_grad_(), *params]
    y, *state = oracle.ragged(net, x, lengths, reset, None, None)
    dys = [torch.randn_like(t) for t in (y, *state)]
    fused = oracle.twin(net)
    mine, hidden = fused(x, lengths=lengths, reset=reset)
    hidden = hidden if mode == "LSTM" else (hidden, torch.zeros(0, dtype=torch.float64))
    torch.testing.assert_close([mine, *hidden], [y, *state], rtol=1e-11, atol=1e-12)
    count = 3 if mode == "LSTM" else 2
    theirs = torch.autograd.grad((y, *state)[:count], leaves, dys[:count])
    ours = torch.autograd.grad((mine, *hidden)[:count], [x, *fused.parameters()], dys[:count])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("mode", oracle.MODES)
def test_unbatched_reset(mode: str, bidirectional: bool) -> None:
    fused = oracle.twin(build(mode, num_layers=2, bidirectional=bidirectional))
    x = torch.randn(T, 1, INPUT)
    reset = make_reset("some")[:, :1]
    y, state = fused(x, reset=reset)
    y_1, state_1 = fused(x.squeeze(1), reset=reset.squeeze(1))
    assert y_1.equal(y.squeeze(1))
    for mine, theirs in zip(oracle.tensors(state_1), oracle.tensors(state), strict=True):
        assert mine.equal(theirs.squeeze(1))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("mode", oracle.MODES)
def test_equals_packed_sequence(mode: str, bidirectional: bool) -> None:
    """Bit for bit, the gradients too: it is the same walk over the same rows."""
    fused = oracle.twin(build(mode, num_layers=2, bidirectional=bidirectional))
    lengths = torch.tensor([3, 7, 5, 5, 1])
    given = Given(fused, tuple(lengths.tolist()), "none")
    found = []
    for packed in (False, True):
        leaves = given.leaves(fused, given.x)
        hx = (leaves["h_0"], leaves["c_0"]) if mode == "LSTM" else leaves["h_0"]
        if packed:
            sequence = pack_padded_sequence(leaves["x"], lengths, enforce_sorted=False)
            y, state = fused(sequence, hx)
            y, _ = pad_packed_sequence(y, total_length=T)
        else:
            y, state = fused(leaves["x"], hx, lengths=lengths)
        dys = given.cotangents[: 3 if mode == "LSTM" else 2]
        found.append(oracle.results((y, state), leaves, dys))
    for name, value in found[0].items():
        assert value.equal(found[1][name]), name


def test_trivial_lengths_and_resets_change_nothing() -> None:
    for mode in oracle.MODES:
        fused = oracle.twin(build(mode, bidirectional=True))
        x = torch.randn(T, B, INPUT)
        plain = fused(x)
        whole, none = torch.full((B,), T), torch.zeros(T, B, dtype=torch.bool)
        assert oracle.same_bits(fused(x, lengths=whole, reset=none), plain)


def test_reset_is_a_fresh_start() -> None:
    """After a reset at step s, the forward direction runs as if x began there, without hx."""
    for mode in oracle.MODES:
        fused = oracle.twin(build(mode))
        x = torch.randn(T, B, INPUT)
        hx = torch.randn(1, B, HIDDEN)
        reset = torch.zeros(T, B, dtype=torch.bool)
        reset[3] = True
        y, _ = fused(x, (hx, hx) if mode == "LSTM" else hx, reset=reset)
        torch.testing.assert_close(y[3:], fused(x[3:])[0], rtol=1e-6, atol=1e-6)


def test_no_gradient_crosses_a_reset() -> None:
    for mode in oracle.MODES:
        fused = oracle.twin(build(mode, num_layers=2, bidirectional=True))
        x = torch.randn(T, B, INPUT, requires_grad=True)
        reset = torch.zeros(T, B, dtype=torch.bool)
        reset[3] = True
        after, before = (
            torch.autograd.grad(fused(x, reset=reset)[0][part].sum(), x)[0]
            for part in (slice(3, None), slice(0, 3))
        )
        assert not after[:3].any()
        assert after[3:].all()
        assert not before[3:].any()
        assert before[:3].all()


def test_arguments_are_not_modified() -> None:
    fused = fusedrnn.GRU(INPUT, HIDDEN, bidirectional=True)
    x, lengths, reset = torch.randn(T, B, INPUT), torch.tensor(LENGTHS["mixed"]), make_reset("some")
    kept = [t.clone() for t in (x, lengths, reset)]
    fused(x, lengths=lengths, reset=reset)[0].sum().backward()
    assert all(a.equal(b) for a, b in zip((x, lengths, reset), kept, strict=True))


@pytest.mark.parametrize("what", ["off by one length", "shifted reset", "no reset"])
def test_the_comparison_can_fail(what: str) -> None:
    net = build("LSTM", bidirectional=True)
    given = Given(net, LENGTHS["mixed"], "some")
    exact = given.expected(oracle.twin(net, torch.float64))
    theirs = given.expected(net)
    if what == "off by one length":
        given.lengths = given.lengths.clamp(max=T - 1)
    elif what == "no reset":
        given.reset = None
    else:
        given.reset = given.reset.roll(1, 0)
    with pytest.raises(AssertionError, match="beyond twice"):
        oracle.agree(given.ours(oracle.twin(net), 0.0), theirs, exact)
