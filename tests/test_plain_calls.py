"""Everyday calls: taken by C++ in one go, with the results of the long way round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fusedrnn
from fusedrnn import _C

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")


def plain_calls(monkeypatch: pytest.MonkeyPatch, function: str) -> list[bool]:
    """Of each call of `function` from now on: whether C++ took it, or left it to Python."""
    taken = []
    honest = getattr(_C, function)

    def call(*arguments: Any) -> Any:
        found = honest(*arguments)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(_C, function, call)
    return taken


@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, monkeypatch) -> None:
    taken = plain_calls(monkeypatch, "cell_step")
    cell = getattr(fusedrnn, name)(3, 5)
    x, h, c = torch.randn(2, 3), torch.randn(2, 5), torch.randn(2, 5)
    state = (h, c) if name == "LSTMCell" else h
    parameters = dict(cell.named_parameters())

    def first(result: Any) -> Tensor:
        return result[0] if name == "LSTMCell" else result

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(first(cell(x, state)).square().sum(), cell.parameters()))

    def loss(values: dict[str, Tensor]) -> Tensor:
        return first(torch.func.functional_call(cell, values, (x, state))).square().sum()

    output, grads = first(cell(x, state)), gradients()
    with torch.no_grad():
        assert first(cell(x, state)).equal(output)
    assert taken == [True] * 3
    assert output.grad_fn is not None

    row = (h[0], c[0]) if name == "LSTMCell" else h[0]
    torch.testing.assert_close(first(cell(x[0], row)), output[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first(cell(x, state))
    others = torch.func.grad(loss)(parameters)
    assert taken == [True] * 3 + [False] * 3
    torch.testing.assert_close([others[key] for key in parameters], grads)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(first(cell(dual, state))).tangent
    assert taken[-1] is False
    assert tangent.abs().max() > 0


def without_plain_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "plain_layer", lambda *arguments: None)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, bidirectional: bool, batch_first: bool, monkeypatch) -> None:
    layer = getattr(fusedrnn, name)(3, 5, bidirectional=bidirectional, batch_first=batch_first)
    x = torch.randn(2, 2, 3).transpose(0, 1).requires_grad_()
    h, c = torch.randn(2, 1 + bidirectional, 2, 5)
    states = [None, (h, c) if name == "LSTM" else h]

    def results(hx: Any) -> list[Tensor]:
        output, state = layer(x, hx)
        with torch.no_grad():
            bare = layer(x, hx)[0]
        assert bare.equal(output)
        assert output.grad_fn is not None
        all_of = [output, *(state if name == "LSTM" else [state])]
        loss = sum((i + 1) * value.square().sum() for i, value in enumerate(all_of))
        return [*all_of, *torch.autograd.grad(loss, [x, *layer.parameters()])]

    taken = plain_calls(monkeypatch, "plain_layer")
    found = [results(hx) for hx in states]
    assert taken == [True] * 4
    without_plain_calls(monkeypatch)
    torch.testing.assert_close(found, [results(hx) for hx in states], rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_need_a_closer_look(name: str, monkeypatch) -> None:
    layer = getattr(fusedrnn, name)(3, 5)
    x, h = torch.randn(4, 2, 3), torch.randn(1, 2, 5)
    state = (h, h.clone()) if name == "LSTM" else h
    parameters = dict(layer.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, values, (x, state))[0].square().sum()

    expected = torch.autograd.grad(loss(parameters), layer.parameters())
    taken = plain_calls(monkeypatch, "plain_layer")
    torch.testing.assert_close(layer(x[:, 0])[0], layer(x[:, :1])[0][:, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x, state)
    others = torch.func.grad(loss)(parameters)
    torch.testing.assert_close([others[key] for key in parameters], list(expected))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual, state)[0]).tangent
    assert tangent.abs().max() > 0
    assert taken == [False, True, False, False, False]
    for bad in (x.double(), x[..., :2], x[:0], x.numpy(), None):
        with pytest.raises((ValueError, RuntimeError, AttributeError)):
            layer(bad, state)
    for bad in (h[:, :1], h[..., :4], h.double(), h[0], "h", (h,), 3):
        with pytest.raises((ValueError, RuntimeError, AttributeError, TypeError)):
            layer(x, bad if name != "LSTM" else (h, bad))
    assert not any(taken[5:])
