"""Drop-in modules for torch.nn's RNNCell, LSTMCell and GRUCell: layers of one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusedrnn._autocast import autocast_dtype, cast
from fusedrnn._layer import layer
from fusedrnn._ops import _C

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]


class RNNCell(nn.RNNCell):
    """One step of a simple recurrent network (Elman 1990), in place of ``torch.nn.RNNCell``.

    ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``, or ReLU for tanh.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (B, I) or (I,), hx (B, H) or (H,), zeros if None; returns h' shaped as hx.

        Raises:
            ValueError, RuntimeError: as torch.nn, for ranks, sizes and dtypes that do not fit.
        """
        if self.nonlinearity not in ("tanh", "relu"):
            _check_ranks("RNNCell", input, hx)
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        mode = "RNN_TANH" if self.nonlinearity == "tanh" else "RNN_RELU"
        return _step(self, "RNNCell", mode, input, hx, None)[0]


class GRUCell(nn.GRUCell):
    """One step of a gated recurrent unit (Cho et al. 2014), in place of ``torch.nn.GRUCell``.

    The equations are those of :class:`fusedrnn.GRU`.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (B, I) or (I,), hx (B, H) or (H,), zeros if None; returns h' shaped as hx.

        Raises:
            ValueError, RuntimeError: as torch.nn, for ranks, sizes and dtypes that do not fit.
        """
        return _step(self, "GRUCell", "GRU", input, hx, None)[0]


class LSTMCell(nn.LSTMCell):
    """One step of long short-term memory, in place of ``torch.nn.LSTMCell``.

    Hochreiter & Schmidhuber 1997, Gers et al. 2000; the equations are those of
    :class:`fusedrnn.LSTM`.
    """

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """input (B, I) or (I,), hx (h, c) each (B, H) or (H,), zeros if None; returns (h', c').

        Raises:
            ValueError, RuntimeError: as torch.nn, for ranks, sizes and dtypes that do not fit.
            TypeError: hx is a tensor, or has a None in it.
        """
        if hx is None:
            return _step(self, "LSTMCell", "LSTM", input, None, None)
        if isinstance(hx, Tensor):
            raise TypeError("LSTMCell: Expected hx to be a tuple (h, c) of tensors, got a tensor")
        if len(hx) != 2:
            _check_ranks("LSTMCell", input, *hx)
            raise RuntimeError("lstm_cell expects two hidden states")
        h, c = hx
        if h is None or c is None:
            raise TypeError("LSTMCell: Expected hx to be a tuple (h, c) of tensors, got None in it")
        return _step(self, "LSTMCell", "LSTM", input, h, c)


_is_compiling = torch.compiler.is_compiling

CELL_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _check_ranks(name: str, input: Tensor, *states: Tensor | None) -> None:
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    for index, state in enumerate(states):
        if state is not None and state.dim() not in (1, 2):
            what = f"hx[{index}]" if name == "LSTMCell" else "hidden"
            raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")


def _step(
    cell: nn.RNNCellBase, name: str, mode: str, input: Tensor, h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step as a sequence of length 1; c' has a meaning for LSTM only."""
    if not _is_compiling():
        # Plain parameters are read from the cell's dictionary. One that is missing there (it is
        # computed, or None) makes C++ leave the call to what follows.
        found = _C.cell_step(cell, mode, input, h, c)
        if found is not None:
            return found
    w_ih, w_hh, b_ih, b_hh = (getattr(cell, key) for key in CELL_PARAMETERS)
    has_biases = b_ih is not None or b_hh is not None
    params: Sequence[Tensor] = [w_ih, w_hh]
    if has_biases:  # as torch.nn, of which one may be missing
        params = [
            w_ih,
            w_hh,
            torch.zeros_like(b_hh) if b_ih is None else b_ih,
            torch.zeros_like(b_ih) if b_hh is None else b_hh,
        ]
    _check_ranks(name, input, h, *(() if c is None else (c,)))
    batched = input.dim() == 2
    x = input if batched else input.unsqueeze(0)
    if h is not None and not batched:
        h, c = h.unsqueeze(0), None if c is None else c.unsqueeze(0)
    dtype = autocast_dtype(mode in ("LSTM", "GRU"), x, h if c is None else c)
    if dtype is not None:
        x, h, c, *params = cast([x, h, c, *params], dtype)
    hidden_size = params[1].shape[1]
    _check_input_size(x, params[0])
    for index, state in enumerate((h, c)):
        if state is not None:
            _check_state_size(index, state, x, hidden_size)
    _check_kind("input", x, "the weights'", params[0])
    for index, state in enumerate((h, c)):
        if state is not None:
            _check_kind(f"hidden{index}", state, "input's", x)
    h = None if h is None else h.unsqueeze(0)
    c = None if c is None else c.unsqueeze(0)
    _, h_n, c_n = layer(mode, x.unsqueeze(0), None, None, None, h, c, params, has_biases, False)
    axes = 0 if batched else (0, 1)
    return h_n.squeeze(axes), c_n.squeeze(axes) if mode == "LSTM" else c_n


def _check_input_size(x: Tensor, weight: Tensor) -> None:
    if x.shape[1] != weight.shape[1]:
        raise RuntimeError(
            f"input has inconsistent input_size: got {x.shape[1]} expected {weight.shape[1]}"
        )


def _check_state_size(index: int, state: Tensor, x: Tensor, hidden_size: int) -> None:
    name = f"hidden{index}"
    if state.dim() != 2:
        raise RuntimeError(
            f"{name} must have as many dimensions as input, got shape {tuple(state.shape)}"
        )
    if state.shape[0] != x.shape[0]:
        raise RuntimeError(
            f"Input batch size {x.shape[0]} doesn't match {name} batch size {state.shape[0]}"
        )
    if state.shape[1] != hidden_size:
        raise RuntimeError(
            f"{name} has inconsistent hidden_size: got {state.shape[1]}, expected {hidden_size}"
        )


def _check_kind(name: str, tensor: Tensor, whose: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise RuntimeError(
            f"{name} must have {whose} dtype {other.dtype} and device {other.device}, got "
            f"{tensor.dtype} on {tensor.device}"
        )
