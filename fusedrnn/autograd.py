"""The ``torch.autograd.Function``s: one layer, all its directions, of each kind.

``apply`` works wherever it is called: under autograd to any order, in ``torch.func`` transforms,
with forward-mode tangents, in ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedrnn._checks import rnn_mode
from fusedrnn._layer import LayerFunction, layer

__all__ = ["GRUFunction", "LSTMFunction", "LayerFunction", "RNNFunction"]


class LSTMFunction(LayerFunction):
    """One LSTM layer (Hochreiter & Schmidhuber 1997; forget gate, Gers et al. 2000)."""

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        params: Sequence[Tensor],
        *,
        lengths: Tensor | None = None,
        batch_sizes: Tensor | None = None,
        reset: Tensor | None = None,
        has_biases: bool = True,
        bidirectional: bool = False,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer.

        Args:
            x: (T, B, I), or (N, I) with ``batch_sizes`` (int64 (T,), CPU).
            h0, c0: (D, B, P) and (D, B, H), or None for zeros.
            params: per direction w_ih (4H, I), w_hh (4H, P), then b_ih, b_hh (4H,) if
                ``has_biases``, then w_hr (P, H) if projected.
            lengths, reset: int64 (B,) and bool (T, B), only with dense x.
            recompute: keep no gates; backward makes them anew. CPU only.

        Returns:
            y (T, B, D*P) or (N, D*P), h_n (D, B, P), c_n (D, B, H), in x's dtype.

        Raises:
            ValueError, RuntimeError: a shape, dtype or device that does not fit.
        """
        return layer(
            "LSTM", x, lengths, batch_sizes, reset, h0, c0, params, has_biases, bidirectional,
            recompute,
        )  # fmt: skip


class GRUFunction(LayerFunction):
    """One GRU layer (Cho et al. 2014; the reset gate after the product, as in torch.nn)."""

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        x: Tensor,
        h0: Tensor | None,
        params: Sequence[Tensor],
        *,
        lengths: Tensor | None = None,
        batch_sizes: Tensor | None = None,
        reset: Tensor | None = None,
        has_biases: bool = True,
        bidirectional: bool = False,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer; arguments as in :meth:`LSTMFunction.apply`, weights of 3H rows.

        Returns:
            y (T, B, D*H) or (N, D*H), h_n (D, B, H), in x's dtype.
        """
        return layer(
            "GRU", x, lengths, batch_sizes, reset, h0, None, params, has_biases, bidirectional,
            recompute,
        )[:2]  # fmt: skip


class RNNFunction(LayerFunction):
    """One layer of the simple recurrent network (Elman 1990), with tanh or ReLU."""

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        x: Tensor,
        h0: Tensor | None,
        params: Sequence[Tensor],
        *,
        nonlinearity: str = "tanh",
        lengths: Tensor | None = None,
        batch_sizes: Tensor | None = None,
        reset: Tensor | None = None,
        has_biases: bool = True,
        bidirectional: bool = False,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer; arguments as in :meth:`LSTMFunction.apply`, weights of H rows.

        Returns:
            y (T, B, D*H) or (N, D*H), h_n (D, B, H), in x's dtype.

        Raises:
            ValueError: a ``nonlinearity`` other than ``"tanh"`` and ``"relu"``.
        """
        mode = rnn_mode(nonlinearity)
        return layer(
            mode, x, lengths, batch_sizes, reset, h0, None, params, has_biases, bidirectional,
            recompute,
        )[:2]  # fmt: skip
