"""Attention: scores of a query against a memory, and the weighted mean of the memory's states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedrnn.models._checks import check_choice, check_features, check_positive, valid_steps


@dataclass(frozen=True)
class Memory:
    """An encoder's states, ready to be attended to."""

    values: Tensor  # (B, S, E)
    keys: Tensor  # (B, S, A): what the scores are taken with
    mask: Tensor | None  # (B, S) bool: true where a state is valid; None: everywhere

    def repeat(self, times: int) -> Memory:
        """Each row `times` times in a row, for beams."""
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return Memory(
            self.values.repeat_interleave(times, 0), self.keys.repeat_interleave(times, 0), mask
        )


class Attention(nn.Module):
    """Soft attention with one of four scores of a query q and a memory state m.

    * ``"dot"``: q . m, ``"general"``: q . W m, ``"concat"``: v . tanh(W_q q + W_m m) (Luong et al.
      2015; the concatenation's matrix written as its two blocks);
    * ``"bahdanau"``: as concat, with a bias (Bahdanau et al. 2015; there the query is the state
      before the step, which is the decoder's part).

    Args:
        kind: one of the four.
        query_size, memory_size: features of q and of m; equal for ``"dot"``.
        size: features of the tanh layer, query_size if None.
        scale: what scores are multiplied by. Those of dot and general are sums over query_size;
            a softmax of large ones picks one place before it has learnt which, and then learns no
            more: ``query_size ** -0.5`` (Vaswani et al. 2017) keeps them small at first.

    Raises:
        ValueError: for an unknown kind, sizes below 1 or that differ with ``"dot"``, a scale that
            is no positive number.
    """

    KINDS = ("dot", "general", "concat", "bahdanau")

    def __init__(
        self,
        kind: str,
        query_size: int,
        memory_size: int,
        size: int | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, self.KINDS)
        size = query_size if size is None else size
        check_positive(query_size=query_size, memory_size=memory_size, size=size)
        if kind == "dot" and query_size != memory_size:
            raise ValueError(
                f"memory_size: dot needs query_size = {query_size}, got {memory_size}; "
                "general takes any"
            )
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"scale: expected a positive number, got {scale!r}")
        self.kind, self.query_size, self.memory_size = kind, query_size, memory_size
        self.scale = scale
        self.query_layer = self.key_layer = self.score_layer = None
        if kind == "general":
            self.key_layer = nn.Linear(memory_size, query_size, bias=False)
        elif kind != "dot":
            self.query_layer = nn.Linear(query_size, size, bias=False)
            self.key_layer = nn.Linear(memory_size, size, bias=kind == "bahdanau")
            self.score_layer = nn.Linear(size, 1, bias=False)

    def remember(self, values: Tensor, lengths: Tensor | None = None) -> Memory:
        """The states (B, S, E) as a memory, the part of the scores that no query changes done once.

        Args:
            lengths: int64 (B,), valid states of each row; what lies beyond gets no weight.

        Raises:
            TypeError, ValueError: for states or lengths that do not fit.
        """
        check_features("values", values, self.memory_size)
        mask = None
        if lengths is not None:
            mask = valid_steps(lengths, values.shape[0], values.shape[1], values.device)
            values = values.masked_fill(~mask[..., None], 0.0)  # zero times NaN is NaN
        keys = values if self.key_layer is None else self.key_layer(values)
        return Memory(values, keys, mask)

    def forward(self, query: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Queries (B, T, Q) to contexts (B, T, E) and weights (B, T, S), which sum to 1 over the
        valid states; a row without any has weights and contexts of zero.

        Raises:
            ValueError: for queries that do not fit the memory.
        """
        if query.dim() != 3 or query.shape[2] != self.query_size:
            raise ValueError(
                f"query: expected (B, T, {self.query_size}), got shape {tuple(query.shape)}"
            )
        if query.shape[0] != memory.values.shape[0]:
            raise ValueError(
                f"memory: expected the query's {query.shape[0]} rows, got {memory.values.shape[0]}"
            )
        if self.score_layer is None:
            scores = query @ memory.keys.transpose(1, 2)
        else:
            hidden = self.query_layer(query)[:, :, None] + memory.keys[:, None]
            scores = self.score_layer(torch.tanh(hidden)).squeeze(-1)
        if self.scale != 1.0:
            scores = scores * self.scale
        if memory.mask is None:
            weights = scores.softmax(-1)
        else:
            # A finite stand-in for minus infinity keeps rows without any valid state from NaN.
            invalid = ~memory.mask[:, None]
            weights = scores.masked_fill(invalid, torch.finfo(scores.dtype).min).softmax(-1)
            weights = weights.masked_fill(invalid, 0.0)
        return weights @ memory.values, weights
