"""torch.func and forward-mode AD through the modules: right values, and never a silent zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import fusedrnn
import oracle

T, B, INPUT, HIDDEN = 4, 3, 2, 5
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
FORMS = ("dense", "lengths", "reset")


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small."""


def build(mode: str, **options: Any) -> nn.Module:
    if mode.startswith("RNN"):
        options["nonlinearity"] = mode[4:].lower()
    return getattr(fusedrnn, mode.split("_")[0])(INPUT, HIDDEN, dtype=torch.float64, **options)


def extras(form: str) -> dict[str, Tensor]:
    if form == "lengths":
        return {"lengths": torch.tensor([2, 4, 0])}
    if form == "reset":
        reset = torch.zeros(T, B, dtype=torch.bool)
        reset[2, 0] = reset[0, 1] = reset[3, 2] = True
        return {"reset": reset}
    return {}


def flatten(outputs: Any) -> Tensor:
    """All outputs in one vector."""
    return torch.cat([t.reshape(-1) for t in oracle.tensors(outputs)])


def problem(
    mode: str, form: str, **options: Any
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """Our outputs and the composed ones, both as functions of (x, w), w one of the parameters."""
    net = build(mode, bidirectional=True, **options)
    fixed = {n: p.detach() for n, p in net.named_parameters()}

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return flatten(functional_call(net, fixed | {"weight_hh_l0": w}, (x,), extras(form)))

    def composed(x: Tensor, w: Tensor) -> Tensor:
        return reference_outputs(net, fixed | {"weight_hh_l0": w}, x, form)

    return ours, composed, torch.randn(T, B, INPUT).double(), fixed["weight_hh_l0"]


def reference_outputs(net: nn.Module, params: dict[str, Tensor], x: Tensor, form: str) -> Tensor:
    """fusedrnn.reference, plain torch that every transform handles; proven in test_reference.py."""
    given = extras(form)
    names = [name for layer in net._all_weights for name in layer]
    per_layer = len(names) // net.num_layers
    states = []
    for layer in range(net.num_layers):
        own = [params[n] for n in names[layer * per_layer : (layer + 1) * per_layer]]
        x, *state = fusedrnn.reference.layer_forward(
            net.mode, x, given.get("lengths"), None, given.get("reset"), None, None, own, net.bias,
            net.bidirectional,
        )  # fmt: skip
        states.append(state)
    h_n = torch.cat([s[0] for s in states])
    c_n = [torch.cat([s[1] for s in states])] if net.mode == "LSTM" else []
    return flatten([x, h_n, *c_n])


def close(found: Any, expected: Any) -> None:
    """Equal, and the expectation is no zero that a lost derivative would match."""
    torch.testing.assert_close(found, expected, **CLOSE)
    for tensor in oracle.tensors(expected):
        assert tensor.abs().max() > 1e-6
        assert not tensor.requires_grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", oracle.MODES)
class TestTransforms:
    def test_grad(self, mode: str, form: str) -> None:
        ours, composed, x, w = problem(mode, form, num_layers=2)
        weight = torch.randn_like(ours(x, w))
        found, expected = (
            grad(lambda x, w, f=f: (f(x, w) * weight).sum(), argnums=(0, 1))(x, w)
            for f in (ours, composed)
        )
        close(found, expected)

    def test_vjp_and_jvp(self, mode: str, form: str) -> None:
        ours, composed, x, w = problem(mode, form)
        tangents = (torch.randn_like(x), torch.randn_like(w))
        (value, tangent), expected = (jvp(f, (x, w), tangents) for f in (ours, composed))
        close((value, tangent), expected)
        value, pull = vjp(ours, x, w)
        cotangent = torch.randn_like(value)
        grads = pull(cotangent)
        close(grads, vjp(composed, x, w)[1](cotangent))
        # the two agree with each other: <u, J v> = <J' u, v>
        dot = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
        torch.testing.assert_close((cotangent * tangent).sum(), dot, **CLOSE)

    def test_jacobians(self, mode: str, form: str) -> None:
        ours, composed, x, w = problem(mode, form)
        expected = jacrev(composed, argnums=(0, 1))(x, w)
        close(jacrev(ours, argnums=(0, 1))(x, w), expected)
        close(jacfwd(ours, argnums=(0, 1))(x, w), expected)

    def test_second_order(self, mode: str, form: str) -> None:
        ours, composed, x, w = problem(mode, form)
        u, v = torch.randn_like(ours(x, w)), (torch.randn_like(x), torch.randn_like(w))

        def gradient(f: Callable[..., Tensor]) -> Callable[..., Any]:
            return grad(lambda x, w: (f(x, w) * u).pow(2).sum(), argnums=(0, 1))

        expected = jvp(gradient(composed), (x, w), v)
        close(jvp(gradient(ours), (x, w), v), expected)  # forward over reverse
        pulled = vjp(gradient(ours), x, w)[1](v)  # reverse over reverse; the Hessian is symmetric
        close(pulled, expected[1])

        def slope(x: Tensor, w: Tensor) -> Tensor:  # reverse over forward
            return jvp(lambda x, w: (ours(x, w) * u).pow(2).sum(), (x, w), v)[1]

        close(grad(slope, argnums=(0, 1))(x, w), expected[1])

    def test_tangents_of_tangents(self, mode: str, form: str) -> None:
        ours, composed, x, w = problem(mode, form)
        u, v = ((torch.randn_like(x), torch.randn_like(w)) for _ in range(2))
        found, expected = (
            jvp(lambda x, w, f=f: jvp(f, (x, w), u)[1], (x, w), v) for f in (ours, composed)
        )
        close(found, expected)

    def test_dual_numbers(self, mode: str, form: str) -> None:
        ours, composed, x, w = problem(mode, form)
        tangents = torch.randn_like(x), torch.randn_like(w)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) for p, t in zip((x, w), tangents, strict=True)]
            value, tangent = forward_ad.unpack_dual(ours(*duals))
        close((value, tangent), jvp(composed, (x, w), tangents))

    def test_vmap_of_inputs(self, mode: str, form: str) -> None:
        ours, _, _, w = problem(mode, form, num_layers=2)
        xs = torch.randn(T, 6, B, INPUT).double()
        found = vmap(ours, in_dims=(1, None))(xs, w)
        close(found, torch.stack([ours(xs[:, i], w) for i in range(6)]))

    def test_gradients_per_sample(self, mode: str, form: str) -> None:
        ours, composed, _, w = problem(mode, form)
        xs = torch.randn(6, T, B, INPUT).double()
        per_sample = vmap(grad(lambda w, x: ours(x, w).pow(2).sum()), in_dims=(None, 0))
        expected = [grad(lambda w, x: composed(x, w).pow(2).sum())(w, x) for x in xs]
        close(per_sample(w, xs), torch.stack(expected))


