"""Stateless forms of the layers: input, initial state, a flat list of parameters, options.

The modules are thin shells around :func:`recurrent`. Sizes: T steps, B rows, I input features,
H hidden units, P = projection size or H, L layers, D directions, N rows of packed data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn._autocast import autocast_dtype, autocast_enabled, cast
from fusedrnn._checks import (
    check_dropout,
    check_input,
    check_lengths,
    check_params,
    check_reset,
    check_state,
    rnn_mode,
)
from fusedrnn._layer import layer
from fusedrnn._ops import _C
from fusedrnn.reference import GATES

__all__ = ["gru", "lstm", "rnn"]

is_compiling = torch.compiler.is_compiling


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
    """Long short-term memory: Hochreiter & Schmidhuber 1997, Gers et al. 2000, Sak et al. 2014.

    Args:
        input: (T, B, I), (B, T, I) if ``batch_first``, (T, I) for one row, or a PackedSequence.
        hx: h_0 (L*D, B, P) and c_0 (L*D, B, H), without B for one row; None for zeros.
        params: for each layer and direction w_ih (4H, I or D*P), w_hh (4H, P), then b_ih, b_hh
            (4H,) if ``has_biases``, then w_hr (P, H) if projected: torch.nn.LSTM's own order. The
            4H rows are blocks of H for the gates i, f, g, o.
        dropout: probability between layers, applied while ``training``.
        lengths: int64 (B,), valid steps of each row, 0 allowed, in any order. Padding is never
            read, its output and gradient are zero; h_n and c_n are those after each row's last
            valid step.
        reset: bool (T, B), (B, T) if ``batch_first``, (T,) for one row: where true a new segment
            starts, so the state entering that step is zero in every layer, and the reverse
            direction is cut at the same place.
        recompute: keep no gates for the backward pass, which then makes them anew: memory for x,
            output and, for LSTM, c of every ``max(1, 256 // B)``-th step, for up to a third more
            time. CPU only.

    Returns:
        output, shaped as input with D*P features, and (h_n, c_n), shaped as hx; in input's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: an argument that does not fit, by name.
    """
    check_params("LSTM", params, has_biases, num_layers, bidirectional)
    check_dropout(dropout)
    return recurrent(
        "LSTM", input, hx, params, has_biases, num_layers, dropout if training else 0.0,
        bidirectional, batch_first, lengths, reset, recompute,
    )  # fmt: skip


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Gated recurrent unit: Cho et al. 2014, the reset gate after the product as in torch.nn.

    Arguments, results and errors as for :func:`lstm`, with hx a single tensor (L*D, B, H), weights
    of 3H rows, blocks of H for r, z, n, and no projection.
    """
    check_params("GRU", params, has_biases, num_layers, bidirectional)
    check_dropout(dropout)
    return recurrent(
        "GRU", input, hx, params, has_biases, num_layers, dropout if training else 0.0,
        bidirectional, batch_first, lengths, reset, recompute,
    )  # fmt: skip


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Simple recurrent network, Elman 1990, with ``nonlinearity`` ``"tanh"`` or ``"relu"``.

    Arguments, results and errors as for :func:`lstm`, with hx a single tensor (L*D, B, H), weights
    of H rows, and no projection.
    """
    mode = rnn_mode(nonlinearity)
    check_params(mode, params, has_biases, num_layers, bidirectional)
    check_dropout(dropout)
    return recurrent(
        mode, input, hx, params, has_biases, num_layers, dropout if training else 0.0,
        bidirectional, batch_first, lengths, reset, recompute,
    )  # fmt: skip


def recurrent(
    mode: str,
    input: Tensor | PackedSequence,
    hx: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
    recompute: bool,
    try_plain: bool = True,
) -> tuple[Any, Any]:
    """All of a module's forward but its parameters' names: checks, layout, autocast, the layers.

    The arguments are those of :func:`lstm`; ``params`` is trusted to fit together, and ``dropout``
    is applied whenever it is not zero. ``try_plain`` is false where ``_C.plain_layer`` has already
    left the call to Python.
    """
    if try_plain and num_layers == 1 and lengths is None and reset is None and not is_compiling():
        found = _C.plain_layer(
            mode, input, hx, list(params), has_biases, bidirectional, batch_first, recompute
        )
        if found is not None:
            return found
    if isinstance(input, PackedSequence):
        return _recurrent_packed(
            mode, input, hx, params, has_biases, num_layers, dropout, bidirectional, lengths, reset,
            recompute,
        )  # fmt: skip
    rank = input.dim()
    if rank != 3 and rank != 2:
        noun = "D tensor" if mode.startswith("RNN") else "D"
        raise ValueError(f"{_NAMES[mode]}: Expected input to be 2D or 3D, got {rank}{noun} instead")
    h0, c0 = (None, None) if hx is None else _states(mode, hx, rank)
    if rank == 2:
        if lengths is not None:
            raise ValueError("lengths is not supported with unbatched 2-D input")
        x = input.unsqueeze(1)
        h0 = None if h0 is None else h0.unsqueeze(1)
        c0 = None if c0 is None else c0.unsqueeze(1)
    else:
        x = input.transpose(0, 1) if batch_first else input
    cell_dtype = _cell_dtype(mode, x, c0, params)
    x, h0, c0, params = _prepare(
        mode, x, h0, c0, params, num_layers, bidirectional, x.shape[1], packed=False
    )
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None:
        check_lengths(lengths, x.shape[0], x.shape[1], x.device)
    if reset is not None:
        check_reset(reset, x, tuple(input.shape[:-1]))
        if rank == 2:
            reset = reset.unsqueeze(1)
        elif batch_first:
            reset = reset.transpose(0, 1)
    y, h_n, c_n = _run_layers(
        mode, x, lengths, None, reset, h0, c0, params, has_biases, num_layers, dropout,
        bidirectional, recompute,
    )  # fmt: skip
    if cell_dtype is not None:
        c_n = c_n.to(cell_dtype)
    if rank == 2:
        y, h_n = y.squeeze(1), h_n.squeeze(1)
        if mode == "LSTM":
            c_n = c_n.squeeze(1)
    elif batch_first:
        y = y.transpose(0, 1)
    return y, (h_n, c_n) if mode == "LSTM" else h_n


def _recurrent_packed(
    mode: str,
    input: PackedSequence,
    hx: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
    recompute: bool,
) -> tuple[PackedSequence, Any]:
    """A PackedSequence's layers. Its rows are sorted by length; hx and h_n are not."""
    for name, value in (("lengths", lengths), ("reset", reset)):
        if value is not None:
            raise ValueError(f"{name} is not supported with a PackedSequence")
    data, batch_sizes, sorted_indices, unsorted_indices = input
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    h0, c0 = (None, None) if hx is None else _states(mode, hx, 3)
    batch = 0
    if h0 is not None:
        # Read where there is a state to check; while tracing the operator does, when it runs.
        batch = h0.shape[1] if is_compiling() else int(batch_sizes[0])
    cell_dtype = _cell_dtype(mode, data, c0, params)
    x, h0, c0, params = _prepare(
        mode, data, h0, c0, params, num_layers, bidirectional, batch, packed=True
    )
    if sorted_indices is not None:
        h0 = None if h0 is None else h0.index_select(1, sorted_indices)
        c0 = None if c0 is None else c0.index_select(1, sorted_indices)
    y, h_n, c_n = _run_layers(
        mode, x, None, batch_sizes, None, h0, c0, params, has_biases, num_layers, dropout,
        bidirectional, recompute,
    )  # fmt: skip
    if cell_dtype is not None:
        c_n = c_n.to(cell_dtype)
    if unsorted_indices is not None:
        h_n = h_n.index_select(1, unsorted_indices)
        if mode == "LSTM":
            c_n = c_n.index_select(1, unsorted_indices)
    output = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
    return output, (h_n, c_n) if mode == "LSTM" else h_n


def _cell_dtype(
    mode: str, x: Tensor, c0: Tensor | None, params: Sequence[Tensor]
) -> torch.dtype | None:
    """c_n's dtype where it is not output's: under autocast torch.nn composes a projected LSTM."""
    if mode != "LSTM" or not autocast_enabled(x) or not _is_projected(mode, params):
        return None
    return autocast_dtype(True, x, c0)


def _is_projected(mode: str, params: Sequence[Tensor]) -> bool:
    return params[1].shape[0] != GATES[mode] * params[1].shape[1]


def _states(mode: str, hx: Any, rank: int) -> tuple[Tensor, Tensor | None]:
    """hx as h_0 and c_0, of the rank that input's rank calls for."""
    batched = "batched 3-D" if rank == 3 else "unbatched 2-D"
    if mode != "LSTM":
        if hx.dim() != rank:
            raise RuntimeError(
                f"For {batched} input, hx should also be {rank}-D but got {hx.dim()}-D tensor"
            )
        return hx, None
    if isinstance(hx, Tensor):
        raise TypeError("LSTM: Expected hx to be a tuple (h_0, c_0) of tensors, got a tensor")
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    h0, c0 = hx
    if h0.dim() != rank or c0.dim() != rank:
        raise RuntimeError(
            f"For {batched} input, hx and cx should also be {rank}-D but got "
            f"({h0.dim()}-D, {c0.dim()}-D) tensors"
        )
    return h0, c0


def _prepare(
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch: int,
    packed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Sequence[Tensor]]:
    """Autocast, then check the input and the states against the first layer's weights."""
    if autocast_enabled(x):
        composed = mode == "GRU" or (mode == "LSTM" and packed and not _is_projected(mode, params))
        dtype = autocast_dtype(composed, x, h0 if c0 is None else c0)
        if dtype is not None:
            x, h0, c0, *params = cast([x, h0, c0, *params], dtype)
    check_input(x, params[0])
    if h0 is not None:
        rows = num_layers * (2 if bidirectional else 1)
        gate_rows, state_size = params[1].shape
        check_state("hidden" if c0 is None else "hidden[0]", h0, x, (rows, batch, state_size))
        if c0 is not None:
            check_state("hidden[1]", c0, x, (rows, batch, gate_rows // GATES[mode]))
    return x, h0, c0, params


def _run_layers(
    mode: str,
    x: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stack of layers over time-major or packed x."""
    if num_layers == 1:
        return layer(
            mode, x, lengths, batch_sizes, reset, h0, c0, params, has_biases, bidirectional,
            recompute,
        )  # fmt: skip
    directions = 2 if bidirectional else 1
    per_layer = len(params) // num_layers
    h0s = [None] * num_layers if h0 is None else h0.split(directions)
    c0s = [None] * num_layers if c0 is None else c0.split(directions)
    h_ns, c_ns = [], []
    for index in range(num_layers):
        if index > 0 and dropout > 0:
            x = F.dropout(x, dropout, True)
        own = params[index * per_layer : (index + 1) * per_layer]
        x, h_n, c_n = layer(
            mode, x, lengths, batch_sizes, reset, h0s[index], c0s[index], own, has_biases,
            bidirectional, recompute,
        )  # fmt: skip
        h_ns.append(h_n)
        c_ns.append(c_n)
    return x, torch.cat(h_ns), torch.cat(c_ns) if mode == "LSTM" else c_ns[0]


_NAMES = {"LSTM": "LSTM", "GRU": "GRU", "RNN_TANH": "RNN", "RNN_RELU": "RNN"}
