"""``recompute=True``: no gates are kept for backward, which makes them anew from x and y."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
import oracle
from fusedrnn import _C, autograd, functional

SEGMENT = _C.segment_rows
with_modes = pytest.mark.parametrize("mode", oracle.MODES)
with_kept = pytest.mark.parametrize("mode", ["LSTM", "GRU"])  # an RNN keeps its output alone

# T, B, I, H and options: one segment of time and many, of one step and of none but the last.
FORMS: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "one segment": ((5, 3, 4, 18), {}),
    "one row": ((2 * SEGMENT + 88, 1, 16, 32), {}),
    "both ways": ((150, 7, 5, 33), {"bidirectional": True, "num_layers": 2}),
    "segments of a step": ((3, SEGMENT + 44, 8, 16), {}),
    "lengths": ((40, 64, 16, 48), {"bidirectional": True}),
    "reset": ((70, 70, 8, 16), {"bidirectional": True}),
    "lengths and reset": ((64, 9, 20, 64), {"bidirectional": True, "batch_first": True}),
    "packed": ((130, 6, 8, 16), {"bidirectional": True}),
    "no biases": ((90, 17, 12, 40), {"bias": False}),
    "projected": ((90, 17, 12, 40), {"proj_size": 9, "bidirectional": True}),
}


def problem(mode: str, form: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A torch.nn module, its input, and what a fused one's forward is given besides."""
    (steps, batch, *sizes), options = FORMS[form]
    kind = {"nonlinearity": mode[4:].lower()} if mode.startswith("RNN") else {}
    net = getattr(nn, mode.split("_")[0])(*sizes, **kind, **options, dtype=dtype)
    first = (batch, steps) if options.get("batch_first") else (steps, batch)
    extras: dict[str, Any] = {}
    if "lengths" in form:
        extras["lengths"] = torch.randint(0, steps + 1, (batch,))
    if "reset" in form:
        extras["reset"] = torch.rand(first) < 0.1
    return net, torch.randn(*first, sizes[0]).to(dtype), extras


def found(net: nn.Module, x: Tensor, form: str, extras: dict[str, Any]) -> oracle.Results:
    """Outputs, and the gradients of input, states and parameters along random ones."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(x.dtype)  # noqa: E731
    batch, rows = FORMS[form][0][1], net.num_layers * (2 if net.bidirectional else 1)
    hidden = getattr(net, "proj_size", 0) or net.hidden_size
    leaves = {"x": x.detach().clone().requires_grad_()}
    leaves["h0"] = draw(rows, batch, hidden).requires_grad_()
    hx: Any = leaves["h0"]
    if net.mode == "LSTM":
        leaves["c0"] = draw(rows, batch, net.hidden_size).requires_grad_()
        hx = (hx, leaves["c0"])
    data: Any = leaves["x"]
    if form == "packed":
        lengths = torch.tensor([130, 3, 77, 76, 130, 1])
        data = pack_padded_sequence(data, lengths, enforce_sorted=False)
    outputs = net(data, hx, **extras)
    cotangents = [draw(*t.shape) for t in oracle.tensors(outputs)]
    return oracle.results(outputs, leaves | dict(net.named_parameters()), cotangents)


CASES = [(mode, form) for form in FORMS for mode in ("LSTM", "GRU")]
CASES.remove(("GRU", "projected"))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("mode", "form"), CASES)
def test_results(isa: str, mode: str, form: str, threads: int) -> None:
    """By the rule of the oracle, whose exact results are those with all gates kept in float64."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        net, x, extras = problem(mode, form, dtype)
        ours = oracle.twin(net)
        exact = found(oracle.twin(oracle.twin(net), torch.float64), x.double(), form, extras)
        with oracle.num_threads(threads):
            theirs = found(ours, x, form, extras)  # held to torch.nn's error in test_fuzz.py
            ours.recompute = True
            oracle.agree(found(ours, x, form, extras), theirs, exact, dtype)


def kept_bytes(call: Callable[[], Any], known: list[Tensor]) -> int:
    """Bytes saved for backward, beside the tensors in `known` and the results."""
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = oracle.tensors(call())
    for t in [*known, *results]:
        saved.pop(t.untyped_storage().data_ptr(), None)
    return sum(saved.values())


