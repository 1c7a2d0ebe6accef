"""What users do with a recorded graph: hooks, checkpoints, changed tensors, gradients asked twice.

The gradients themselves are the business of test_fuzz.py and test_gradcheck.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fusedrnn
import oracle
from fusedrnn import _layer

T, B, INPUT, HIDDEN = 5, 3, 4, 18
MODULES = {"LSTM": fusedrnn.LSTM, "GRU": fusedrnn.GRU, "RNN": fusedrnn.RNN}
with_modules = pytest.mark.parametrize("name", MODULES)


class Graph:
    """A two-layer module's call on inputs that require grad, and the leaves behind it."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.module = MODULES[name](INPUT, HIDDEN, num_layers=2, bidirectional=True, dtype=dtype)
        self.x = torch.randn(T, B, INPUT, dtype=dtype, requires_grad=True)
        self.leaves = [self.x, *self.module.parameters()]
        self.dy = torch.randn(T, B, 2 * HIDDEN, dtype=dtype)

    def y(self) -> Tensor:
        return self.module(self.x)[0]

    def gradients(self, y: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.y() if y is None else y, self.leaves, self.dy, **options)


@with_modules
def test_a_freed_graph_raises(name: str) -> None:
    graph = Graph(name)
    y = graph.y()
    first = graph.gradients(y, retain_graph=True)
    assert oracle.same_bits(first, graph.gradients(y))
    with pytest.raises(RuntimeError, match="second time"):
        graph.gradients(y)


@with_modules
@pytest.mark.parametrize("which", ["weight", "input", "output"])
def test_a_tensor_changed_in_place_raises(name: str, which: str) -> None:
    graph = Graph(name)
    y = graph.y()
    changed = {"weight": graph.module.weight_hh_l0_reverse, "input": graph.x, "output": y}
    with torch.no_grad():
        changed[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.gradients(y)


@with_modules
def test_saved_tensor_hooks_see_every_saved_tensor(name: str) -> None:
    """They are how activations are moved to other memory: backward reads what they give back."""
    graph = Graph(name)
    expected = graph.gradients()
    packed: list[Tensor] = []

    def pack(t: Tensor) -> int:
        packed.append(t.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index].clone()):
        y = graph.y()
    assert sum(t.shape == graph.x.shape and torch.equal(t, graph.x) for t in packed) == 1
    assert oracle.same_bits(expected, graph.gradients(y))
    for t in packed:
        t.zero_()
    assert not oracle.same_bits(expected, graph.gradients(_with_hooks(graph, packed)))


def _with_hooks(graph: Graph, stored: list[Tensor]) -> Tensor:
    """A call whose saved tensors come back as the zeros of ``stored``, in the same order."""
    place = itertools.count()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda _: next(place), lambda index: stored[index]
    ):
        return graph.y()


@with_modules
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(name: str, reentrant: bool) -> None:
    graph = Graph(name)
    expected = graph.gradients()
    y = checkpoint(lambda x: graph.module(x)[0], graph.x, use_reentrant=reentrant)
    y.backward(graph.dy)
    assert oracle.same_bits(expected, [leaf.grad for leaf in graph.leaves])


@with_modules
@pytest.mark.parametrize("how", ["save_on_cpu", "checkpoint"])
def test_second_derivatives_of_what_is_saved_elsewhere(name: str, how: str) -> None:
    graph = Graph(name, torch.float64)

    def penalty(y: Tensor) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(y, graph.x, graph.dy, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), list(graph.module.parameters()))

    expected = penalty(graph.y())
    if how == "checkpoint":
        y = checkpoint(lambda x: graph.module(x)[0], graph.x, use_reentrant=False)
        found = penalty(y)
    else:
        with torch.autograd.graph.save_on_cpu():
            found = penalty(graph.y())
    assert oracle.same_bits(found, expected)


@with_modules
def test_hooks(name: str) -> None:
    """A hook on a tensor in the middle, on a leaf, and on a module may change what flows."""
    graph = Graph(name)
    dx, *dparams = graph.gradients()
    accumulated = []
    graph.module.weight_ih_l0.register_post_accumulate_grad_hook(accumulated.append)
    graph.module.register_full_backward_hook(lambda module, dx, dy: (3 * dx[0],))
    y = graph.y()
    y.register_hook(lambda dy: 2 * dy)
    y.backward(graph.dy)
    torch.testing.assert_close(graph.x.grad, 6 * dx)
    for leaf, grad in zip(graph.module.parameters(), dparams, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)
    assert accumulated == [graph.module.weight_ih_l0]


@with_modules
def test_some_gradients_alone(name: str) -> None:
    """Each leaf's gradient asked on its own has the bits that it has among all, and no .grad."""
    graph = Graph(name)
    y = graph.y()
    for leaf, expected in zip(graph.leaves, graph.gradients(y, retain_graph=True), strict=True):
        (found,) = torch.autograd.grad(y, leaf, graph.dy, retain_graph=True)
        assert oracle.same_bits(found, expected)
    assert all(leaf.grad is None for leaf in graph.leaves)


