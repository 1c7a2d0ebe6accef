"""Autocasting as torch.nn does it, done before the autograd Functions see a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["autocast_disabled", "autocast_dtype", "autocast_enabled", "cast"]


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for x's device, one with kernels of ours; meta, for one, has none."""
    if not torch._C._is_any_autocast_enabled():
        return False
    # torch.amp.is_autocast_available would tell, but torch 2.11's Dynamo cannot trace it.
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def autocast_disabled(x: Tensor) -> AbstractContextManager[object]:
    """A context in which torch operations on x compute in the dtype of their inputs."""
    if not autocast_enabled(x):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def autocast_dtype(composed: bool, x: Tensor, state: Tensor | None) -> torch.dtype | None:
    """The dtype that x, states and parameters are cast to; None where autocast is off.

    torch.nn computes LSTM, RNN and RNNCell in autocast's dtype. ``composed`` names the rest: on the
    CPU torch.nn composes GRU, GRUCell, LSTMCell and a packed LSTM of several operations, and their
    results take the running state's dtype where that is the wider one. ``state`` is that state (c
    for LSTM and LSTMCell), which is zeros of x's dtype if absent.
    """
    if not autocast_enabled(x) or x.dtype == torch.float64:
        return None
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type)
    if composed and device_type == "cpu":
        return torch.promote_types(dtype, x.dtype if state is None else state.dtype)
    return dtype


def cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Differentiable casts; float64 stays, as under torch's autocast."""
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]
