"""A stack of fused layers with residual connections: what encoder and decoder share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedrnn.models._checks import check_choice, check_positive
from fusedrnn.modules import GRU, LSTM, RNN

LAYERS = {"rnn": RNN, "lstm": LSTM, "gru": GRU}

# h_n, or (h_n, c_n) of an LSTM: (L*D, B, H) each, as torch.nn has them.
State = Any


class RecurrentStack(nn.Module):
    """Layers one upon the other, batch-first; from the second on each may add to its input.

    Sizes: B rows, T steps, I = input_size, H = hidden_size, L = num_layers, D = directions.

    Args:
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"`` (tanh).
        residual: layer l > 0 gives ``x + layer(x)`` (He et al. 2016; Wu et al. 2016 for LSTMs).
        dropout: probability between layers, in training.

    Raises:
        ValueError: for another cell, a size below 1 or a dropout outside [0, 1).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        cell: str = "lstm",
        num_layers: int = 1,
        bidirectional: bool = False,
        residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("cell", cell, tuple(LAYERS))
        check_positive(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
        self.input_size, self.hidden_size, self.cell = input_size, hidden_size, cell
        self.num_layers, self.residual, self.dropout = num_layers, residual, dropout
        self.directions = 2 if bidirectional else 1
        self.output_size = self.directions * hidden_size
        sizes = [input_size, *[self.output_size] * (num_layers - 1)]
        self.layers = nn.ModuleList(
            LAYERS[cell](size, hidden_size, batch_first=True, bidirectional=bidirectional)
            for size in sizes
        )

    def forward(
        self,
        x: Tensor,
        hx: State = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """(B, T, I) to (B, T, D*H) and the final state; arguments as for :class:`fusedrnn.LSTM`."""
        states = self._split(hx)
        finals = []
        for index, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            if index > 0 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
            y, final = layer(x, state, lengths=lengths, reset=reset)
            x = x + y if self.residual and index > 0 else y
            finals.append(final)
        if self.cell == "lstm":
            return x, tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
        return x, torch.cat(finals)

    def _split(self, hx: State) -> list[State]:
        if hx is None:
            return [None] * self.num_layers
        parts = hx if self.cell == "lstm" else (hx,)
        rows = self.num_layers * self.directions
        for part in parts:
            if part.dim() != 3 or part.shape[0] != rows or part.shape[2] != self.hidden_size:
                raise ValueError(
                    f"hx: expected ({rows}, B, {self.hidden_size}), got shape {tuple(part.shape)}"
                )
        pieces = [part.split(self.directions) for part in parts]
        if self.cell == "lstm":
            return list(zip(*pieces, strict=True))
        return list(pieces[0])
