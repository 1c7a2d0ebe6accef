"""Encoder and decoder tied together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedrnn.models.attention import Memory
from fusedrnn.models.decoder import AttentionDecoder, DecoderState
from fusedrnn.models.encoder import Encoder


class Seq2Seq(nn.Module):
    """Sequence to sequence (Sutskever et al. 2014; with attention Bahdanau et al. 2015).

    The decoder's layers start from the encoder's last ones: their final states, both directions
    side by side, through a linear layer and tanh, or as they are where they fit.

    Raises:
        ValueError: for a decoder of another cell, with more layers than the encoder, or whose
            memory_size is not the encoder's output_size.
    """

    def __init__(self, encoder: Encoder, decoder: AttentionDecoder) -> None:
        super().__init__()
        source, target = encoder.stack, decoder.stack
        if source.cell != target.cell:
            raise ValueError(f"decoder: expected cell {source.cell!r}, got {target.cell!r}")
        if target.num_layers > source.num_layers:
            raise ValueError(
                f"decoder: expected at most the encoder's {source.num_layers} layers, "
                f"got {target.num_layers}"
            )
        attention = decoder.attention
        if attention is not None and attention.memory_size != encoder.output_size:
            raise ValueError(
                f"decoder: expected memory_size {encoder.output_size}, got {attention.memory_size}"
            )
        self.encoder, self.decoder = encoder, decoder
        self.bridge = None
        if encoder.output_size != decoder.hidden_size:
            states = 2 if source.cell == "lstm" else 1
            self.bridge = nn.ModuleList(
                nn.Linear(encoder.output_size, decoder.hidden_size) for _ in range(states)
            )

    def encode(
        self, source: Tensor, lengths: Tensor | None = None
    ) -> tuple[DecoderState, Memory | None]:
        """The source as the decoder's initial state and its memory; arguments as for
        :meth:`Encoder.forward`."""
        values, final = self.encoder(source, lengths)
        parts = final if isinstance(final, tuple) else (final,)
        parts = [self._bridged(i, part) for i, part in enumerate(parts)]
        state = self.decoder.initial_state(tuple(parts) if len(parts) == 2 else parts[0])
        attention = self.decoder.attention
        return state, None if attention is None else attention.remember(values, lengths)

    def _bridged(self, index: int, state: Tensor) -> Tensor:
        rows, batch, size = state.shape
        directions = self.encoder.stack.directions
        layers = state.view(rows // directions, directions, batch, size)
        layers = layers[-self.decoder.stack.num_layers :].transpose(1, 2)
        layers = layers.reshape(-1, batch, directions * size)
        return layers if self.bridge is None else torch.tanh(self.bridge[index](layers))

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        *,
        sampling_probability: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Teacher forcing.

        Args:
            source: tokens (B, S), int64 or int32, or features (B, S, I).
            target: (B, T), int64 or int32: what each step of the decoder is given.
            source_lengths: (B,), int64: valid steps of each source; None: all.
            sampling_probability: of :meth:`AttentionDecoder.forward`.

        Returns:
            Logits (B, T, V) and attention weights (B, T, S) or None.

        Raises:
            TypeError, ValueError: for tokens, features or lengths that do not fit.
        """
        if source.shape[0] != target.shape[0]:
            raise ValueError(
                f"target: expected {source.shape[0]} rows like source, got {target.shape[0]}"
            )
        state, memory = self.encode(source, source_lengths)
        logits, _, weights = self.decoder(
            target, state, memory, sampling_probability=sampling_probability
        )
        return logits, weights
