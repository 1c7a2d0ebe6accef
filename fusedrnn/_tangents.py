"""Tangents of one layer, and its second derivatives, which are tangents of its gradients.

:class:`TangentsFunction` runs the operator ``layer_tangents``: the derivative of a layer's outputs
along a direction, and that of its gradients, a Hessian-vector product. Hessians are symmetric, so
the same numbers are what double backward asks for: there the incoming gradients are the direction
(Pearlmutter 1994). Its own derivative is taken of the same tangents of ``fusedrnn.reference``, to
any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import Function

from fusedrnn import _ops, reference
from fusedrnn._autocast import autocast_disabled

__all__ = [
    "Mask",
    "batched_by_autograd",
    "has_tangents",
    "layer_tangents",
    "pull_back",
    "reference_gradients",
]

_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_level_of = torch._C._functorch.maybe_get_level
_unwrapped = torch._C._functorch.get_unwrapped

# Arguments before the tensors that are differentiated.
_FIRST = 10


class Mask(tuple):
    """Which results are wanted. No plain tuple or list: functorch takes those to pieces, and misses
    their pieces' tangents then.
    """


def has_tangents(
    x: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    params: Sequence[Tensor],
    along_params: bool = False,
) -> bool:
    """Whether the operator is the quick way.

    It is not on a device without it, nor under several levels of forward mode, nor under ``vmap``
    where its slices are no rows of one call (``_batching``). ``along_params``: whether gradients or
    tangents of params take part.
    """
    if x.device.type != "cpu":
        return False
    levels = get_interpreter_stack() or ()
    keys = [level.key() for level in levels]
    if keys.count(TransformType.Jvp) > 1:
        return False
    if TransformType.Vmap not in keys:
        return True
    moving = [v.level() for v in levels if v.key() in (TransformType.Vmap, TransformType.Jvp)]
    return (
        lengths is None
        and batch_sizes is None
        and not along_params
        and not any(_wrapped_at(moving, param) for param in params)
    )


def _wrapped_at(levels: Sequence[int], tensor: Tensor) -> bool:
    """Whether the tensor belongs to one of these levels of ``torch.func``, under others or not."""
    while _is_wrapped(tensor):
        if _level_of(tensor) in levels:
            return True
        tensor = _unwrapped(tensor)
    return False


def layer_tangents(
    options: tuple[str, bool, bool],
    mask: Sequence[bool],
    saved: Sequence[Any],
    values: Sequence[Any],
    tangents: Sequence[Tensor | None],
    of_gradients: Sequence[Tensor | None] = (None, None, None),
) -> tuple[Tensor, ...]:
    """Tangents of y, h_n, c_n, then of dx, dh0, dc0 and dparams where ``mask`` wants them.

    Args:
        options: mode, has_biases, bidirectional.
        saved: lengths, batch_sizes, reset, and forward's y, gates and cells.
        values: dy, dh_n, dc_n, x, h0, c0, then the params.
        tangents: of x, h0, c0 and the params; None stands for zeros.
        of_gradients: of dy, dh_n, dc_n.
    """
    if batched_by_autograd(*tangents, *of_gradients):
        return _composed(options, saved[:3], list(values), list(tangents), list(of_gradients))
    return TangentsFunction.apply(*options, Mask(mask), *saved, *values, *tangents, *of_gradients)


def batched_by_autograd(*tensors: Tensor | None) -> bool:
    """Whether torch.autograd's own vmap is at work, as with ``is_grads_batched=True``.

    It knows no batching rule of an operator with lists of tensors.
    """
    return any(tensor is not None and _is_legacy_batched(tensor) for tensor in tensors)


class TangentsFunction(Function):
    """What ``layer_tangents`` returns, in one tuple: y, h_n, c_n, dx, dh0, dc0, *dparams.

    The arguments are those of the operator: options and schedule, what forward has saved, then the
    ``values`` dy, dh_n, dc_n, x, h0, c0, *params, the tangents of the last 3 + P of them, and those
    of dy, dh_n, dc_n.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        mode: str,
        has_biases: bool,
        bidirectional: bool,
        mask: Mask,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        lengths, batch_sizes, reset, y, gates, cells = tensors[:6]
        (dy, dh_n, dc_n, x, h0, c0, *params), tangents, of_gradients = _parts(tensors[6:])
        dtype = x.dtype
        kept = mode not in ("LSTM", "GRU") or gates.dim() > 1  # not with recompute=True
        if dtype in (torch.bfloat16, torch.float16):
            # Second derivatives of what was rounded at every step would be of little use.
            dy, dh_n, dc_n, x, h0, c0, *params = _widen([dy, dh_n, dc_n, x, h0, c0, *params])
            tangents, of_gradients = _widen(tangents), _widen(of_gradients)
            kept = False
        if not kept:
            y, _, _, gates, cells = _ops.layer_forward(
                mode, x, lengths, batch_sizes, reset, h0, c0, params, has_biases, bidirectional,
                True,
            )  # fmt: skip
        *first, dparams = _ops.layer_tangents(
            mode, dy, dh_n, dc_n, x, lengths, batch_sizes, reset, h0, c0, params, y, gates, cells,
            tangents, of_gradients, has_biases, bidirectional, list(mask),
        )  # fmt: skip
        return tuple(t.to(dtype) for t in (*first, *dparams))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[:3]
        ctx.save_for_backward(*inputs[4:7], *inputs[_FIRST:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        schedule, tensors = ctx.saved_tensors[:3], ctx.saved_tensors[3:]

        def composed(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            return _composed(ctx.options, schedule, *_parts(tensors))

        needed = ctx.needs_input_grad[_FIRST:]
        return (None,) * _FIRST + pull_back(composed, tensors, needed, cotangents)


def reference_gradients(
    options: tuple[str, bool, bool],
    schedule: Sequence[Tensor | None],
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    *inputs: Any,
) -> tuple[Tensor, ...]:
    """dx, dh0, dc0, *dparams by the reference; ``schedule``: lengths, batch_sizes, reset."""
    mode, has_biases, bidirectional = options
    h0, c0, *params = inputs
    with autocast_disabled(x):
        *states, dparams = reference.layer_backward(
            mode, dy, dh_n, dc_n, x, *schedule, h0, c0, params, has_biases, bidirectional
        )
    return (*states, *dparams)


def pull_back(
    function: Callable[..., tuple[Tensor, ...]],
    values: Sequence[Tensor | None],
    needed: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``function(*values)``, None where not needed; None stands for zeros."""
    wanted = [want and value is not None for want, value in zip(needed, values, strict=True)]
    asked = [cotangent is not None for cotangent in cotangents]
    if not any(asked) or not any(wanted):
        return (None,) * len(values)

    def part(*primals: Tensor) -> tuple[Tensor, ...]:
        given = iter(primals)
        found = function(
            *(next(given) if want else v for want, v in zip(wanted, values, strict=True))
        )
        return tuple(out for out, ask in zip(found, asked, strict=True) if ask)

    _, vjp = torch.func.vjp(part, *(v for v, want in zip(values, wanted, strict=True) if want))
    gradients = iter(vjp(tuple(g for g in cotangents if g is not None)))
    return tuple(next(gradients) if want else None for want in wanted)


def _parts(tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The values (6 + P), the tangents of the inputs (3 + P) and of the gradients (3)."""
    count = (len(tensors) - 12) // 2
    values, tangents = 6 + count, 9 + 2 * count
    return list(tensors[:values]), list(tensors[values:tangents]), list(tensors[tangents:])


def _composed(
    options: tuple[str, bool, bool],
    schedule: Sequence[Tensor | None],
    values: list[Any],
    tangents: list[Any],
    of_gradients: list[Any],
) -> tuple[Tensor, ...]:
    """The same results as tangents of the reference, whole."""

    mode, has_biases, bidirectional = options

    def forward(x: Tensor, h0: Any, c0: Any, *params: Tensor) -> tuple[Tensor, ...]:
        return reference.layer_forward(
            mode, x, *schedule, h0, c0, params, has_biases, bidirectional
        )

    def backward(*values: Any) -> tuple[Tensor, ...]:
        return reference_gradients(options, schedule, *values)

    with autocast_disabled(values[3]):
        return (
            *_tangents_of(forward, values[3:], tangents),
            *_tangents_of(backward, values, [*of_gradients, *tangents]),
        )


def _tangents_of(
    function: Callable[..., tuple[Tensor, ...]], values: list[Any], tangents: list[Any]
) -> tuple[Tensor, ...]:
    """The derivative of ``function(*values)`` along the tangents; None stands for zeros."""
    moving = [t is not None for t in tangents]

    def part(*primals: Tensor) -> tuple[Tensor, ...]:
        given = iter(primals)
        return function(*(next(given) if m else v for m, v in zip(moving, values, strict=True)))

    primals = tuple(v for v, m in zip(values, moving, strict=True) if m)
    if not primals:
        return tuple(torch.zeros_like(out) for out in part())
    # What vjp gives is linear in the cotangents: its own pull-back pushes tangents forward. Unlike
    # torch.func.jvp it needs no forward-mode level, of which one may be open.
    outputs, vjp = torch.func.vjp(part, *primals)
    _, push = torch.func.vjp(vjp, tuple(torch.zeros_like(out) for out in outputs))
    return push(tuple(t for t in tangents if t is not None))[0]


def _widen(tensors: Sequence[Any]) -> list[Any]:
    return [None if t is None else t.float() for t in tensors]
