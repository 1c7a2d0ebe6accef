"""The operators under ``torch.vmap``: the vmapped axis joins the batch's, or is gone through.

Where all slices have the same weights, and none asks for a gradient of them, N slices of B rows are
one call with N * B rows. Else, and where the rows' lengths decide how the saved tensors lie, every
slice is a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["register_rules"]

# Values of a call's gates and inputs: as many slices join it as fit, so that memory stays bounded
# and what is written is still in a cache when it is read.
_MOST_VALUES = 1 << 21

# Where the batch is: the second axis, as in x (T, B, I) and h0 (D, B, P); the first, as in lengths;
# within the first, as in saved gates (T * B, ...). Arguments without one are the same for all.
_SECOND, _FIRST, _WITHIN = "second", "first", "within"
_KINDS = {"lengths": _FIRST, "gates": _WITHIN, "cells": _WITHIN} | dict.fromkeys(
    ("x", "reset", "h0", "c0", "dy", "dh_n", "dc_n", "y", "tangents", "gradient_tangents"), _SECOND
)
# Of tangents, those of x, h0 and c0; the others are the weights'.
_BATCHED_TANGENTS = 3


def register_rules(layer_forward: Any, layer_backward: Any, layer_tangents: Any) -> None:
    """Registers the operators' batching rules."""

    def forward_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        call = _Call(layer_forward, info.batch_size, in_dims, args)
        # Where segments of time end depends on the number of rows, which is another here.
        call.args["recompute"] = False
        if call.joins(whatever_lengths=not call.args["save"]):
            outputs, axes, _ = call.joined((_SECOND, _SECOND, _SECOND, _WITHIN, _WITHIN))
            return tuple(outputs), tuple(axes)
        outputs = call.one_by_one()
        return tuple(torch.stack(output) for output in outputs), (0,) * len(outputs)

    torch.library.register_vmap("fusedrnn::layer_forward", forward_rule)
    torch.library.register_vmap("fusedrnn::layer_backward", _with_gradients(layer_backward, 3))
    torch.library.register_vmap("fusedrnn::layer_tangents", _with_gradients(layer_tangents, 6))


