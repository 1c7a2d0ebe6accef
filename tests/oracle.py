"""The tolerance rule, and helpers that run a module and collect all it gives.

A result is right if its error against float64 is at most twice torch.nn's own error in the same
dtype, plus a few units in the last place of the tensor's largest value. The floor is there because
torch.nn's error is one sample of a random thing, and may be near zero by luck; it is no tolerance
for wrong equations, which are off by thousands of such units.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fusedrnn

MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
CELLS = ("LSTM", "GRU", "RNN")
FLOOR_ULPS = {
    torch.bfloat16: 4.0,
    torch.float16: 4.0,
    torch.float32: 16.0,
    torch.float64: 64.0,  # torch.nn is the truth itself here, and its own rounding is not known
}
TINY = 4  # values

Results = dict[str, "Tensor | None"]


def agree(
    ours: Mapping[str, Tensor | None],
    theirs: Mapping[str, Tensor | None],
    exact: Mapping[str, Tensor | None],
    what: object = "",
    tiny_slack: float = 1.0,
) -> list[float]:
    """Assert that ``ours`` obeys the tolerance rule, name by name; returns by how many floors each
    tensor exceeds twice torch.nn's error.

    The few values of a tiny tensor may all be sums that cancelled: ``tiny_slack`` multiplies their
    floor, for tests of thousands of draws. Where torch.nn has no gradient, since nothing depends on
    the leaf, ours may be exact zeros.
    """
    excesses = []
    assert ours.keys() == theirs.keys() == exact.keys(), what
    for name, value in ours.items():
        other, truth = theirs[name], exact[name]
        if other is None:
            assert value is None or not value.any(), f"{name}: torch.nn has no gradient: {what}"
            continue
        assert value is not None, f"{name}: no gradient: {what}"
        assert value.dtype == other.dtype, f"{name}: {value.dtype}, torch.nn {other.dtype}: {what}"
        assert value.shape == other.shape, f"{name}: {value.shape}, torch.nn {other.shape}: {what}"
        excess = error_excess(value, other, truth)
        excesses.append(excess / FLOOR_ULPS[value.dtype])
        floor = FLOOR_ULPS[value.dtype] * (tiny_slack if value.numel() < TINY else 1.0)
        assert excess <= floor, (
            f"{name}: error {error(value, truth):.3g} (torch.nn: {error(other, truth):.3g}), which "
            f"is {excess:.1f} ULP beyond twice torch.nn's; {floor} are allowed: {what}"
        )
    return excesses


def error(value: Tensor, exact: Tensor) -> float:
    """The largest deviation; infinite where a value is not finite, or is not of that shape."""
    assert value.shape == exact.shape
    if value.numel() == 0:
        return 0.0
    deviation = (value.detach().double() - exact.detach().double()).abs().max().item()
    return deviation if deviation == deviation else float("inf")


def error_excess(value: Tensor, other: Tensor, exact: Tensor) -> float:
    """By how many ULP of the largest value our error exceeds twice torch's."""
    excess = error(value, exact) - 2 * error(other, exact)
    if excess <= 0 or value.numel() == 0:
        return 0.0
    scale = max(exact.detach().double().abs().max().item(), torch.finfo(value.dtype).tiny)
    return excess / (scale * torch.finfo(value.dtype).eps)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two nests of tensors are equal bit by bit, NaN and signed zeros included."""
    xs, ys = tensors(a, any_dtype=True), tensors(b, any_dtype=True)
    return len(xs) == len(ys) and all(
        x.dtype == y.dtype and x.shape == y.shape and _bytes(x).equal(_bytes(y))
        for x, y in zip(xs, ys, strict=True)
    )


def _bytes(tensor: Tensor) -> Tensor:
    dense = torch.empty(tensor.shape, dtype=tensor.dtype)
    return dense.copy_(tensor.detach()).reshape(-1).view(torch.uint8)


def tensors(tree: Any, any_dtype: bool = False) -> list[Tensor]:
    """The tensors of a nest, PackedSequences' data included, in order; floating-point ones unless
    ``any_dtype``."""
    if isinstance(tree, Tensor):
        return [tree] if any_dtype or tree.is_floating_point() else []
    if isinstance(tree, PackedSequence):
        return [tree.data]
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in tensors(value, any_dtype)]
    if isinstance(tree, (tuple, list)):
        return [t for value in tree for t in tensors(value, any_dtype)]
    return []


def twin(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A fused module with the options and values of a torch.nn module; or a torch.nn module again
    where ``dtype`` asks for another one."""
    if dtype is not None:
        return _rebuild(type(module), module, dtype)
    return _rebuild(
        getattr(fusedrnn, type(module).__name__), module, next(module.parameters()).dtype
    )


