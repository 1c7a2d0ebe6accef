"""Differentiation of one layer: autograd, ``torch.func``, forward mode, ``torch.compile``.

:func:`layer` picks the cheapest path that is right:

* ``_C.layer`` for eager calls (or, a module's checks and all, ``_C.plain_layer``): the bare
  operator, or a node of C++ (``csrc/autograd.cpp``) where an input requires grad;
* :class:`LayerFunction` for ``torch.func`` and ``torch.compile``, which trace no node of C++;
* the bare operator in ``torch.compile`` where nothing can ask for a derivative, and in
  ``torch.export``;
* :class:`DualLayerFunction` while a forward-mode level is open;
* ``fusedrnn.reference``, plain torch operations, for forward mode where ``has_tangents`` says no,
  and for ``torch.func`` inside ``torch.compile``: Dynamo traces no Function through a transform,
  and an operator in its place gives a silent zero.

The backward pass is an operator too, which the node in C++ calls itself for everyday gradients; any
others are :func:`layer_backward`'s. It is differentiable through :class:`BackwardFunction`, by
the operator of ``fusedrnn._tangents``, or by the reference's back-propagation, to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import Function, forward_ad

from fusedrnn import _ops, reference
from fusedrnn._autocast import autocast_disabled
from fusedrnn._ops import _C
from fusedrnn._tangents import (
    Mask,
    batched_by_autograd,
    has_tangents,
    layer_tangents,
    pull_back,
    reference_gradients,
)

__all__ = ["BackwardFunction", "LayerFunction", "layer", "layer_backward"]

_is_compiling = torch.compiler.is_compiling
_level_of = torch._C._functorch.maybe_get_level
_transforms_active = torch._C._are_functorch_transforms_active

# Positions in the Functions' arguments: mode, has_biases, bidirectional, recompute, x, lengths,
# batch_sizes, reset, h0, c0, *params.
_X, _H0, _C0, _PARAMS = 4, 8, 9, 10


def layer(
    mode: str,
    x: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    bidirectional: bool,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, all its directions, differentiable in x, h0, c0 and params.

    Arguments and results are those of :func:`fusedrnn.reference.layer_forward`. Shapes and dtypes
    are checked by the operator. ``recompute``: backward makes the gates anew, instead of their
    being kept.
    """
    compiling = _is_compiling()
    transformed = _traced_transforms() if compiling else _transforms_active()
    dual = forward_ad._current_level >= 0
    if not dual and not transformed and not compiling:
        return _C.layer(
            mode, x, lengths, batch_sizes, reset, h0, c0, params, has_biases, bidirectional,
            recompute,
        )  # fmt: skip
    if x.dim() != (3 if batch_sizes is None else 2):  # as _C.layer does
        expected = "(T, B, input_size)" if batch_sizes is None else "(N, input_size)"
        raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
    if (transformed and compiling) or (
        dual and (compiling or not has_tangents(x, lengths, batch_sizes, params))
    ):
        with autocast_disabled(x):
            return reference.layer_forward(
                mode, x, lengths, batch_sizes, reset, h0, c0, params, has_biases, bidirectional
            )
    if compiling:
        x, h0, c0, *params = _distinct([x, h0, c0, *params])
        # torch.export keeps no Function: it would record the forward alone, detached under
        # strict=True. An exported bare operator is for inference, and raises when a derivative is
        # asked of it. The flag itself: torch 2.11's Dynamo takes is_exporting() to be True always.
        if not _needs_grad(x, h0, c0, params) or torch.compiler._is_exporting_flag:
            return _ops.layer_forward(
                mode, x, lengths, batch_sizes, reset, h0, c0, params, has_biases, bidirectional,
                False,
            )[:3]  # fmt: skip
    function = DualLayerFunction if dual else LayerFunction
    return function.apply(
        mode, has_biases, bidirectional, recompute, x, lengths, batch_sizes, reset, h0, c0, *params
    )[:3]


