"""Numerical proof in float64: first derivatives (batched ones too) and second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import oracle
from fusedrnn import autograd

T, B, INPUT, HIDDEN, PROJ = 3, 2, 2, 3, 2
LENGTHS = torch.tensor([3, 1])
RESET = torch.tensor([[False, True], [True, False], [False, False]])
BATCH_SIZES = torch.tensor([2, 2, 1])

# gradcheck's own tolerance would let an error of a thousandth pass.
TIGHT = {"rtol": 1e-5, "atol": 1e-7}

FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "both ways": {"bidirectional": True},
    "no biases": {"has_biases": False},
    "lengths": {"lengths": LENGTHS, "bidirectional": True},
    "empty row": {"lengths": torch.tensor([0, 2])},
    "reset": {"reset": RESET, "bidirectional": True},
    "lengths and reset": {"lengths": LENGTHS, "reset": RESET, "bidirectional": True},
    "packed": {"batch_sizes": BATCH_SIZES, "bidirectional": True},
}


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small."""


def problem(
    mode: str, form: str, projected: bool = False, states: bool = True
) -> tuple[Callable[..., Any], list[Tensor]]:
    """A layer as a function of its float64 leaves, and the leaves."""
    options = dict(FORMS[form])
    both = options.get("bidirectional", False)
    directions = 2 if both else 1
    extra = {"proj_size": PROJ} if projected else {}
    params = oracle.module_params(
        mode, INPUT, HIDDEN, bidirectional=both, bias=options.get("has_biases", True), **extra
    )
    if mode == "RNN_RELU":
        # Numerical differences must not step over the kink.
        params = [p * 0.3 + 0.05 for p in params]
    rows = (int(BATCH_SIZES.sum()),) if "batch_sizes" in options else (T, B)
    leaves = [torch.randn(*rows, INPUT, dtype=torch.float64)]
    if states:
        leaves.append(torch.randn(directions, B, PROJ if projected else HIDDEN).double())
        if mode == "LSTM":
            leaves.append(torch.randn(directions, B, HIDDEN).double())
    count = len(leaves)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, *rest = tensors[:count]
        weights = tensors[count:]
        h = rest[0] if states else None
        if mode == "LSTM":
            c = rest[1] if states else None
            return autograd.LSTMFunction.apply(x, h, c, weights, **options)
        if mode == "GRU":
            return autograd.GRUFunction.apply(x, h, weights, **options)
        kind = mode[4:].lower()
        return autograd.RNNFunction.apply(x, h, weights, nonlinearity=kind, **options)

    return call, [t.requires_grad_() for t in [*leaves, *params]]


CASES = [
    (mode, form, projected)
    for mode in oracle.MODES
    for form in FORMS
    for projected in ((False, True) if mode == "LSTM" else (False,))
]


@pytest.mark.parametrize(("mode", "form", "projected"), CASES)
def test_first_order(mode: str, form: str, projected: bool) -> None:
    call, leaves = problem(mode, form, projected)
    assert gradcheck(call, leaves, check_batched_grad=True, **TIGHT)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_first_order_in_each_instruction_set(mode: str, isa: str) -> None:
    assert gradcheck(*problem(mode, "lengths and reset"), **TIGHT)


@pytest.mark.parametrize(("mode", "form", "projected"), CASES)
def test_second_order(mode: str, form: str, projected: bool) -> None:
    call, leaves = problem(mode, form, projected)
    assert gradgradcheck(call, leaves, fast_mode=True, check_batched_grad=True, **TIGHT)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_second_order_element_by_element(mode: str) -> None:
    """Every entry of the Hessians, where the test above takes random projections of them."""
    assert gradgradcheck(*problem(mode, "dense"), **TIGHT)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_forward_mode(mode: str) -> None:
    """Dual numbers, and forward over reverse."""
    call, leaves = problem(mode, "lengths and reset")
    assert gradcheck(
        call,
        leaves,
        check_forward_ad=True,
        check_backward_ad=False,
        check_batched_forward_grad=True,
        **TIGHT,
    )
    assert gradgradcheck(call, leaves, fast_mode=True, check_fwd_over_rev=True, **TIGHT)


SUBSETS = [(0,), (1,), (0, 1), (2,), (0, 2), (1, 2), (0, 1, 2)]


@pytest.mark.parametrize(
    ("mode", "which"),
    # c_n, output 2, is LSTM's alone
    [(mode, s) for mode in oracle.MODES for s in SUBSETS if mode == "LSTM" or 2 not in s],
)
def test_every_subset_of_the_incoming_gradients(mode: str, which: tuple[int, ...]) -> None:
    call, leaves = problem(mode, "lengths and reset", projected=mode == "LSTM")

    def part(*tensors: Tensor) -> list[Tensor]:
        outputs = call(*tensors)
        return [outputs[i] for i in which]

    assert gradcheck(part, leaves, **TIGHT)
    assert gradgradcheck(part, leaves, fast_mode=True, **TIGHT)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_absent_states(mode: str) -> None:
    call, leaves = problem(mode, "both ways", states=False)
    assert gradcheck(call, leaves, check_batched_grad=True, **TIGHT)
    assert gradgradcheck(call, leaves, fast_mode=True, **TIGHT)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_some_leaves_frozen(mode: str) -> None:
    call, leaves = problem(mode, "both ways")
    for frozen in range(len(leaves)):
        leaves[frozen].requires_grad_(False)
        assert gradcheck(call, leaves, fast_mode=True, **TIGHT)
        assert gradgradcheck(call, leaves, fast_mode=True, **TIGHT)
        leaves[frozen].requires_grad_()


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_third_order(mode: str) -> None:
    """Derivatives of the Hessian-vector product itself."""
    call, leaves = problem(mode, "dense")
    direction = [torch.randn_like(t) for t in leaves]

    def gradient_along(*tensors: Tensor) -> Tensor:
        value = sum(out.pow(2).sum() for out in call(*tensors))
        grads = torch.autograd.grad(value, tensors, create_graph=True)
        return sum((g * d).sum() for g, d in zip(grads, direction, strict=True))

    assert gradgradcheck(gradient_along, leaves, fast_mode=True, **TIGHT)


class OffByAThousandth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx * 1.001


@pytest.mark.parametrize("leaf", range(5))
def test_the_checks_can_fail(leaf: int) -> None:
    """A gradient that is off by a thousandth does not pass, nor does a second-order one."""
    call, leaves = problem("GRU", "dense")

    def wrong(*tensors: Tensor) -> Any:
        given = list(tensors)
        given[leaf] = OffByAThousandth.apply(given[leaf])
        return call(*given)

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(wrong, leaves, **TIGHT)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradgradcheck(lambda *t: [y.pow(2) for y in wrong(*t)], leaves, **TIGHT)