def test_the_empty_cell_state_is_no_part_of_the_graph() -> None:
    """The operator's empty c_n is never part of a graph."""
    for mode, rows in (("GRU", 3), ("RNN_TANH", 1)):
        params = [
            torch.randn(*shape, requires_grad=True)
            for shape in ((rows * HIDDEN, INPUT), (rows * HIDDEN, HIDDEN))
        ]
        y, h_n, c_n = _layer.layer(
            mode, torch.randn(T, B, INPUT), *[None] * 5, params, False, False
        )
        assert y.requires_grad
        assert h_n.requires_grad
        assert not c_n.requires_grad
        assert c_n.grad_fn is None


@with_modules
def test_gradients_of_a_dual_cotangent(name: str) -> None:
    """The graph is recorded before a forward-mode level opens; its gradients are linear in dy."""
    graph = Graph(name, torch.float64)
    y = graph.y()
    expected = graph.gradients(y, retain_graph=True)
    tangent = torch.randn_like(graph.dy)
    (along_x,) = torch.autograd.grad(y, graph.x, tangent, retain_graph=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(graph.dy, tangent)
        (dx,) = torch.autograd.grad(y, graph.x, dual)
        primal, found = forward_ad.unpack_dual(dx)
    torch.testing.assert_close(primal, expected[0])
    torch.testing.assert_close(found, along_x)


@with_modules
def test_batched_cotangents(name: str) -> None:
    """torch.func.vmap, and autograd's own vmap, over gradients of a graph recorded outside."""
    graph = Graph(name, torch.float64)
    y = graph.y()
    dys = torch.randn(4, *y.shape, dtype=y.dtype)

    def gradients(dy: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, graph.leaves, dy, retain_graph=True, **options)

    one_by_one = [torch.stack(g) for g in zip(*map(gradients, dys), strict=True)]
    for found in (torch.func.vmap(gradients)(dys), gradients(dys, is_grads_batched=True)):
        for mine, expected in zip(found, one_by_one, strict=True):
            torch.testing.assert_close(mine, expected)


def test_errors_of_composed_gradients_keep_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("on the way")

    graph = Graph("GRU")
    y = graph.y()
    monkeypatch.setattr(_layer, "layer_backward", fail)
    with pytest.raises(ZeroDivisionError, match="on the way"):
        graph.gradients(y, create_graph=True)


@with_modules
def test_compiled_autograd(name: str) -> None:
    """torch.compile of the backward pass takes the node of an eager forward as it is."""
    graph = Graph(name)
    expected = graph.gradients()
    y = graph.y()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: y.backward(graph.dy), backend="eager")()
    assert oracle.same_bits(expected, [leaf.grad for leaf in graph.leaves])


@with_modules
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("transformed", [False, True])
def test_a_layer_wants_an_axis_of_steps(name: str, learns: bool, transformed: bool) -> None:
    """The op takes a cell's step without one, whose results are others."""
    function = getattr(fusedrnn.autograd, f"{name}Function")
    params = [p.detach().requires_grad_(learns) for p in MODULES[name](INPUT, HIDDEN).parameters()]
    states = (None, None) if name == "LSTM" else (None,)

    def call(x: Tensor) -> Tensor:
        return function.apply(x, *states, params)[0]

    x = torch.randn(B, INPUT)
    with pytest.raises(ValueError, match=r"x: expected shape \(T, B, input_size\), got"):
        torch.func.vjp(call, x) if transformed else call(x)


def test_a_trace_in_another_thread_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's flag of an ongoing torch.compile is the whole process's."""
    gru, x = fusedrnn.GRU(INPUT, HIDDEN), torch.randn(T, B, INPUT, requires_grad=True)

    def second_order() -> Tensor:
        y = gru(x)[0].sum()
        with monkeypatch.context() as patch:
            patch.setattr(_layer, "_is_compiling", lambda: True)
            (first,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    expected = torch.autograd.functional.jacobian(
        lambda v: torch.autograd.grad(gru(v)[0].sum(), v, create_graph=True)[0].square().sum(), x
    )
    torch.testing.assert_close(second_order(), expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_hooks_may_give_saved_tensors_back_in_other_strides(name: str, recompute: bool) -> None:
    """The same values: the same gradients, first and second ones."""
    net = getattr(fusedrnn, name)(3, 16, bidirectional=True, recompute=recompute).double()
    x = torch.randn(300, 2, 3, dtype=torch.float64, requires_grad=True)

    def turned(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT if t.dim() > 1 else t

    found = []
    for pack in (lambda t: t, turned):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, _ = net(x)
        first = torch.autograd.grad(y.sin().sum(), [x, net.weight_hh_l0], create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), net.weight_hh_l0)
        found.append([*(g.detach() for g in first), *second])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "GRUCell"])
def test_grad_mode_inside_inference_mode(name: str) -> None:
    net = getattr(fusedrnn, name)(3, 4)
    with torch.inference_mode(), torch.enable_grad():
        y = oracle.tensors(net(torch.randn(5, 3)))[0]
    assert y.is_inference()
    assert not y.requires_grad