# A function's value at x, or along v, that outer autograd differentiates in the parameters.
OUTER: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "grad": lambda f, x, v: grad(lambda x: f(x).pow(2).sum())(x),
    "grad of each sample": lambda f, x, v: vmap(grad(lambda x: f(x).pow(2).sum()))(
        torch.stack([x, v])
    ),
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "hessian": lambda f, x, v: hessian(lambda x: f(x).pow(2).sum())(x),
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "forward over reverse": lambda f, x, v: jvp(grad(lambda x: f(x).pow(2).sum()), (x,), (v,))[1],
}


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("form", ["dense", "lengths"])
@pytest.mark.parametrize("what", OUTER)
def test_parameters_of_the_module_outside_of_the_transform(mode: str, form: str, what: str) -> None:
    """The transform is of the input alone; its result still depends on what requires grad."""
    net = build(mode, num_layers=2)
    params = dict(net.named_parameters())
    x, v = torch.randn(2, T, B, INPUT).double()
    # Slopes of a ReLU do not depend on biases.
    leaves = [p for n, p in params.items() if mode != "RNN_RELU" or n.startswith("weight")]

    def gradients(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(OUTER[what](f, x, v).pow(2).sum(), leaves)

    found = gradients(lambda x: flatten(net(x, **extras(form))))
    close(found, gradients(lambda x: reference_outputs(net, params, x, form)))


@pytest.mark.parametrize("mode", oracle.MODES)
def test_hessian(mode: str) -> None:
    ours, composed, x, w = problem(mode, "lengths")
    found, expected = (
        hessian(lambda x, f=f: f(x, w).pow(2).sum())(x[:, :, :1].expand(T, B, INPUT).contiguous())
        for f in (ours, composed)
    )
    close(found, expected)


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("randomized", ["weights", "weights and inputs"])
def test_ensembles(mode: str, randomized: str) -> None:
    nets = [build(mode, num_layers=2, bidirectional=True) for _ in range(3)]
    params, buffers = stack_module_state(nets)
    params = {n: p.detach() for n, p in params.items()}
    xs = torch.randn(3, T, B, INPUT).double()
    x_dim = 0 if randomized == "weights and inputs" else None
    skeleton = build(mode, num_layers=2, bidirectional=True).to("meta")

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return flatten(functional_call(skeleton, (params, buffers), (x,))).pow(2).sum()

    given = xs if x_dim == 0 else xs[0]
    found = vmap(grad(loss), in_dims=(0, x_dim))(params, given)
    for i, net in enumerate(nets):
        value = flatten(net(xs[i if x_dim == 0 else 0])).pow(2).sum()
        names, tensors = zip(*net.named_parameters(), strict=True)
        for name, g in zip(names, torch.autograd.grad(value, tensors), strict=True):
            close(found[name][i], g)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_vmap_over_lengths_and_states(mode: str) -> None:
    net = build(mode)
    x = torch.randn(T, B, INPUT).double()
    lengths = torch.tensor([[1, 2, 4], [4, 0, 3]])
    states = torch.randn(2, 1, B, HIDDEN).double()

    def call(lengths: Tensor, h: Tensor) -> Tensor:
        return flatten(net(x, (h, h) if mode == "LSTM" else h, lengths=lengths))

    expected = torch.stack([call(n, h) for n, h in zip(lengths, states, strict=True)])
    torch.testing.assert_close(vmap(call)(lengths, states), expected, **CLOSE)


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(cell: str) -> None:
    net = getattr(fusedrnn, cell)(INPUT, HIDDEN, dtype=torch.float64)
    other = getattr(nn, cell)(INPUT, HIDDEN, dtype=torch.float64)
    other.load_state_dict(net.state_dict())
    x, v = torch.randn(B, INPUT).double(), torch.randn(B, INPUT).double()

    def ours(x: Tensor) -> Tensor:
        return flatten(net(x))

    def theirs(x: Tensor) -> Tensor:
        return flatten(other(x))

    expected = torch.autograd.functional.jacobian(theirs, x)
    close(jacrev(ours)(x).detach(), expected)
    close(jacfwd(ours)(x).detach(), expected)
    found = jvp(ours, (x,), (v,))[1].detach()
    close(found, (expected * v).sum((1, 2)))
    found = vmap(jacrev(ours))(torch.stack([x, v])).detach()
    close(found[0], expected)


def test_per_sample_gradients_against_a_loop_of_torch_nn() -> None:
    """The whole idiom with nothing of ours in the expectation."""
    other = nn.LSTM(INPUT, HIDDEN, 2, dtype=torch.float64)
    net = oracle.twin(other)
    params = {n: p.detach() for n, p in net.named_parameters()}
    xs = torch.randn(6, T, 1, INPUT).double()
    found = vmap(grad(lambda p, x: functional_call(net, p, (x,))[0].pow(2).sum()), (None, 0))(
        params, xs
    )
    for i, x in enumerate(xs):
        grads = torch.autograd.grad(other(x)[0].pow(2).sum(), list(other.parameters()))
        for (name, _), g in zip(other.named_parameters(), grads, strict=True):
            close(found[name][i], g)


def test_the_bare_operator_refuses_to_lose_a_derivative() -> None:
    """What the modules avoid: it says so, and does not give zeros."""
    params = oracle.module_params("GRU", INPUT, HIDDEN)

    def bare(x: Tensor) -> Tensor:
        return torch.ops.fusedrnn.layer_forward(
            "GRU", x, *[None] * 5, params, True, False, True
        )[0].sum()  # fmt: skip

    x = torch.randn(T, B, INPUT).double()
    with pytest.raises(RuntimeError, match="not implemented"):
        grad(bare)(x)


def test_the_comparison_can_fail() -> None:
    ours, composed, x, w = problem("GRU", "dense")
    found, expected = (grad(lambda x, f=f: f(x, w).pow(2).sum())(x) for f in (ours, composed))
    with pytest.raises(AssertionError, match="not close"):
        close(found * (1 + 1e-8), expected)
    with pytest.raises(AssertionError):
        close(torch.zeros_like(x), torch.zeros_like(x))


def test_vmap_over_nothing() -> None:
    with pytest.raises(RuntimeError, match="vmap over an axis of size 0 is not supported"):
        vmap(fusedrnn.GRU(2, 3))(torch.randn(0, 4, 3, 2))
