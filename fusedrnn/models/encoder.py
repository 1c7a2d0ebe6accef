"""From a sequence to a state for every step, and the final one."""

from __future__ import annotations

from torch import Tensor, nn

from fusedrnn.models._checks import check_features, check_positive, check_tokens, valid_steps
from fusedrnn.models.stack import RecurrentStack, State


class Encoder(nn.Module):
    """Tokens or features through a recurrent stack.

    Args:
        input_size: features of a step, or the embedding's size.
        hidden_size, cell, num_layers, bidirectional, residual, dropout: of the stack, see
            :class:`fusedrnn.models.stack.RecurrentStack`.
        num_embeddings: size of the vocabulary where the input is tokens; None for features.
        padding_idx: a token whose embedding stays zero.

    Raises:
        ValueError: what :class:`RecurrentStack` refuses, or num_embeddings below 1.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_embeddings: int | None = None,
        padding_idx: int | None = None,
        cell: str = "lstm",
        num_layers: int = 1,
        bidirectional: bool = False,
        residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.stack = RecurrentStack(
            input_size,
            hidden_size,
            cell=cell,
            num_layers=num_layers,
            bidirectional=bidirectional,
            residual=residual,
            dropout=dropout,
        )
        self.embedding = None
        if num_embeddings is not None:
            check_positive(num_embeddings=num_embeddings)
            self.embedding = nn.Embedding(num_embeddings, input_size, padding_idx)

    @property
    def output_size(self) -> int:
        """Features of each state: hidden_size times the directions."""
        return self.stack.output_size

    def summary(self, final: State) -> Tensor:
        """Of a final state as :meth:`forward` returns it, what the last layer knows of the whole
        sequence: its h, both directions side by side, (B, D*H). What a classifier reads."""
        h = final[0] if isinstance(final, tuple) else final
        last = h[-self.stack.directions :]
        return last.transpose(0, 1).reshape(last.shape[1], -1)

    def forward(
        self,
        input: Tensor,
        lengths: Tensor | None = None,
        hx: State = None,
        *,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Encode.

        Args:
            input: tokens (B, T) with num_embeddings, else features (B, T, I).
            lengths: int64 (B,), valid steps of each row, in any order; what lies beyond is never
                read, and zero in the output.
            hx: initial state, (L*D, B, H), for LSTM two of them; None for zeros.
            reset: bool (B, T), where true a new segment starts.

        Returns:
            Every state, (B, T, D*H), and the final one, shaped as hx.

        Raises:
            TypeError, ValueError: for an argument that does not fit, an empty batch, a token out of
                range, lengths beyond T.
        """
        if self.embedding is None:
            check_features("input", input, self.stack.input_size)
            return self.stack(input, hx, lengths=lengths, reset=reset)
        if lengths is not None and input.dim() == 2:
            # Padding may be any number: an index that every vocabulary has takes its place.
            valid = valid_steps(lengths, input.shape[0], input.shape[1], input.device)
            input = input.masked_fill(~valid, 0)
        check_tokens("input", input, self.embedding.num_embeddings)
        return self.stack(self.embedding(input), hx, lengths=lengths, reset=reset)
