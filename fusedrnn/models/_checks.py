"""Errors that name the argument, before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrnn._checks import check_lengths


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


def check_positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_tokens(name: str, tokens: Tensor, size: int, rank: int = 2) -> None:
    """Integer indices of `rank` axes below `size`; the values are read on the CPU only."""
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32 indices, got {tokens.dtype}")
    if tokens.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got shape {tuple(tokens.shape)}")
    if tokens.numel() == 0:
        raise ValueError(f"{name}: expected at least one index, got shape {tuple(tokens.shape)}")
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(v) for v in tokens.aminmax())
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise ValueError(f"{name}: expected indices in 0..{size - 1}, got {wrong}")


def check_features(name: str, features: Tensor, size: int) -> None:
    """(B, T, size), not empty."""
    if features.dim() != 3 or features.shape[2] != size or features.numel() == 0:
        raise ValueError(
            f"{name}: expected a non-empty (B, T, {size}), got shape {tuple(features.shape)}"
        )


def valid_steps(lengths: Tensor, batch: int, steps: int, device: torch.device) -> Tensor:
    """Of lengths int64 (batch,) in 0..steps, which are checked: (batch, steps) bool on `device`,
    true within each row's length."""
    check_lengths(lengths, steps, batch, device)
    return torch.arange(steps, device=device) < lengths.to(device)[:, None]
