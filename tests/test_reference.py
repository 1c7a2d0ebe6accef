"""fusedrnn.reference, the readable equations: against torch.nn and torch's autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import oracle
from fusedrnn import reference

T, B, INPUT, HIDDEN = 4, 4, 3, 5
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def module(mode: str, bias: bool, bidirectional: bool, proj_size: int = 0) -> nn.Module:
    options: dict[str, Any] = {"bias": bias, "bidirectional": bidirectional, "dtype": torch.float64}
    if mode.startswith("RNN"):
        return nn.RNN(INPUT, HIDDEN, nonlinearity=mode[4:].lower(), **options)
    if mode == "LSTM":
        options["proj_size"] = proj_size
    return getattr(nn, mode)(INPUT, HIDDEN, **options)


def states(net: nn.Module, batch: int = B) -> tuple[Tensor, Tensor | None]:
    directions = 2 if net.bidirectional else 1
    h0 = torch.randn(directions, batch, net.proj_size or HIDDEN, dtype=torch.float64)
    c0 = torch.randn(directions, batch, HIDDEN, dtype=torch.float64)
    return h0.requires_grad_(), c0.requires_grad_() if net.mode == "LSTM" else None


def run_torch(net: nn.Module, x: Any, h0: Tensor, c0: Tensor | None) -> tuple[Any, Tensor, Tensor]:
    y, state = net(x, h0 if c0 is None else (h0, c0))
    return (y, *state) if c0 is not None else (y, state, h0.new_zeros(0))


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small."""


@pytest.fixture(
    params=[
        (mode, bias, bidirectional, proj)
        for mode in oracle.MODES
        for bias in (True, False)
        for bidirectional in (False, True)
        for proj in ((0, 2) if mode == "LSTM" else (0,))
    ],
    ids=str,
)
def net(request: pytest.FixtureRequest) -> nn.Module:
    return module(*request.param)


def check_backward(
    net: nn.Module,
    call: tuple[Any, ...],
    outputs: tuple[Tensor, ...],
    absent: tuple[int, ...],
    given: Tensor | None = None,
) -> None:
    """The hand-written back-propagation against autograd through ``outputs``, which were computed
    from ``call``; ``given`` stands for x in the former."""
    x, lengths, batch_sizes, reset, h0, c0 = call
    params = list(net.parameters())
    dys: list[Tensor | None] = [torch.randn_like(out) for out in outputs]
    for i in absent:
        dys[i] = None
    if c0 is None:
        dys[2] = None
    pairs = [(o, d) for o, d in zip(outputs, dys, strict=True) if d is not None and o.requires_grad]
    leaves = [t for t in (x, h0, c0, *params) if t is not None]
    expected = torch.autograd.grad(
        [o for o, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True
    )
    dx, dh0, dc0, dparams = reference.layer_backward(
        net.mode, *dys, x if given is None else given, lengths, batch_sizes, reset, h0, c0, params,
        net.bias, net.bidirectional,
    )  # fmt: skip
    found = [dx, dh0, *([dc0] if c0 is not None else []), *dparams]
    assert c0 is not None or dc0.shape == (0,)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            mine, torch.zeros_like(mine) if theirs is None else theirs, **EXACT
        )


def test_dense(net: nn.Module) -> None:
    x = torch.randn(T, B, INPUT, dtype=torch.float64, requires_grad=True)
    h0, c0 = states(net)
    expected = run_torch(net, x, h0, c0)
    call = (x, None, None, None, h0, c0)
    found = reference.layer_forward(
        net.mode, *call, list(net.parameters()), net.bias, net.bidirectional
    )
    torch.testing.assert_close(found, expected, **EXACT)
    # Every subset of the incoming gradients that leaves one.
    for absent in [(), (0,), (1,), (0, 1), (0, 2), (1, 2)] if c0 is not None else [(), (0,), (1,)]:
        check_backward(net, call, run_torch(net, x, h0, c0), absent)


def test_absent_states_are_zeros(net: nn.Module) -> None:
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    params = list(net.parameters())
    h0, c0 = (None if s is None else torch.zeros_like(s) for s in states(net))
    without, given = (
        reference.layer_forward(
            net.mode, x, None, None, None, h, c, params, net.bias, net.bidirectional
        )
        for h, c in ((None, None), (h0, c0))
    )
    assert oracle.same_bits(without, given)


def test_packed(net: nn.Module) -> None:
    lengths = torch.tensor([4, 2, 2, 1])
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths)
    data = packed.data.clone().requires_grad_()
    h0, c0 = states(net)
    y, h_n, c_n = run_torch(net, packed._replace(data=data), h0, c0)
    call = (data, None, packed.batch_sizes, None, h0, c0)
    found = reference.layer_forward(
        net.mode, *call, list(net.parameters()), net.bias, net.bidirectional
    )
    torch.testing.assert_close(found, (y.data, h_n, c_n), **EXACT)
    check_backward(net, call, (y.data, h_n, c_n), ())


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("lengths", [(4, 0, 2, 1), (0, 0, 0, 0), (4, 4, 4, 4)])
def test_lengths_and_reset(net: nn.Module, lengths: tuple[int, ...], with_reset: bool) -> None:
    x = torch.randn(T, B, INPUT, dtype=torch.float64, requires_grad=True)
    reset = torch.rand(T, B) < 0.4 if with_reset else None
    h0, c0 = states(net)
    expected = oracle.ragged(net, x, torch.tensor(lengths), reset, h0, c0)
    # What lies in the padding is never read, forward or backward.
    padding = torch.arange(T).unsqueeze(1) >= torch.tensor(lengths)
    dirty = x.detach().masked_fill(padding.unsqueeze(-1), float("nan"))
    params = list(net.parameters())
    options = (params, net.bias, net.bidirectional)
    call = (torch.tensor(lengths), None, reset, h0, c0)
    found = reference.layer_forward(net.mode, dirty, *call, *options)
    torch.testing.assert_close(found, expected, **EXACT)
    assert not found[0][padding].any()
    if not any(lengths):
        assert not found[0].any()
        assert oracle.same_bits(found[1:], [h0, c0] if c0 is not None else [h0, found[2]])
    check_backward(net, (x, *call), expected, (), dirty)


def test_halves_are_computed_in_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        params = [p.to(dtype) for p in oracle.module_params("GRU", INPUT, HIDDEN)]
        x = torch.randn(T, B, INPUT).to(dtype)
        y, _, _ = reference.layer_forward("GRU", x, *[None] * 5, params, True, False)
        wide = [p.float() for p in params]
        expected, _, _ = reference.layer_forward("GRU", x.float(), *[None] * 5, wide, True, False)
        assert y.dtype == dtype
        assert y.equal(expected.to(dtype))


@pytest.mark.parametrize("mode", oracle.MODES)
def test_the_oracle_can_fail(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slightly wrong step must not pass the comparison above."""
    honest = reference._step
    monkeypatch.setattr(
        reference, "_step", lambda *args: honest(*args)._replace(h=honest(*args).h * (1 + 1e-9))
    )
    with pytest.raises(AssertionError, match="not close"):
        test_dense(module(mode, True, False))