def _with_gradients(op: Any, count: int) -> Callable[..., Any]:
    """The rule of an operator with ``count`` results before the list of the weights' gradients."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        call = _Call(op, info.batch_size, in_dims, args)
        if not any(call.args["output_mask"][3:]) and call.joins():
            outputs, axes, (dparams,) = call.joined((_SECOND,) * count)
            stacked = [p.new_empty(info.batch_size, 0) for p in dparams]
        else:
            *tensors, dparams = call.one_by_one()
            outputs, axes = [torch.stack(t) for t in tensors], [0] * count
            stacked = [torch.stack(p) for p in zip(*dparams, strict=True)]
        return (*outputs, stacked), (*axes, [0] * len(stacked))

    return rule


class _Call:
    """A call of an operator with a vmapped axis of ``size`` slices."""

    def __init__(self, op: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> None:
        if size == 0:
            raise RuntimeError(f"{op}: vmap over an axis of size 0 is not supported")
        # The last ones may be absent, as defaults are.
        names = [argument.name for argument in op._schema.arguments][: len(args)]
        self.op, self.size = op, size
        self.args = dict(zip(names, args, strict=True))
        self.dims = {n: _dims(a, d) for n, a, d in zip(names, args, in_dims, strict=True)}

    def one_by_one(self) -> list[Any]:
        """The results of a call for every slice, output by output."""
        calls = (
            self.op(*(_each(a, self.dims.get(n), _select, i) for n, a in self.args.items()))
            for i in range(self.size)
        )
        return list(zip(*calls, strict=True))

    def joins(self, whatever_lengths: bool = False) -> bool:
        """Whether the slices may be rows of one call."""
        x_has_steps = self.args["x"].dim() - (self.dims["x"] is not None) == 3
        of_weights = [*self.dims["params"], *self.dims.get("tangents", ())[_BATCHED_TANGENTS:]]
        return (
            x_has_steps
            and self._cells_are_of_all_steps()
            and self.args["batch_sizes"] is None
            and (whatever_lengths or self.args["lengths"] is None)
            and all(dim is None for dim in of_weights)
        )

    def _cells_are_of_all_steps(self) -> bool:
        gates = self.args.get("gates")
        return (
            gates is None
            or self.args["mode"] != "LSTM"
            or gates.dim() == 3 + (self.dims["gates"] is not None)
        )

    def joined(self, kinds: Sequence[str]) -> tuple[list[Tensor], list[int], tuple[Any, ...]]:
        """The first results, of ``kinds``, each with an axis of slices; these axes; the others."""
        parts = []
        for begin, end in self._ranges():
            found = self.op(*(self._joined_argument(n, begin, end) for n in self.args))
            parts.append(
                [self._split(t, k, end - begin) for t, k in zip(found, kinds, strict=False)]
            )
        axes = [axis for _, axis in parts[0]]
        outputs = [t for t, _ in parts[0]]
        if len(parts) > 1:
            outputs = [
                torch.cat([part[i][0] for part in parts], axis) for i, axis in enumerate(axes)
            ]
        return outputs, axes, tuple(found[len(kinds) :])

    def _joined_argument(self, name: str, begin: int, end: int) -> Any:
        value, dims = self.args[name], self.dims.get(name)
        if name not in _KINDS:
            return value
        if name == "tangents":
            n = _BATCHED_TANGENTS
            return [*_each(value[:n], dims[:n], self._join, _SECOND, begin, end), *value[n:]]
        return _each(value, dims, self._join, _KINDS[name], begin, end)

    def _join(self, tensor: Tensor, dim: int | None, kind: str, begin: int, end: int) -> Tensor:
        """Slices ``begin`` to ``end`` as rows of one batch."""
        if dim is None:
            slices = tensor.unsqueeze(0).expand(end - begin, *tensor.shape)
        else:
            slices = tensor.movedim(dim, 0)[begin:end]
        if slices.shape[1:] == (0,):  # was not kept
            return slices[0]
        if kind == _FIRST:
            return slices.flatten(0, 1)
        if kind == _SECOND:
            return slices.transpose(0, 1).flatten(1, 2)
        return slices.unflatten(1, self._steps_and_rows()).transpose(0, 1).flatten(0, 2)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        steps, rows = self._steps_and_rows()
        w_ih = self.args["params"][0]
        at_once = max(1, _MOST_VALUES // max(1, steps * rows * (w_ih.shape[0] + w_ih.shape[1])))
        for begin in range(0, self.size, at_once):
            yield begin, min(begin + at_once, self.size)

    def _steps_and_rows(self) -> list[int]:
        x, dim = self.args["x"], self.dims["x"]
        return [size for axis, size in enumerate(x.shape) if axis != dim][:2]

    def _split(self, result: Tensor, kind: str, count: int) -> tuple[Tensor, int]:
        """A result of ``count`` slices with an axis of them, and this axis."""
        if result.shape == (0,):  # not asked for
            return result.new_empty(count, 0), 0
        steps, rows = self._steps_and_rows()
        if kind == _SECOND:
            return result.unflatten(1, (count, rows)), 1
        return result.unflatten(0, (steps, count, rows)).movedim(1, 0).flatten(1, 2), 0


def _dims(value: Any, dim: Any) -> Any:
    """A list's dims as a list."""
    return [None] * len(value) if isinstance(value, (list, tuple)) and dim is None else dim


def _each(value: Any, dim: Any, function: Callable[..., Any], *args: Any) -> Any:
    """``function`` of a tensor and its dim, of each tensor of a list; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [_each(v, d, function, *args) for v, d in zip(value, dim, strict=True)]
    return function(value, dim, *args) if isinstance(value, Tensor) else value


def _select(tensor: Tensor, dim: int | None, index: int) -> Tensor:
    return tensor if dim is None else tensor.select(dim, index)
