"""torch.compile(fullgraph=True, dynamic=True) and torch.export with dynamic T and B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
import oracle

INPUT, HIDDEN = 3, 6
FORMS = ("dense", "lengths", "reset", "lengths and reset")
# T, B. Never 1, which graphs are special for. In the first call, all different from each other and
# from the module's own sizes: torch takes equal sizes for one symbol.
SIZES = ((5, 7), (8, 3), (9, 6), (2, 5))


@pytest.fixture(autouse=True)
def _fresh(one_thread: None) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(mode: str, **options: Any) -> nn.Module:
    if mode.startswith("RNN"):
        options["nonlinearity"] = mode[4:].lower()
    return getattr(fusedrnn, mode.split("_")[0])(INPUT, HIDDEN, **options)


def arguments(form: str, steps: int, batch: int) -> dict[str, Tensor]:
    given: dict[str, Tensor] = {}
    if "lengths" in form:
        given["lengths"] = torch.randint(0, steps + 1, (batch,))
    if "reset" in form:
        given["reset"] = torch.rand(steps, batch) < 0.3
    return given


def graphs() -> int:
    """How many graphs this test's compiled functions have become."""
    return counters["stats"]["unique_graphs"]


def close(found: Any, expected: Any) -> None:
    mine, theirs = oracle.tensors(found), oracle.tensors(expected)
    assert len(mine) == len(theirs)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def check(
    net: nn.Module, backend: str, form: str, training: bool, hx: Callable[[int], Any] | None = None
) -> None:
    """Several sizes through one compiled graph; torch.nn's numbers are not needed, the uncompiled
    module has been proven elsewhere."""
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=True)
    params = list(net.parameters())
    for steps, batch in SIZES:
        x = torch.randn(steps, batch, INPUT, requires_grad=training)
        given = arguments(form, steps, batch)
        state = None if hx is None else hx(batch)
        with torch.set_grad_enabled(training):
            expected, found = net(x, state, **given), compiled(x, state, **given)
        close(found, expected)
        if training:
            dys = [torch.randn_like(t) for t in oracle.tensors(expected)]
            close(
                torch.autograd.grad(oracle.tensors(found), [x, *params], dys),
                torch.autograd.grad(oracle.tensors(expected), [x, *params], dys),
            )
    assert graphs() == 1, "recompiled for another size"


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_one_graph_for_all_sizes(mode: str, form: str, training: bool) -> None:
    check(build(mode, bidirectional=True), "aot_eager", form, training)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_stacked_with_states(mode: str) -> None:
    net = build(mode, num_layers=2, bidirectional=True)

    def hx(batch: int) -> Any:
        h = torch.randn(4, batch, HIDDEN)
        return (h, torch.randn_like(h)) if mode == "LSTM" else h

    check(net, "aot_eager", "lengths", True, hx)


def test_one_tensor_for_both_states() -> None:
    net = build("LSTM")

    def hx(batch: int) -> Any:
        zeros = torch.zeros(1, batch, HIDDEN)
        return zeros, zeros

    check(net, "aot_eager", "dense", True, hx)


def test_projection_batch_first_dropout_in_a_model() -> None:
    net = nn.Sequential(
        fusedrnn.LSTM(INPUT, HIDDEN, 2, proj_size=2, batch_first=True, dropout=0.5),
    )
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    net.eval()
    for batch, steps in SIZES:
        x = torch.randn(batch, steps, INPUT)
        close(compiled(x), net(x))
    net.train()
    y = compiled(torch.randn(4, 5, INPUT))[0]
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(cell: str) -> None:
    net = getattr(fusedrnn, cell)(INPUT, HIDDEN)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (5, 3, 8):
        x = torch.randn(batch, INPUT, requires_grad=True)
        found, expected = compiled(x), net(x)
        close(found, expected)
        close(
            torch.autograd.grad(oracle.tensors(found)[0].sum(), [x, net.weight_ih]),
            torch.autograd.grad(oracle.tensors(expected)[0].sum(), [x, net.weight_ih]),
        )
    assert graphs() == 1


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_packed_with_states(mode: str, enforce_sorted: bool) -> None:
    """How many rows there are is a value of batch_sizes, which a graph does not know."""
    net = build(mode, num_layers=2)
    lengths = torch.tensor([5, 2, 4] if not enforce_sorted else [5, 4, 2])
    packed = pack_padded_sequence(torch.randn(5, 3, INPUT), lengths, enforce_sorted=enforce_sorted)
    h = torch.randn(2, 3, HIDDEN, requires_grad=True)

    def call(packed: PackedSequence, h: Tensor) -> tuple[Tensor, Tensor]:
        output, state = net(packed, (h, h * 2) if mode == "LSTM" else h)
        return output.data, state[0] if mode == "LSTM" else state

    found = torch.compile(call, backend="aot_eager", fullgraph=True)(packed, h)
    expected = call(packed, h)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found[0].sum(), [h, *net.parameters()]),
        torch.autograd.grad(expected[0].sum(), [h, *net.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_autocast_inside_the_graph() -> None:
    for mode in ("LSTM", "GRU"):
        net = build(mode)

        def step(x: Tensor, net: nn.Module = net) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return net(x)[0]

        x = torch.randn(5, 4, INPUT)
        found = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
        assert found.dtype == step(x).dtype
        torch.testing.assert_close(found, step(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_inductor(training: bool) -> None:
    """The whole way, C++ compiler included: one small model each."""
    net = build("LSTM" if training else "GRU", bidirectional=True)
    check(net, "inductor", "lengths and reset", training)


def test_transforms_inside_the_graph() -> None:
    net = build("GRU").double()
    params = {n: p.detach() for n, p in net.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, params, (x,))[0].pow(2).sum()

    x = torch.randn(4, 3, INPUT).double()
    expected = torch.func.grad(loss)(params, x)
    found = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(params, x)
    assert all(g.abs().max() > 0 for g in expected.values())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_RELU"])
def test_export_with_dynamic_sizes(mode: str, form: str) -> None:
    net = build(mode, num_layers=2, bidirectional=True).eval()
    t, b = Dim("T", min=2, max=64), Dim("B", min=2, max=64)
    shapes: dict[str, Any] = {"input": {0: t, 1: b}}
    given = arguments(form, *SIZES[0])
    if "lengths" in given:
        shapes["lengths"] = {0: b}
    if "reset" in given:
        shapes["reset"] = {0: t, 1: b}
    x = torch.randn(*SIZES[0], INPUT)
    program = torch.export.export(net, (x,), given, dynamic_shapes=shapes)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("fusedrnn.layer_forward" in name for name in names)
    exported = program.module()
    for steps, batch in (*SIZES, (64, 64)):
        x, given = torch.randn(steps, batch, INPUT), arguments(form, steps, batch)
        close(exported(x, **given), net(x, **given))


def test_a_recompilation_is_seen() -> None:
    net = build("GRU")
    compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=False)
    for steps, batch in SIZES[:2]:
        compiled(torch.randn(steps, batch, INPUT))
    assert graphs() == 2


def test_a_graph_break_is_seen() -> None:
    """What fullgraph=True is for."""

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, backend="eager", fullgraph=True)(torch.randn(3))