def _rebuild(cls: type, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.RNNCellBase):
        options: dict[str, Any] = {"bias": module.bias}
    else:
        options = {
            name: getattr(module, name)
            for name in ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
        }
        if module.mode == "LSTM":
            options["proj_size"] = module.proj_size
    if hasattr(module, "nonlinearity"):
        options["nonlinearity"] = module.nonlinearity
    new = cls(module.input_size, module.hidden_size, **options, dtype=dtype)
    new.load_state_dict(module.state_dict())
    new.train(module.training)
    for mine, theirs in zip(new.parameters(), module.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return new


def results(
    outputs: Any,
    leaves: Mapping[str, Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> Results:
    """Outputs by position and the gradients of ``leaves``; an output whose cotangent is None is not
    differentiated. A leaf that needs no gradient, or is not given, has None."""
    outs = tensors(outputs)
    found: Results = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    pairs = [
        (out, c.to(out.dtype))
        for out, c in zip(outs, cotangents, strict=True)
        if c is not None and out.requires_grad
    ]
    wanted = [name for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad]
    found.update({f"grad {name}": None for name in leaves})
    if pairs and wanted:
        grads = torch.autograd.grad(
            [out for out, _ in pairs],
            [leaves[name] for name in wanted],
            [c for _, c in pairs],
            allow_unused=True,
        )
        found.update({f"grad {n}": g for n, g in zip(wanted, grads, strict=True)})
    return found


def module_params(mode: str, input_size: int, hidden_size: int, **options: Any) -> list[Tensor]:
    """A flat list of one layer's float64 parameters, as torch.nn initialises them."""
    name, extra = ("RNN", {"nonlinearity": mode[4:].lower()}) if mode[:3] == "RNN" else (mode, {})
    module = getattr(nn, name)(input_size, hidden_size, **extra, **options, dtype=torch.float64)
    return [p.detach() for p in module.parameters()]


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ragged(
    net: nn.Module,
    x: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``lengths`` and ``reset`` mean, by torch.nn alone: layer by layer and row by row, each
    segment between two resets is one call on exactly its steps.

    ``net`` is torch.nn's; x is time-major (T, B, I). Returns output, h_n, c_n ((0,) without c).
    """
    directions = 2 if net.bidirectional else 1
    lstm = net.mode == "LSTM"
    h_ns, c_ns = [], []
    for layer in range(net.num_layers):
        columns = []
        for d in range(directions):
            one = _direction(net, layer, d)
            at = layer * directions + d
            rows = []
            for b in range(x.shape[1]):
                h = (
                    x.new_zeros(1, one.proj_size or one.hidden_size)
                    if h0 is None
                    else h0[at, b : b + 1]
                )
                c = x.new_zeros(1, one.hidden_size) if c0 is None else c0[at, b : b + 1]
                length = x.shape[0] if lengths is None else int(lengths[b])
                cuts = [] if reset is None else [t for t in range(length) if reset[t, b]]
                rows.append(_row(one, x[:, b], length, cuts, h, c, d == 1))
            columns.append(torch.stack([y for y, _, _ in rows], dim=1))
            h_ns.append(torch.cat([h for _, h, _ in rows]))
            c_ns.append(torch.cat([c for _, _, c in rows]))
        x = torch.cat(columns, dim=-1)
    return x, torch.stack(h_ns), torch.stack(c_ns) if lstm else x.new_zeros(0)


def _row(
    one: _OneDirection,
    x: Tensor,
    length: int,
    cuts: list[int],
    h: Tensor,
    c: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One row (T, I) of one direction: y (T, P), and the last states (1, P), (1, H)."""
    bounds = sorted({0, length, *cuts})
    segments = list(itertools.pairwise(bounds))
    ys: dict[int, Tensor] = {}
    for begin, end in reversed(segments) if reverse else segments:
        cut = (end in cuts) if reverse else (begin in cuts)
        if cut:
            h, c = torch.zeros_like(h), torch.zeros_like(c)
        steps = x[begin:end]
        y, h, c = one(steps.flip(0) if reverse else steps, h, c)
        ys[begin] = y.flip(0) if reverse else y
    padding = x.new_zeros(x.shape[0] - length, one.proj_size or one.hidden_size)
    return torch.cat([*(ys[begin] for begin, _ in segments), padding]), h, c


class _OneDirection:
    """One layer and direction of a torch.nn module as a one-directional, unbatched call."""

    def __init__(self, module: nn.Module, params: dict[str, Tensor]) -> None:
        self.module, self.params = module, params
        self.hidden_size, self.proj_size = module.hidden_size, module.proj_size

    def __call__(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hx = (h, c) if self.module.mode == "LSTM" else h
        # functional_call keeps the graph to the big module's own parameters.
        y, state = torch.func.functional_call(self.module, self.params, (x, hx))
        return (y, *state) if self.module.mode == "LSTM" else (y, state, c)


def _direction(net: nn.Module, layer: int, direction: int) -> _OneDirection:
    suffix = f"_l{layer}{'_reverse' if direction else ''}"
    names = [n for n, _ in net.named_parameters() if n.endswith(suffix)]
    params = {n.removesuffix(suffix) + "_l0": getattr(net, n) for n in names}
    options: dict[str, Any] = {"bias": net.bias, "dtype": net.weight_ih_l0.dtype}
    if net.mode == "LSTM":
        options["proj_size"] = net.proj_size
    if net.mode.startswith("RNN"):
        options["nonlinearity"] = net.nonlinearity
    one = type(net)(params["weight_ih_l0"].shape[1], net.hidden_size, **options)
    return _OneDirection(one, params)


def fused(mode: str, sizes: tuple[int, ...], **options: Any) -> nn.Module:
    """A module of input_size and hidden_size ``sizes``."""
    if mode.startswith("RNN"):
        options["nonlinearity"] = mode[4:].lower()
    return getattr(fusedrnn, mode.split("_")[0])(*sizes, **options)


def trained(net: nn.Module, x: Tensor, **extras: Tensor) -> list[Tensor]:
    """Outputs and gradients, of x where it wants one and of all parameters."""
    outputs = tensors(net(x, **extras))
    torch.manual_seed(1)
    dys = [torch.randn(t.shape).to(t.dtype) for t in outputs]
    leaves = [*net.parameters(), *([x] if x.requires_grad else [])]
    return [*outputs, *torch.autograd.grad(outputs, leaves, dys)]


def outcome(call: Callable[[], Any]) -> tuple[type, str] | None:
    """What the call raises, or None."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None
