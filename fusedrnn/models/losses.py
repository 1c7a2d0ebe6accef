"""Losses over sequences of different length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn.models._checks import check_choice, check_tokens, valid_steps


def sequence_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    lengths: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy over the valid steps alone.

    Args:
        logits: (B, T, V). What lies beyond a row's length is never read and may hold NaN.
        targets: int64 (B, T); beyond a row's length anything.
        lengths: int64 (B,), valid steps of each row; None: all.
        label_smoothing: in [0, 1]: so much of the target's weight is spread over the vocabulary
            (Szegedy et al. 2016).
        reduction: ``"mean"`` over all valid steps of the batch, or ``"sum"``.

    Raises:
        TypeError, ValueError: for arguments that do not fit, and for a mean over no step.
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing!r}")
    if logits.dim() != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(
            f"logits: expected (B, T, V) with targets (B, T), got shapes {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if lengths is not None:
        valid = valid_steps(lengths, *targets.shape, targets.device)
        logits, targets = logits[valid], targets[valid]
    else:
        logits, targets = logits.flatten(0, 1), targets.flatten()
    if targets.numel() == 0:
        if reduction == "mean":
            raise ValueError("lengths: expected a valid step to take the mean over, got none")
        return logits.sum()
    check_tokens("targets", targets, logits.shape[-1], rank=1)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64 indices, got {targets.dtype}")
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction=reduction)
