"""Drop-in modules for torch.nn's RNN, LSTM and GRU.

They derive from ``torch.nn.RNNBase``, which gives them torch.nn's constructor, parameter names,
initial values, ``state_dict``, repr and pickling, and not from ``nn.LSTM`` and its siblings, whose
instances ``torch.compile`` refuses to trace.
"""

from __future__ import annotations

import weakref
from typing import Any, overload

from torch import Tensor, nn
from torch.nn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from fusedrnn._checks import rnn_mode
from fusedrnn._ops import _C
from fusedrnn.functional import is_compiling, recurrent

__all__ = ["GRU", "LSTM", "RNN"]


class _FusedRNNBase(RNNBase):
    """What RNN, LSTM and GRU share: reading the parameters, and the call."""

    recompute: bool = False

    def __init__(self, mode: str, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        super().__init__(mode, *args, **kwargs)
        if recompute:  # else the class's: an instance has torch.nn's attributes and no other
            self.recompute = True

    def extra_repr(self) -> str:
        return super().extra_repr() + (", recompute=True" if self.recompute else "")

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read each parameter where it lies."""

    def _init_flat_weights(self) -> None:
        # torch.nn's own list of weights. Nothing here reads it; it keeps to real parameters, since
        # a computed weight (weight_norm, for one) can be neither deep-copied nor kept up to date.
        self._flat_weights = [self._parameters.get(name) for name in self._flat_weights_names]
        self._flat_weight_refs = [w if w is None else weakref.ref(w) for w in self._flat_weights]

    def _parameter_list(self) -> list[Tensor]:
        """This call's parameters, by name: they may be parametrized, replaced or shared."""
        own = self._parameters
        values = []
        for name in self._flat_weights_names:
            value = own.get(name)
            values.append(getattr(self, name) if value is None else value)
        return values

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """Run the layers over a sequence.

        Sizes: T steps, B rows, I = input_size, H = hidden_size, P = proj_size or H, L = num_layers,
        D = directions.

        Args:
            input: (T, B, I), (B, T, I) if ``batch_first``, (T, I) for one row, or a PackedSequence,
                in the parameters' dtype.
            hx: initial state, zeros if None: h_0 (L*D, B, H), for LSTM a tuple of h_0 (L*D, B, P)
                and c_0 (L*D, B, H); without B for one row.
            lengths: int64 (B,), the valid steps of each row, in any order, 0 allowed. Padding is
                never read and may hold NaN; its output and its gradient are zero, and h_n, c_n are
                those after each row's last valid step (hx for length 0). Lengths on the CPU must
                lie in 0..T; on a GPU they are clamped to it, without a synchronisation. Not with a
                PackedSequence or one row.
            reset: bool (T, B), (B, T) if ``batch_first``, (T,) for one row. Where true, a new
                segment starts: in every layer the state that enters this step is zero and no
                gradient crosses; the reverse direction is cut at the same boundaries. Not with a
                PackedSequence.

        Returns:
            output, shaped as input with D*P features, and the final state, shaped as hx.

        Raises:
            ValueError, RuntimeError: as torch.nn, for an input or hx that does not fit.
            TypeError, ValueError: for lengths and reset that do not fit.
        """
        if lengths is None and reset is None and not is_compiling():
            # The everyday call, its options read from their dictionary: quicker than by attribute.
            own = self.__dict__
            if own["num_layers"] == 1:
                params = [*map(own["_parameters"].get, own["_flat_weights_names"])]
                found = _C.plain_layer(
                    own["mode"], input, hx, params, bool(own["bias"]), own["bidirectional"],
                    own["batch_first"], self.recompute,
                )  # fmt: skip
                if found is not None:
                    return found
        return recurrent(
            self.mode,
            input,
            hx,
            self._parameter_list(),
            self.bias,
            self.num_layers,
            self.dropout if self.training else 0.0,
            self.bidirectional,
            self.batch_first,
            lengths,
            reset,
            self.recompute,
            try_plain=False,
        )


class RNN(_FusedRNNBase):
    """Multi-layer simple recurrent network (Elman 1990), in place of ``torch.nn.RNN``.

    ``h_t = tanh(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)``, or ReLU for tanh. Constructor and
    parameters are those of ``torch.nn.RNN``; :meth:`forward` also takes ``lengths`` and ``reset``.
    ``recompute``, see :class:`LSTM`, changes nothing: only the output is kept for backward.
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        recompute: bool = False,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        nonlinearity = args[3] if len(args) > 3 else kwargs.pop("nonlinearity", "tanh")
        mode = rnn_mode(nonlinearity)
        super().__init__(mode, *args[:3], *args[4:], **kwargs)
        self.nonlinearity = nonlinearity


class LSTM(_FusedRNNBase):
    """Multi-layer long short-term memory, in place of ``torch.nn.LSTM``.

    ``i, f, o = sigmoid(...)``, ``g = tanh(...)`` of ``W_ih x_t + b_ih + W_hh h_(t-1) + b_hh``;
    ``c_t = f c_(t-1) + i g``; ``h_t = o tanh(c_t)``, times ``W_hr`` with ``proj_size`` (Hochreiter
    & Schmidhuber 1997; Gers et al. 2000; Sak et al. 2014). Constructor and parameters are those of
    ``torch.nn.LSTM``; :meth:`forward` also takes ``lengths`` and ``reset``.

    ``recompute=True`` keeps no gates for the backward pass, which makes them anew from input and
    output, for up to a third more time. Beside these two, training then holds c of every
    ``max(1, 256 // B)``-th step (H values a row) instead of 5H values for each row and step. On
    the CPU. It is an attribute, too, which may be set at any time.
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        recompute: bool = False,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    # torch.nn.LSTM's own, for subclasses that write their own forward: RNNBase's know one state.
    check_forward_args = nn.LSTM.check_forward_args
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    permute_hidden = nn.LSTM.permute_hidden


class GRU(_FusedRNNBase):
    """Multi-layer gated recurrent unit, in place of ``torch.nn.GRU``.

    ``r, z = sigmoid(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)``;
    ``n = tanh(W_in x_t + b_in + r (W_hn h_(t-1) + b_hn))``; ``h_t = (1 - z) n + z h_(t-1)``
    (Cho et al. 2014, with torch.nn's place of the reset gate). Constructor and parameters are those
    of ``torch.nn.GRU``; :meth:`forward` also takes ``lengths`` and ``reset``. ``recompute=True``
    keeps no gates for the backward pass, as in :class:`LSTM`, here nothing but the output.
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        recompute: bool = False,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)


def _refuse_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
