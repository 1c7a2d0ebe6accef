"""Tangents and second derivatives: the operator against the reference, and who takes which path.

That the whole of it is right under autograd and torch.func is the business of test_gradcheck.py and
test_func.py; here stands what they do not see: the operator itself, its float32, and that no
everyday second derivative takes the slow way.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp

import fusedrnn
import oracle
from fusedrnn import _ops, _tangents, reference
from test_denormals import denormals_survive
from test_ops import scattered

T, B, INPUT, HIDDEN, PROJ = 5, 4, 3, 18, 7
FORMS = ("dense", "lengths", "reset", "lengths reset", "packed")
CASES = [
    (mode, form, both, projected)
    for mode, form, both in itertools.product(oracle.MODES, FORMS, (False, True))
    for projected in ((False, True) if mode == "LSTM" else (False,))
]


class Problem:
    """One layer's call, gradients of its results, and a tangent of everything."""

    def __init__(
        self,
        mode: str,
        form: str = "dense",
        both: bool = True,
        projected: bool = False,
        bias: bool = True,
        hidden: int = HIDDEN,
    ) -> None:
        outputs = min(PROJ, hidden - 1) if projected else hidden
        extra = {"proj_size": outputs} if projected else {}
        self.mode, self.bias, self.both = mode, bias, both
        self.lengths = torch.tensor([2, 0, T, 3]) if "lengths" in form else None
        self.reset = torch.rand(T, B) < 0.3 if "reset" in form else None
        self.sizes = torch.tensor([4, 3, 3, 1, 1]) if form == "packed" else None
        directions, lstm = 2 if both else 1, mode == "LSTM"
        rows = (12,) if form == "packed" else (T, B)
        shapes: list[tuple[int, ...] | None] = [
            (*rows, directions * outputs),
            (directions, B, outputs),
            (directions, B, hidden) if lstm else None,
            (*rows, INPUT),
            (directions, B, outputs),
            (directions, B, hidden) if lstm else None,
        ]
        params = oracle.module_params(mode, INPUT, hidden, bidirectional=both, bias=bias, **extra)
        # dy, dh_n, dc_n, x, h0, c0, *params
        self.values = [None if s is None else torch.randn(s).double() for s in shapes] + params
        self.tangents = [None if v is None else torch.randn_like(v) for v in self.values]

    def cast(self, dtype: torch.dtype) -> None:
        self.values, self.tangents = (
            [None if t is None else t.to(dtype) for t in tensors]
            for tensors in (self.values, self.tangents)
        )

    def mask(self) -> list[bool]:
        return [value is not None for value in self.values[3:]]

    def args(self, mask: list[bool] | None = None) -> tuple[Any, ...]:
        dy, dh_n, dc_n, x, h0, c0, *params = self.values
        schedule = self.lengths, self.sizes, self.reset
        y, _, _, gates, cells = _ops.layer_forward(
            self.mode, x, *schedule, h0, c0, params, self.bias, self.both, True
        )
        return (
            self.mode, dy, dh_n, dc_n, x, *schedule, h0, c0, params, y, gates, cells,
            self.tangents[3:], self.tangents[:3], self.bias, self.both,
            self.mask() if mask is None else mask,
        )  # fmt: skip

    def found(self, mask: list[bool] | None = None) -> list[Tensor]:
        *first, dparams = _ops.layer_tangents(*self.args(mask))
        return [*first, *dparams]

    def expected(self) -> list[Tensor]:
        """By torch.func.jvp of the reference."""
        places = [i for i, value in enumerate(self.values) if value is not None]
        schedule = self.lengths, self.sizes, self.reset

        def whole(*given: Tensor) -> tuple[Tensor, ...]:
            values: list[Any] = [None] * len(self.values)
            for place, value in zip(places, given, strict=True):
                values[place] = value
            dy, dh_n, dc_n, x, h0, c0, *params = values
            *states, dparams = reference.layer_backward(
                self.mode, dy, dh_n, dc_n, x, *schedule, h0, c0, params, self.bias, self.both
            )
            outputs = reference.layer_forward(
                self.mode, x, *schedule, h0, c0, params, self.bias, self.both
            )
            return (*outputs, *states, *dparams)

        along = [torch.zeros_like(v) if t is None else t for v, t in self._pairs()]
        return list(jvp(whole, tuple(self.values[i] for i in places), tuple(along))[1])

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for value, tangent in zip(self.values, self.tangents, strict=True):
            if value is not None:
                yield value, tangent


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small, but for what asks for threads."""


def named(tensors: list[Tensor]) -> dict[str, Tensor | None]:
    return {str(i): t for i, t in enumerate(tensors)}


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)
        assert right.numel() == 0 or right.abs().max() > 1e-6, "nothing that could be wrong"


@pytest.mark.parametrize(("mode", "form", "both", "projected"), CASES)
def test_the_operator(mode: str, form: str, both: bool, projected: bool) -> None:
    problem = Problem(mode, form, both, projected)
    close(problem.found(), problem.expected())


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("hidden", [1, 16, 45])
def test_every_instruction_set(mode: str, hidden: int, isa: str) -> None:
    problem = Problem(mode, "lengths reset", hidden=hidden, bias=False)
    close(problem.found(), problem.expected())
    as_near_as_composed(problem)


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("count", [1, 2])
def test_long_sums(mode: str, count: int) -> None:
    """Units enough for two threads, and for an error that grows with their number."""
    with oracle.num_threads(count):
        as_near_as_composed(Problem(mode, "lengths reset", hidden=1100))


def as_near_as_composed(problem: Problem) -> None:
    """In float32; the composition is plain torch."""
    exact = problem.expected()
    problem.cast(torch.float32)
    oracle.agree(named(problem.found()), named(problem.expected()), named(exact))


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("given", ["inputs", "weights", "states", "gradients", "nothing"])
def test_absent_tangents_are_zeros(mode: str, given: str) -> None:
    places = {"inputs": [3], "weights": range(6, 99), "states": (4, 5), "gradients": (0, 1, 2)}
    problem = Problem(mode, "lengths reset", projected=mode == "LSTM")
    problem.tangents = [
        t if i in places.get(given, ()) else None for i, t in enumerate(problem.tangents)
    ]
    for mine, right in zip(problem.found(), problem.expected(), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_what_is_not_wanted_is_empty(mode: str) -> None:
    problem = Problem(mode, "lengths reset", projected=mode == "LSTM")
    whole, given = problem.found(), problem.mask()
    for index in [*range(len(given)), len(given)]:
        mask = [i == index and g for i, g in enumerate(given)]
        for i, (mine, one) in enumerate(zip(problem.found(mask), whole, strict=True)):
            wanted = i < 3 or mask[i - 3]
            assert oracle.same_bits(mine, one) if wanted else mine.shape == (0,)


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
@pytest.mark.parametrize("form", ["dense", "lengths reset", "packed"])
@pytest.mark.parametrize("wanted", ["all", "some", "none"])
def test_opcheck(mode: str, form: str, wanted: str) -> None:
    problem = Problem(mode, form, both=mode != "GRU", projected=mode == "LSTM")
    problem.tangents[4] = None
    every = {"all": 1, "some": 2, "none": 99}[wanted]
    mask = [given and i % every == every - 1 for i, given in enumerate(problem.mask())]
    torch.library.opcheck(_ops.layer_tangents, problem.args(mask))


@pytest.mark.parametrize(("mode", "form", "both", "projected"), CASES)
def test_nothing_aliases_and_nothing_is_modified(
    mode: str, form: str, both: bool, projected: bool
) -> None:
    args = Problem(mode, form, both, projected).args()
    given = oracle.tensors(args, any_dtype=True)
    kept = [t.clone() for t in given]
    results = oracle.tensors(_ops.layer_tangents(*args))
    assert oracle.same_bits(given, kept)
    pointers = [t.untyped_storage().data_ptr() for t in results if t.numel()]
    assert len(set(pointers)) == len(pointers), "two outputs share memory"
    assert not set(pointers) & {t.untyped_storage().data_ptr() for t in given}
    assert all(t.is_contiguous() for t in results)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_every_layout_of_the_arguments(mode: str) -> None:
    problem = Problem(mode, "lengths reset", projected=mode == "LSTM")
    expected = problem.found()
    problem.values, problem.tangents = (
        [None if t is None else scattered(t) for t in tensors]
        for tensors in (problem.values, problem.tangents)
    )
    problem.lengths, problem.reset = scattered(problem.lengths), scattered(problem.reset)
    assert oracle.same_bits(problem.found(), expected)


@pytest.mark.parametrize("form", ["lengths", "packed"])
def test_rows_without_a_step(form: str) -> None:
    """Their states are their h0, whatever the tangent; a batch of none has nothing at all."""
    problem = Problem("LSTM", form)
    if form == "lengths":
        problem.lengths = torch.zeros(B, dtype=torch.long)
    else:
        problem.sizes = torch.tensor([4])
        rows = [0, 3]
        for tensors in (problem.values, problem.tangents):
            for row in rows:
                tensors[row] = tensors[row][:4]
    for mine, right in zip(problem.found(), problem.expected(), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)
    nobody = Problem("GRU")
    for tensors in (nobody.values, nobody.tangents):
        tensors[:6] = [None if t is None else t[:, :0] for t in tensors[:6]]
    found = nobody.found()
    assert found[0].shape == (T, 0, 2 * HIDDEN)
    assert all(not t.any() for t in found)


def test_padding_is_never_read() -> None:
    problem = Problem("LSTM", "lengths")
    expected = problem.found()
    padding = torch.arange(T).unsqueeze(1) >= problem.lengths
    for tensors, place in itertools.product((problem.values, problem.tangents), (0, 3)):
        tensors[place] = tensors[place].masked_fill(padding.unsqueeze(-1), float("nan"))
    found = problem.found()
    assert oracle.same_bits(found, expected)
    assert not found[0][padding].any()
    assert not found[3][padding].any()


@pytest.mark.parametrize("count", [1, 2])
def test_the_callers_denormals_survive(count: int) -> None:
    problem = Problem("GRU", hidden=1100)
    with oracle.num_threads(count):
        problem.found()
        assert denormals_survive()
        problem.tangents[3] = problem.tangents[3][:, 1:]
        with pytest.raises(ValueError, match="tangents"):
            problem.found()
        assert denormals_survive()


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("hidden", [18, 100, 700])
def test_the_denormals_of_a_team_that_begins_here_survive(hidden: int, count: int) -> None:
    # A thread begins with the mode of the one that starts it: here, where a caller's very first
    # team is the one of a product within the operator.
    problem, survived = Problem("LSTM", hidden=hidden), []

    def caller() -> None:
        with oracle.num_threads(count):
            problem.found()
            survived.append(denormals_survive())

    thread = threading.Thread(target=caller)
    thread.start()
    thread.join()
    assert survived == [True]


def test_autocast_changes_nothing() -> None:
    problem = Problem("LSTM")
    problem.cast(torch.float32)
    expected = problem.found()
    with torch.autocast("cpu"):
        assert oracle.same_bits(problem.found(), expected)


ERRORS: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "x's tangent": (
        lambda a: a[14].__setitem__(0, a[4][1:]),
        r"tangents\[0\] \(x\): expected shap",
    ),
    "h0's": (lambda a: a[14].__setitem__(1, a[8][0]), r"tangents\[1\] \(h0\): expected shape"),
    "its dtype": (lambda a: a[14].__setitem__(1, a[8].float()), r"\(h0\): expected dtype"),
    "of an absent c0": (lambda a: a[14].__setitem__(2, a[8]), r"tangents\[2\] \(c0\): expected"),
    "a weight's": (lambda a: a[14].__setitem__(3, a[10][1]), "tangents of params: expected shape"),
    "too few": (lambda a: a[14].pop(), "tangents: expected 11 values, got 10"),
    "of no gradient": (lambda a: a[15].pop(), "gradient_tangents: expected 3 values, got 2"),
    "dy's": (lambda a: a[15].__setitem__(0, a[4]), r"gradient_tangents\[0\] \(dy\): expected shap"),
    "dc_n's": (
        lambda a: a[15].__setitem__(2, a[8]),
        r"gradient_tangents\[2\] \(dc_n\): only the L",
    ),
    "half": (lambda a: half(a), "x: expected a float32 or float64 tensor, got BFloat16"),
    "nothing saved": (lambda a: a.__setitem__(12, a[12][:0]), "gates: expected shape"),
    "x of one step": (lambda a: one_step(a), r"x: expected shape \(T, B, input_size\)"),
}


def half(args: list[Any]) -> None:
    for i in (4, 8):
        args[i] = args[i].bfloat16()
    args[10] = [p.bfloat16() for p in args[10]]


def one_step(args: list[Any]) -> None:
    args[4], args[8] = args[4][0], args[8][0]
    args[10], args[17] = args[10][:4], False


@pytest.mark.parametrize("what", ERRORS)
def test_errors(what: str) -> None:
    spoil, message = ERRORS[what]
    args = list(Problem("GRU").args())
    spoil(args)
    with pytest.raises((ValueError, TypeError), match=message):
        _ops.layer_tangents(*args)


# ---- who takes which path -----------------------------------------------------------------------


def refuse(*_: Any) -> Any:
    raise AssertionError("this path is not the one to take")


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "layer_forward", refuse)
    monkeypatch.setattr(reference, "layer_backward", refuse)


@pytest.fixture
def no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops, "layer_tangents", refuse)


def module(mode: str, **options: Any) -> torch.nn.Module:
    return oracle.fused(mode, (INPUT, HIDDEN), num_layers=2, dtype=torch.float64, **options)


@pytest.mark.parametrize("mode", oracle.MODES)
class TestByTheOperator:
    """Compared with torch.nn, which knows these of an RNN and a GRU, and differences of one."""

    def slope(self, net: torch.nn.Module, x: Tensor) -> Tensor:
        return net(x)[0].square().sum()

    def test_double_backward(self, mode: str, no_reference: None) -> None:
        net, x = module(mode), torch.randn(T, B, INPUT).double().requires_grad_()
        (dx,) = torch.autograd.grad(self.slope(net, x), x, create_graph=True)
        penalty = torch.autograd.grad(dx.square().sum(), list(net.parameters()))
        assert all(g.any() for g in penalty[:-4])

    def test_tangents(self, mode: str, no_reference: None) -> None:
        net, x, along = module(mode), *torch.randn(2, T, B, INPUT).double()
        _, found = jvp(lambda x: net(x)[0], (x,), (along,))
        step = 1e-6
        with torch.no_grad():
            numeric = (net(x + step * along)[0] - net(x - step * along)[0]) / (2 * step)
        torch.testing.assert_close(found, numeric, rtol=1e-6, atol=1e-8)
        with forward_ad.dual_level():
            dual = net(forward_ad.make_dual(x, along))[0]
            assert oracle.same_bits(forward_ad.unpack_dual(dual).tangent, found)

    def test_forward_over_reverse(self, mode: str, no_reference: None) -> None:
        """Of x alone, of the parameters alone: what is not asked for has no tangent either."""
        net, x, along = module(mode), *torch.randn(2, T, B, INPUT).double()
        params = {n: p.detach() for n, p in net.named_parameters()}
        _, of_x = jvp(grad(lambda x: self.slope(net, x)), (x,), (along,))
        (dx,) = torch.autograd.grad(self.slope(net, x.requires_grad_()), x, create_graph=True)
        (expected,) = torch.autograd.grad(dx, x, along)
        torch.testing.assert_close(of_x, expected)

        def of_params(q: dict[str, Tensor]) -> Tensor:
            return functional_call(net, q, (x.detach(),))[0].square().sum()

        tangents = {n: torch.randn_like(p) for n, p in params.items()}
        _, found = jvp(grad(of_params), (params,), (tangents,))
        first = torch.autograd.grad(
            self.slope(net, x.detach()), list(net.parameters()), create_graph=True
        )
        second = torch.autograd.grad(first, list(net.parameters()), list(tangents.values()))
        for name, expected in zip(found, second, strict=True):
            torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize("cell", oracle.CELLS)
def test_double_backward_of_a_cell(cell: str, no_reference: None) -> None:
    theirs = getattr(torch.nn, f"{cell}Cell")(INPUT, HIDDEN, dtype=torch.float64)
    x = torch.randn(B, INPUT).double().requires_grad_()
    h = torch.randn(B, HIDDEN).double().requires_grad_()

    def second(net: torch.nn.Module) -> tuple[Tensor, ...]:
        state = net(x, (h, 2 * h) if cell == "LSTM" else h)
        value = sum(t.square().sum() for t in oracle.tensors(state))
        first = torch.autograd.grad(value, (x, h), create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        return torch.autograd.grad(penalty, [x, h, *net.parameters()])

    for mine, right in zip(second(oracle.twin(theirs)), second(theirs), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("mode", oracle.MODES)
class TestBatches:
    """Many tangents at once: rows of one call, or the composition, never a loop of calls."""

    def test_of_inputs(self, mode: str, no_reference: None, monkeypatch: Any) -> None:
        calls = counted(monkeypatch)
        net, x = module(mode), torch.randn(T, 2, INPUT).double()
        along_each = jacfwd(lambda x: net(x)[0])(x)
        assert calls == {"layer_forward": 2, "layer_tangents": 2}
        torch.testing.assert_close(along_each, jacrev(lambda x: net(x)[0])(x))

    def test_of_gradients(self, mode: str, no_reference: None) -> None:
        net, x = module(mode), torch.randn(T, 2, INPUT).double()
        hessians = [
            outer(inner(lambda x: net(x)[0].square().sum()))(x)
            for outer, inner in itertools.product((jacfwd, jacrev), (jacrev, grad))
        ]
        for other in hessians[1:]:
            torch.testing.assert_close(other, hessians[0])
        assert mode == "RNN_RELU" or hessians[0].abs().max() > 1e-6

    def test_no_gradients_of_the_parameters(self, mode: str, monkeypatch: Any) -> None:
        """They require grad, but not of the transform; backward for N outputs is one call."""
        masks = []

        def run(*args: Any) -> Any:
            masks.append(list(args[-1]))
            return torch.ops.fusedrnn.layer_backward.default(*args)

        monkeypatch.setattr(_ops, "layer_backward", run)
        net, x = module(mode), torch.randn(T, 2, INPUT).double()
        jacrev(lambda x: net(x)[0])(x)
        assert [mask[3:] for mask in masks] == [[False] * 4] * 2
        masks.clear()
        params = {n: p.detach() for n, p in net.named_parameters()}
        grad(lambda p: functional_call(net, p, (x,))[0].square().sum())(params)
        assert [mask[3:] for mask in masks] == [[True] * 4] * 2

    def test_of_weights(self, mode: str, no_operator: None) -> None:
        net, x = module(mode), torch.randn(T, 1, INPUT).double()
        params = {n: p.detach() for n, p in net.named_parameters()}
        name = "bias_hh_l1"

        def loss(bias: Tensor) -> Tensor:
            return functional_call(net, params | {name: bias}, (x,))[0].square().sum()

        hessian = jacfwd(grad(loss))(params[name])
        torch.testing.assert_close(hessian, hessian.T)

    def test_of_ragged_rows(self, mode: str, no_operator: None) -> None:
        net, x = module(mode), torch.randn(T, 2, INPUT).double()
        lengths = torch.tensor([2, T])
        jacobian = jacfwd(lambda x: net(x, lengths=lengths)[0])(x)
        torch.testing.assert_close(jacobian, jacrev(lambda x: net(x, lengths=lengths)[0])(x))


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each operator runs from here on, under a name without its namespace."""
    calls: dict[str, int] = {}
    for name in ("layer_forward", "layer_backward", "layer_tangents"):
        op = getattr(torch.ops.fusedrnn, name).default

        def run(*args: Any, name: str = name, op: Any = op) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return op(*args)

        monkeypatch.setattr(_ops, name, run)
    return calls


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_inside(mode: str, dtype: torch.dtype) -> None:
    leaves = [p.to(dtype) for p in oracle.module_params(mode, INPUT, HIDDEN)]
    x, dy = torch.randn(T, B, INPUT).to(dtype), torch.randn(T, B, HIDDEN).to(dtype)

    def second(convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        own = [convert(p).requires_grad_() for p in leaves]
        given = convert(x).requires_grad_()
        y = fusedrnn._layer.layer(mode, given, *[None] * 5, own, True, False)[0]
        (dx,) = torch.autograd.grad(y, given, convert(dy), create_graph=True)
        return list(torch.autograd.grad(dx, own, torch.ones_like(dx), allow_unused=True))

    for mine, right in zip(second(lambda t: t.clone()), second(Tensor.float), strict=True):
        assert mine.dtype == dtype
        assert oracle.same_bits(mine, right.to(dtype))


def test_a_changed_output_raises() -> None:
    """Second derivatives read what the forward pass has kept, y among it."""
    net, x = module("LSTM"), torch.randn(T, B, INPUT).double().requires_grad_()
    y, _ = net(x)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        dx.sum().backward()


@pytest.mark.parametrize("mode", oracle.MODES)
def test_derivatives_of_tangents(mode: str) -> None:
    """Of the Function's results in everything that it is given: third derivatives, too."""
    problem = Problem(mode, "lengths reset", both=False, projected=mode == "LSTM", hidden=3)
    if mode == "RNN_RELU":
        problem.values[6:] = [p * 0.3 + 0.05 for p in problem.values[6:]]
    tensors = [*problem.values, *problem.tangents[3:], *problem.tangents[:3]]
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        whole = [None if t is None else next(left) for t in tensors]
        found = _tangents.TangentsFunction.apply(
            mode, True, False, problem.mask(), problem.lengths, problem.sizes, problem.reset,
            *saved(problem, whole), *whole,
        )  # fmt: skip
        return tuple(t for t in found if t.numel())

    assert gradcheck(call, leaves, fast_mode=True, rtol=1e-5, atol=1e-7)


def saved(problem: Problem, values: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What forward keeps of these inputs."""
    own = values[: len(problem.values)]
    _, _, _, x, h0, c0, *params = (None if v is None else v.detach() for v in own)
    y, _, _, gates, cells = _ops.layer_forward(
        problem.mode, x, problem.lengths, problem.sizes, problem.reset, h0, c0, params, True,
        problem.both, True,
    )  # fmt: skip
    return y, gates, cells