class LayerFunction(Function):
    """One layer; the arguments are those of :func:`layer`, reordered.

    ``setup_context`` sees only inputs and outputs, so what the backward needs is returned as well.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        mode: str,
        has_biases: bool,
        bidirectional: bool,
        recompute: bool,
        x: Tensor,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        reset: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return _ops.layer_forward(
            mode, x, lengths, batch_sizes, reset, h0, c0, params, has_biases, bidirectional, True,
            recompute,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        mode, has_biases, bidirectional, _, *tensors = inputs
        x, lengths, batch_sizes, reset, h0, c0, *params = tensors
        y, _, c_n, gates, cells = output
        ctx.save_for_backward(x, lengths, batch_sizes, reset, h0, c0, y, gates, cells, *params)
        ctx.options = (mode, has_biases, bidirectional)
        ctx.differentiated = _differentiated(inputs)
        ctx.set_materialize_grads(False)
        if mode == "LSTM":
            ctx.mark_non_differentiable(gates, cells)
        else:
            ctx.mark_non_differentiable(c_n, gates, cells)

    @staticmethod
    def backward(
        ctx: Any,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        _dgates: Tensor | None,
        _dcells: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        needed = [n and d for n, d in zip(ctx.needs_input_grad, ctx.differentiated, strict=True)]
        mode = ctx.options[0]
        if mode != "LSTM":
            dc_n = None  # a compiled graph hands in zeros
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * len(needed)
        wanted = [needed[_X], needed[_H0], needed[_C0], *needed[_PARAMS:]]
        dx, dh0, dc0, *dparams = layer_backward(
            *ctx.options, wanted, (dy, dh_n, dc_n), ctx.saved_tensors, _is_compiling()
        )
        return None, None, None, None, dx, None, None, None, dh0, dc0, *dparams


class DualLayerFunction(LayerFunction):
    """The same with forward-mode tangents; apart, as Dynamo refuses a Function that has them."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        LayerFunction.setup_context(ctx, inputs, output)
        x, lengths, batch_sizes, reset, h0, c0, *params = inputs[_X:]
        y, _, _, gates, cells = output
        ctx.save_for_forward(lengths, batch_sizes, reset, y, gates, cells, x, h0, c0, *params)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        saved, inputs = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        along = [tangents[_X], tangents[_H0], tangents[_C0], *tangents[_PARAMS:]]
        y, h_n, c_n, *_ = layer_tangents(
            ctx.options, [False] * len(along), saved, (None, None, None, *inputs), along
        )
        return y, h_n, c_n if ctx.options[0] == "LSTM" else None, None, None


def layer_backward(
    mode: str,
    has_biases: bool,
    bidirectional: bool,
    wanted: list[bool],
    cotangents: Sequence[Tensor | None],
    saved: Sequence[Any],
    compiling: bool = False,
) -> list[Tensor | None]:
    """The gradients of x, h0, c0 and params, None where not wanted.

    Args:
        cotangents: dy, dh_n, dc_n.
        saved: x, lengths, batch_sizes, reset, h0, c0, y, gates, cells, then the params.
        compiling: whether this call is being traced; another thread's trace does not count.
    """
    dy, dh_n, dc_n = cotangents
    x, lengths, batch_sizes, reset, h0, c0, y, gates, cells, *params = saved
    batched = not compiling and batched_by_autograd(dy, dh_n, dc_n)
    dual = forward_ad._current_level >= 0
    if batched or (dual and not has_tangents(x, lengths, batch_sizes, params)):
        gradients = reference_gradients(
            (mode, has_biases, bidirectional), (lengths, batch_sizes, reset), dy, dh_n, dc_n,
            x, h0, c0, *params,
        )  # fmt: skip
    elif not compiling and (dual or torch.is_grad_enabled() or _transforms_active()):
        function = DualBackwardFunction if dual else BackwardFunction
        gradients = function.apply(
            mode, has_biases, bidirectional, Mask(wanted), lengths, batch_sizes, reset, y, gates,
            cells, dy, dh_n, dc_n, x, h0, c0, *params,
        )  # fmt: skip
    else:
        *states, dparams = _ops.layer_backward(
            mode, dy, dh_n, dc_n, x, lengths, batch_sizes, reset, h0, c0, params,
            y, gates, cells, has_biases, bidirectional, wanted,
        )  # fmt: skip
        gradients = [*states, *dparams]
    return [g if want else None for g, want in zip(gradients, wanted, strict=True)]