@with_modes
@pytest.mark.parametrize(("steps", "batch"), [(4 * SEGMENT, 1), (512, 8), (10, 1024)])
def test_memory(mode: str, steps: int, batch: int) -> None:
    """The LSTM keeps one cell state a segment, others nothing."""
    net = oracle.fused(mode, (4, 32))
    x = torch.randn(steps, batch, 4)
    known = [x, *net.parameters()]
    kept = {"LSTM": 5 * 32, "GRU": 4 * 32}.get(mode, 0) * steps * batch * 4
    assert kept <= kept_bytes(lambda: net(x), known) <= 1.1 * kept
    net.recompute = True
    segments = -(-steps // max(1, SEGMENT // batch))
    assert kept_bytes(lambda: net(x), known) == (
        (segments - 1) * batch * 32 * 4 if mode == "LSTM" else 0
    )


GRADCHECK = {
    "dense": {},
    "ragged": {
        "lengths": torch.tensor([3, 1]),
        "reset": torch.tensor([[False, True], [True, False], [False, False]]),
        "bidirectional": True,
    },
    "packed": {"batch_sizes": torch.tensor([2, 2, 1]), "bidirectional": True},
}


@pytest.mark.parametrize("form", GRADCHECK)
@with_kept
def test_gradcheck(one_thread: None, mode: str, form: str) -> None:
    options = GRADCHECK[form]
    both = options.get("bidirectional", False)
    params = oracle.module_params(mode, 2, 3, bidirectional=both)
    rows = (5,) if form == "packed" else (3, 2)
    states = [torch.randn(2 if both else 1, 2, 3).double() for _ in range(2 - (mode == "GRU"))]
    leaves = [torch.randn(*rows, 2).double(), *states, *params]
    for leaf in leaves:
        leaf.requires_grad_()
    function = getattr(autograd, f"{mode}Function")

    def call(x: Tensor, *rest: Tensor) -> Any:
        split = len(states)
        return function.apply(x, *rest[:split], list(rest[split:]), recompute=True, **options)

    torch.autograd.gradcheck(call, leaves, check_batched_grad=True, rtol=1e-5, atol=1e-7)
    torch.autograd.gradgradcheck(call, leaves, rtol=1e-5, atol=1e-7)


@with_kept
def test_second_derivatives_over_many_segments(mode: str) -> None:
    net = oracle.fused(mode, (3, 5), bidirectional=True, dtype=torch.float64)
    x = torch.randn(60, 17, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for recompute in (False, True):
        net.recompute = recompute
        (dx,) = torch.autograd.grad(net(x)[0].sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, *net.parameters()]))
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@with_kept
def test_transforms(mode: str) -> None:
    """``torch.func`` of the call, and of the gradient that an ordinary call has recorded."""
    net = oracle.fused(mode, (3, 5), dtype=torch.float64)
    xs = torch.randn(4, 100, 3, 3, dtype=torch.float64)
    again = copy.deepcopy(net)
    again.recompute = True

    def loss(net: nn.Module, params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, params, (x,))[0].sin().sum()

    results = []
    for one in (net, again):
        params = {n: p.detach() for n, p in one.named_parameters()}
        of_each = torch.func.vmap(torch.func.grad(lambda p, x, m=one: loss(m, p, x)), (None, 0))
        of_x = torch.func.vmap(torch.func.grad(lambda x, m=one, p=params: loss(m, p, x)))
        along = torch.func.jvp(lambda x, m=one, p=params: loss(m, p, x), (xs[0],), (xs[1],))
        x = xs[0].clone().requires_grad_()
        y = one(x)[0]
        dys = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(3)).double()
        pulled = torch.func.vmap(
            lambda dy, y=y, x=x: torch.autograd.grad(y, x, dy, retain_graph=True)[0]
        )(dys)
        batched = torch.autograd.grad(y, x, dys, is_grads_batched=True)
        results.append(oracle.tensors([of_each(params, xs), of_x(xs), along, pulled, batched]))
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@with_kept
def test_compiled(mode: str) -> None:
    net = oracle.fused(mode, (4, 6), bidirectional=True, recompute=True)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, batch in ((300, 3), (40, 50), (2, 300)):
        x = torch.randn(steps, batch, 4)
        lengths = torch.randint(0, steps + 1, (batch,))
        expected = oracle.trained(net, x, lengths=lengths)
        for mine, theirs in zip(
            oracle.trained(compiled, x, lengths=lengths), expected, strict=True
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("form", ["dense", "lengths", "packed"])
@with_modes
def test_opcheck(one_thread: None, mode: str, form: str) -> None:
    params = [p.float() for p in oracle.module_params(mode, 3, 18, bidirectional=True)]
    steps, batch = SEGMENT // 2 + 3, 4
    sizes = torch.tensor([4] * 100 + [3] * (steps - 100)) if form == "packed" else None
    x = torch.randn(*((int(sizes.sum()),) if form == "packed" else (steps, batch)), 3)
    lengths = torch.tensor([steps, 0, 70, 5]) if form == "lengths" else None
    h0 = torch.randn(2, batch, 18)
    given = (mode, x, lengths, sizes, None, h0, None, params, True, True)
    forward = torch.ops.fusedrnn.layer_forward.default
    torch.library.opcheck(forward, (*given, True, True))
    y, h_n, _, gates, cells = forward(*given, True, True)
    assert gates.shape == (0,)
    assert cells.shape == ((2 * batch, 2, 32) if mode == "LSTM" else (0,))
    assert oracle.same_bits((gates, cells), forward(*given, True, True)[3:])
    wanted = [True, True, False, *(True for _ in params)]
    torch.library.opcheck(
        torch.ops.fusedrnn.layer_backward.default,
        (mode, y, h_n, None, *given[1:8], y, gates, cells, True, True, wanted),
    )


def test_what_does_not_fit_is_an_error(one_thread: None) -> None:
    """Gates without the cells between segments, and the operator that takes no less than all."""
    params = [p.float() for p in oracle.module_params("LSTM", 3, 5)]
    x = torch.randn(SEGMENT + 1, 1, 3)
    given = ("LSTM", x, None, None, None, None, None, params, True, False)
    y, _, _, gates, cells = torch.ops.fusedrnn.layer_forward(*given, True, True)
    wanted = [True, False, False, *(True for _ in params)]
    rest = (True, False, wanted)
    with pytest.raises(ValueError, match=r"cells: expected shape \[1, 1, 16\], got \[0\]"):
        torch.ops.fusedrnn.layer_backward(
            "LSTM", y, None, None, *given[1:8], y, gates, cells.new_empty(0), *rest
        )
    with pytest.raises(ValueError, match=r"\[257, 1, 16\], .*save=True, recompute=False"):
        torch.ops.fusedrnn.layer_tangents(
            "LSTM", y, None, None, *given[1:8], y, gates, cells, [None] * 7, [None] * 3, *rest
        )


@pytest.mark.parametrize("name", oracle.CELLS)
def test_modules(name: str) -> None:
    fused = getattr(fusedrnn, name)
    plain, again = fused(3, 5, num_layers=2), fused(3, 5, num_layers=2, recompute=True)
    assert not plain.recompute
    assert again.recompute
    assert "recompute" not in vars(plain)
    assert repr(plain) == repr(getattr(nn, name)(3, 5, num_layers=2))
    assert repr(again) == f"{name}(3, 5, num_layers=2, recompute=True)"
    assert again.state_dict().keys() == plain.state_dict().keys()
    for other in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert other.recompute


def test_convert() -> None:
    net = nn.Sequential(nn.LSTM(3, 5), nn.LSTMCell(3, 5), nn.GRU(3, 5))
    fusedrnn.convert(net, recompute=True)
    assert net[0].recompute
    assert net[2].recompute
    assert not hasattr(net[1], "recompute")
    fusedrnn.revert(net)
    assert not any("recompute" in vars(module) for module in net)
    assert not fusedrnn.convert(net)[0].recompute
    fusedrnn.convert(net, recompute=True)
    assert net[0].recompute, "those that are fused already too"
    assert net[2].recompute
    fusedrnn.convert(net)
    assert net[0].recompute, "as they were"


@with_modes
def test_functional(mode: str) -> None:
    net = oracle.fused(mode, (3, 5))
    function = getattr(functional, mode.split("_")[0].lower())
    kind = {"nonlinearity": mode[4:].lower()} if mode.startswith("RNN") else {}
    x = torch.randn(300, 2, 3)
    known = [x, *net.parameters()]
    call = lambda: function(x, None, list(net.parameters()), recompute=True, **kind)  # noqa: E731
    assert oracle.same_bits(call()[0], net(x)[0])
    assert kept_bytes(call, known) == (2 * 2 * 16 * 4 if mode == "LSTM" else 0)


def test_a_subclass_may_choose() -> None:
    class Frugal(fusedrnn.GRU):
        recompute = True

    net = Frugal(3, 5)
    x = torch.randn(10, 2, 3)
    assert kept_bytes(lambda: net(x), [x, *net.parameters()]) == 0
