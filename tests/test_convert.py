"""fusedrnn.convert and revert: the same model, the same Parameters, another engine."""

from __future__ import annotations

import copy
import pickle
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fusedrnn
import oracle

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


class Own(nn.LSTM):
    """A user's own subclass, which may have a forward of its own."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.encoder = nn.Sequential(nn.LSTM(4, 6, 2, bidirectional=True), nn.Identity())
        self.cells = nn.ModuleDict({name: getattr(nn, name)(4, 6) for name in NAMES})
        self.own = Own(4, 6)
        self.shared = self.cells["GRU"]
        self.head = nn.Linear(12, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        y, _ = self.encoder[0](x)
        z, _ = self.shared(x)
        w, _ = self.own(x)
        h = self.cells["GRUCell"](x[0]) + self.cells["RNNCell"](x[0])
        h = h + self.cells["LSTMCell"](x[0])[0] + self.cells["RNN"](x)[0][-1]
        return self.head(y) + self.head(torch.cat([z, w + h + self.cells["LSTM"](x)[0]], -1))


def test_every_module_is_swapped_in_place_and_back() -> None:
    model = Model()
    params = dict(model.named_parameters())
    assert fusedrnn.convert(model) is model
    assert type(model.encoder[0]) is fusedrnn.LSTM
    for name in NAMES:
        assert type(model.cells[name]) is getattr(fusedrnn, name)
    assert model.shared is model.cells["GRU"], "a module used twice stays one"
    assert type(model.own) is Own
    after = dict(model.named_parameters())
    assert list(after) == list(params)
    assert all(after[n] is params[n] for n in params)
    assert fusedrnn.revert(model) is model
    assert type(model.encoder[0]) is nn.LSTM
    for name in NAMES:
        assert type(model.cells[name]) is getattr(nn, name)
    assert model.shared is model.cells["GRU"]
    after = dict(model.named_parameters())
    assert all(after[n] is params[n] for n in params)


def test_the_model_computes_the_same() -> None:
    model = Model()
    tokens = torch.randint(7, (5, 3))

    def results() -> Any:
        y = model(tokens)
        return y, torch.autograd.grad(y.pow(2).sum(), list(model.parameters()))

    before = results()
    after = fusedrnn.convert(model) and results()
    again = fusedrnn.revert(model) and results()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
    assert not oracle.same_bits(after, before), "the kernels were not used at all"
    torch.testing.assert_close(again, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_root_comes_back_as_a_new_module(name: str) -> None:
    root = getattr(nn, name)(3, 4)
    fused = fusedrnn.convert(root)
    assert type(fused) is getattr(fusedrnn, name)
    assert all(a is b for a, b in zip(fused.parameters(), root.parameters(), strict=True))
    assert type(root) is getattr(nn, name)
    back = fusedrnn.revert(fused)
    assert type(back) is getattr(nn, name)
    assert all(a is b for a, b in zip(back.parameters(), root.parameters(), strict=True))
    x = torch.randn(5, 3)
    assert oracle.same_bits(back(x), root(x))
    assert repr(fused) == repr(root)


def test_twice_is_once() -> None:
    model = fusedrnn.convert(Model())
    layer = model.encoder[0]
    assert fusedrnn.convert(model).encoder[0] is layer
    fusedrnn.revert(fusedrnn.revert(model))
    assert type(model.encoder[0]) is nn.LSTM


def test_whoever_else_refers_to_a_module_goes_on_with_it() -> None:
    """A list, a tuple, torch.compile's wrapper: the very object is the fused one."""
    model = nn.Module()
    model.layer = nn.LSTM(3, 4, 2, dropout=0.5)
    model.kept = [model.layer]
    model.also = (model.layer,)
    wrapped = torch.compile(nn.GRU(3, 4, 2, dropout=0.5), backend="eager")
    x = torch.randn(5, 2, 3)
    for swap, kind in ((fusedrnn.convert, fusedrnn), (fusedrnn.revert, nn)):
        swap(model)
        assert type(model.layer) is kind.LSTM
        assert model.kept[0] is model.also[0] is model.layer
        swap(wrapped).eval()
        assert type(wrapped._orig_mod) is kind.GRU
        assert wrapped(x)[0].equal(wrapped(x)[0]), "dropout while evaluating"
        wrapped.train()