class BackwardFunction(Function):
    """The backward pass, differentiable in dy, dh_n, dc_n, x, h0, c0 and params.

    y, gates and cells count as constants: the derivative is the total one, in x and the others.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        mode: str,
        has_biases: bool,
        bidirectional: bool,
        mask: Mask,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        reset: Tensor | None,
        y: Tensor,
        gates: Tensor,
        cells: Tensor,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor, ...]:
        dx, dh0, dc0, dparams = _ops.layer_backward(
            mode, dy, dh_n, dc_n, x, lengths, batch_sizes, reset, h0, c0, params,
            y, gates, cells, has_biases, bidirectional, list(mask),
        )  # fmt: skip
        return dx, dh0, dc0, *dparams

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        mode, has_biases, bidirectional, mask, *_ = inputs
        ctx.save_for_backward(*inputs[4:])
        ctx.options = (mode, has_biases, bidirectional)
        ctx.mask = mask
        ctx.differentiated = _differentiated(inputs[10:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, values = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        needed = [
            n and d for n, d in zip(ctx.needs_input_grad[10:], ctx.differentiated, strict=True)
        ]
        wanted = [n and v is not None for n, v in zip(needed, values, strict=True)]
        along = [g if m else None for g, m in zip(cotangents, ctx.mask, strict=True)]
        if not any(wanted) or all(g is None for g in along):
            return (None,) * (10 + len(values))
        composed = forward_ad._current_level >= 0 or batched_by_autograd(*along)
        of_params = any(wanted[6:]) or any(g is not None for g in along[3:])
        if not composed and has_tangents(values[3], *saved[:2], values[6:], of_params):
            # Hessians are symmetric: along the incoming gradients, these are the gradients.
            found = layer_tangents(ctx.options, wanted[3:], saved, values, along)
            return (None,) * 10 + tuple(
                t if want else None for t, want in zip(found, wanted, strict=True)
            )

        def first_order(*values: Any) -> tuple[Tensor, ...]:
            return reference_gradients(ctx.options, saved[:3], *values)

        return (None,) * 10 + pull_back(first_order, values, needed, along)


class DualBackwardFunction(BackwardFunction):
    """The same with forward-mode tangents: forward over reverse."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        BackwardFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[4:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        saved, values = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        found = layer_tangents(ctx.options, ctx.mask, saved, values, tangents[13:], tangents[10:13])
        return tuple(t if m else t.new_zeros(0) for t, m in zip(found[3:], ctx.mask, strict=True))


def _needs_grad(x: Tensor, h0: Tensor | None, c0: Tensor | None, params: Sequence[Tensor]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for param in params:
        if param.requires_grad:
            return True
    return (
        x.requires_grad
        or (h0 is not None and h0.requires_grad)
        or (c0 is not None and c0.requires_grad)
    )


def _differentiated(inputs: Sequence[Any]) -> list[bool]:
    """Which of a Function's inputs the ``torch.func`` transform at work differentiates.

    needs_input_grad counts what requires grad outside of it, too: a module's parameters, mostly.
    """
    level = None if _is_compiling() else torch._C._functorch.peek_interpreter_stack()
    if level is None or level.key() != TransformType.Grad:
        return [True] * len(inputs)
    here = level.level()
    return [isinstance(t, Tensor) and _level_of(t) == here for t in inputs]


def _traced_transforms() -> bool:
    """Whether a torch.func transform is active, asked so that Dynamo can answer in a trace."""
    return isinstance(
        torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter
    )


def _distinct(tensors: Sequence[Any]) -> list[Any]:
    """Dynamo refuses a Function that is given one tensor twice: views for the second time."""
    seen: list[Any] = []
    for tensor in tensors:
        if tensor is not None and any(tensor is other for other in seen):
            tensor = tensor.view_as(tensor)
        seen.append(tensor)
    return seen
