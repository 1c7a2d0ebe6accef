"""From a state, token by token, to logits: with attention, or without."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedrnn.models._checks import check_choice, check_positive, check_tokens
from fusedrnn.models.attention import Attention, Memory
from fusedrnn.models.stack import RecurrentStack, State


@dataclass(frozen=True)
class DecoderState:
    """What a step hands to the next."""

    hidden: State  # (L, B, H), for LSTM two of them
    feed: Tensor | None  # (B, H): the attentional vector, with input feeding

    @property
    def h(self) -> Tensor:
        """(L, B, H): hidden, without an LSTM's cell state."""
        return self.hidden[0] if isinstance(self.hidden, tuple) else self.hidden

    def select(self, rows: Tensor) -> DecoderState:
        """The rows (N,) of the batch, in that order: for beams."""
        if isinstance(self.hidden, tuple):
            hidden = tuple(part.index_select(1, rows) for part in self.hidden)
        else:
            hidden = self.hidden.index_select(1, rows)
        return DecoderState(hidden, None if self.feed is None else self.feed.index_select(0, rows))


class AttentionDecoder(nn.Module):
    """A recurrent stack over the tokens so far, attention over a memory, logits.

    * ``"dot"``, ``"general"``, ``"concat"`` (Luong et al. 2015): the state h_t after the step asks;
      ``a_t = tanh(W_c [context; h_t])``, logits ``W a_t``. With ``input_feeding`` a_t joins the
      next step's input. Without it a whole target is one call a layer.
    * ``"bahdanau"`` (Bahdanau et al. 2015): the state before the step asks, and the context joins
      the step's input; the output layer is Luong's, not the paper's maxout. One call a step.
    * None: no attention, logits ``W h_t``: the memory is the initial state alone (Sutskever et al.
      2014). One call a layer.

    Args:
        num_embeddings: size of the vocabulary, V.
        embedding_size: features of a token.
        hidden_size: features of the state, H.
        memory_size: features of the memory's states; None without attention.
        attention: one of the kinds above.
        attention_scale: scale of :class:`Attention`.
        input_feeding: whether a_t joins the next step's input (Luong's kinds only).
        cell, num_layers, residual, dropout: of the stack; dropout also before the logits.
        padding_idx: a token whose embedding stays zero.

    Raises:
        ValueError: for another attention or cell, a size below 1, a memory_size without attention
            or the other way round, input feeding without Luong's attention.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_size: int,
        hidden_size: int,
        memory_size: int | None = None,
        *,
        attention: str | None = "general",
        attention_scale: float = 1.0,
        input_feeding: bool = False,
        cell: str = "lstm",
        num_layers: int = 1,
        residual: bool = False,
        dropout: float = 0.0,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("attention", attention, (None, *Attention.KINDS))
        check_positive(num_embeddings=num_embeddings, embedding_size=embedding_size)
        if (attention is None) != (memory_size is None):
            raise ValueError("memory_size: expected with attention, and only then")
        if input_feeding and attention in (None, "bahdanau"):
            raise ValueError(f"input_feeding: needs Luong's attention, not {attention!r}")
        self.num_embeddings, self.hidden_size = num_embeddings, hidden_size
        self.input_feeding, self.asks_before = input_feeding, attention == "bahdanau"
        self.embedding = nn.Embedding(num_embeddings, embedding_size, padding_idx)
        beside = hidden_size if input_feeding else memory_size if self.asks_before else 0
        self.stack = RecurrentStack(
            embedding_size + (beside or 0),
            hidden_size,
            cell=cell,
            num_layers=num_layers,
            residual=residual,
            dropout=dropout,
        )
        self.attention = self.combine = None
        if attention is not None:
            assert memory_size is not None
            self.attention = Attention(attention, hidden_size, memory_size, scale=attention_scale)
            self.combine = nn.Linear(memory_size + hidden_size, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_size, num_embeddings)

    def initial_state(self, hidden: State) -> DecoderState:
        """Of hidden (L, B, H), for LSTM two of them: what the first step starts from."""
        state = DecoderState(hidden, None)
        if not self.input_feeding:
            return state
        return DecoderState(hidden, state.h.new_zeros(state.h.shape[1], self.hidden_size))

    def step(
        self, tokens: Tensor, state: DecoderState, memory: Memory | None = None
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """One step: tokens (B,), int64 or int32, to logits (B, V), the next state, and weights
        (B, S) or None.

        Raises:
            TypeError, ValueError: for tokens that do not fit, an absent memory, or one without
                attention.
        """
        check_tokens("tokens", tokens, self.num_embeddings, rank=1)
        self._check_memory(memory)
        logits, state, weights = self._run(self.embedding(tokens)[:, None], state, memory)
        return logits[:, 0], state, None if weights is None else weights[:, 0]

    def forward(
        self,
        tokens: Tensor,
        state: DecoderState,
        memory: Memory | None = None,
        *,
        sampling_probability: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """Teacher forcing over a whole target.

        Args:
            tokens: (B, T), int64 or int32: what each step is given, the start token first.
            memory: what :meth:`Attention.remember` made of the encoder's states.
            sampling_probability: scheduled sampling (Bengio et al. 2015): how likely a step is
                given a token drawn from the step before instead, each row on its own, never the
                first.

        Returns:
            Logits (B, T, V), the state after the last step, and the attention's weights (B, T, S)
            or None.

        Raises:
            TypeError, ValueError: for tokens that do not fit or an absent memory.
        """
        check_tokens("tokens", tokens, self.num_embeddings)
        self._check_memory(memory)
        if not 0.0 <= sampling_probability <= 1.0:
            raise ValueError(
                f"sampling_probability: expected a probability, got {sampling_probability!r}"
            )
        stepwise = self.input_feeding or self.asks_before
        if not stepwise and sampling_probability == 0.0:
            return self._run(self.embedding(tokens), state, memory)
        all_logits, all_weights = [], []
        given = tokens[:, 0]
        for t in range(tokens.shape[1]):
            if t > 0:
                given = tokens[:, t]
                if sampling_probability > 0.0:
                    drawn = all_logits[-1].detach().softmax(-1)
                    drawn = torch.multinomial(drawn, 1, generator=generator).squeeze(1)
                    chance = torch.rand(
                        given.shape, generator=generator, device=given.device, dtype=torch.float32
                    )
                    given = torch.where(chance < sampling_probability, drawn, given)
            logits, state, weights = self.step(given, state, memory)
            all_logits.append(logits)
            all_weights.append(weights)
        weights = None if memory is None else torch.stack(all_weights, 1)
        return torch.stack(all_logits, 1), state, weights

    def _check_memory(self, memory: Memory | None) -> None:
        if (memory is None) != (self.attention is None):
            raise ValueError("memory: expected with attention, and only then")

    def _run(
        self, x: Tensor, state: DecoderState, memory: Memory | None
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """Embedded tokens (B, T, .) through stack, attention and output; T is 1 where a step's
        input depends on the step before."""
        context = weights = None
        if self.asks_before:
            context, weights = self.attention(state.h[-1][:, None], memory)
            x = torch.cat([x, context], -1)
        elif state.feed is not None:
            x = torch.cat([x, state.feed[:, None]], -1)
        h, hidden = self.stack(x, state.hidden)
        if self.attention is not None:
            if context is None:
                context, weights = self.attention(h, memory)
            h = torch.tanh(self.combine(torch.cat([context, h], -1)))
        feed = h[:, -1] if self.input_feeding else None
        return self.output(self.dropout(h)), DecoderState(hidden, feed), weights