def test_optimizers_stay_valid() -> None:
    model = nn.Sequential(nn.GRU(3, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fusedrnn.convert(model)
    before = model[0].weight_hh_l0.detach().clone()
    x = torch.randn(5, 2, 3)
    value = model(x)[0].sum()
    value.backward()
    optimizer.step()
    assert not model[0].weight_hh_l0.equal(before)
    assert model(x)[0].sum() < value


def test_training_flags() -> None:
    model = nn.ModuleList([nn.LSTM(3, 4, 2, dropout=0.5), nn.GRU(3, 4).eval()])
    fusedrnn.convert(model)
    assert model[0].training
    assert model[0].dropout == 0.5
    assert not model[1].training
    model.eval()
    x = torch.randn(5, 2, 3)
    assert oracle.same_bits(model[0](x), model[0](x)), "dropout while evaluating"
    fusedrnn.revert(model)
    assert not model[0].training


def test_hooks_that_hold_their_module_follow() -> None:
    """Of these torch keeps a weak reference to the module: it must be the new one, both ways."""
    model, seen = nn.Sequential(nn.LSTM(3, 4)), []
    model[0].register_load_state_dict_pre_hook(lambda module, *args: seen.append(module))
    for swap in (fusedrnn.convert, fusedrnn.revert):
        swap(model)
        model.load_state_dict(model.state_dict())
        assert seen.pop() is model[0]


def test_hooks_go_along_and_their_handles_work() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    calls = []
    handles = [
        model[0].register_forward_hook(lambda m, a, o: calls.append("forward")),
        model[0].register_forward_pre_hook(lambda m, a: calls.append("pre")),
        model[0].weight_hh_l0.register_hook(lambda g: calls.append("gradient")),
    ]
    fusedrnn.convert(model)
    x = torch.randn(5, 2, 3)
    model(x)[0].sum().backward()
    assert calls == ["pre", "forward", "gradient"]
    for handle in handles:
        handle.remove()
    model(x)[0].sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell"])
def test_parametrizations_go_along(name: str, parametrization: str) -> None:
    module = getattr(nn, name)(3, 4).eval()
    weight = "weight_ih" if name.endswith("Cell") else "weight_hh_l0"
    getattr(parametrizations, parametrization)(module, weight)
    x = torch.randn(5, 3)
    expected = module(x)
    holder = fusedrnn.convert(nn.Sequential(module))
    assert isinstance(holder[0], getattr(fusedrnn, name))
    assert parametrize.is_parametrized(holder[0], weight)
    torch.testing.assert_close(holder[0](x), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(holder.parameters(), module.parameters(), strict=True):
        assert a is b
    original = holder[0].parametrizations[weight]
    with torch.no_grad():
        next(original.parameters()).mul_(2).add_(0.3)
    assert not oracle.tensors(holder[0](x))[0].allclose(oracle.tensors(expected)[0])
    torch.testing.assert_close(holder[0](x), fusedrnn.revert(holder)[0](x), rtol=1e-5, atol=1e-6)
    assert isinstance(holder[0], getattr(nn, name))


def test_state_dict_pickle_and_copies() -> None:
    model = Model()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    fused = fusedrnn.convert(copy.deepcopy(model))
    assert list(fused.state_dict()) == list(state)
    tokens = torch.randint(7, (5, 3))
    expected = fused(tokens)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(twin.encoder[0]) is fusedrnn.LSTM
        assert oracle.same_bits(twin(tokens), expected)
    fresh = Model()
    fresh.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fresh(tokens), expected, rtol=1e-5, atol=1e-6)


def test_moves_and_assignments_after_conversion_reach_the_kernel() -> None:
    model = fusedrnn.convert(nn.Sequential(nn.GRU(3, 4)))
    x = torch.randn(5, 2, 3)
    model.double()
    assert model(x.double())[0].dtype == torch.float64
    model[0].weight_hh_l0 = nn.Parameter(torch.zeros(12, 4, dtype=torch.float64))
    plain = fusedrnn.revert(model)
    zeroed, _ = plain(x.double())
    torch.testing.assert_close(fusedrnn.convert(model)(x.double())[0], zeroed)


def test_moves_after_reverting_reach_torch_nn() -> None:
    """torch.nn keeps a list of its own beside the parameters, which must follow."""
    model = fusedrnn.revert(fusedrnn.convert(nn.Sequential(nn.GRU(3, 4)))).double()
    y, _ = model(torch.randn(5, 2, 3).double())
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in model.parameters())


def test_what_is_no_module() -> None:
    for function in (fusedrnn.convert, fusedrnn.revert):
        with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got dict"):
            function({})


def test_a_model_without_recurrence_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    children = list(model)
    assert fusedrnn.convert(model) is model
    assert all(a is b for a, b in zip(model, children, strict=True))


def test_what_is_bound_to_the_old_module_does_not_go_along() -> None:
    x = torch.randn(5, 2, 3)
    compiled = nn.LSTM(3, 4, 2, dropout=0.5)
    compiled.compile(backend="eager")
    fused = fusedrnn.convert(compiled).eval()
    assert fused(x)[0].equal(fused(x)[0]), "dropout of the old module"
    assert fused(x, lengths=torch.tensor([5, 3]))[0][4, 1].eq(0).all()

    patched = nn.GRU(3, 4)
    patched.forward = types.MethodType(nn.GRU.forward, patched)
    model = nn.Sequential(patched)
    assert fusedrnn.convert(model)[0] is patched
