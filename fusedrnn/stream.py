"""Low-latency inference, step by step, with a frozen copy of a trained stack."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fusedrnn._checks import layer_shapes, mode_of
from fusedrnn._ops import _C
from fusedrnn.cells import CELL_PARAMETERS, GRUCell, LSTMCell, RNNCell
from fusedrnn.modules import GRU, LSTM, RNN
from fusedrnn.reference import GATES

__all__ = ["Stream"]

Array = TypeVar("Array", Tensor, np.ndarray)

_PARAMETERS = (*CELL_PARAMETERS, "weight_hr")
_FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
# What a module may do when it is called: all else a stream would leave out.
_FORWARDS = {
    kind.forward
    for kind in (
        *(RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell),
        *(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell),
    )
}


class Stream:
    """A trained RNN, LSTM or GRU that takes one step after another and keeps its state.

    The weights are copied and laid out for the kernels once, when the object is made: later changes
    of the module do not reach it. Calls go straight to the kernels, past torch's dispatcher, and
    record nothing for autograd. The equations are those of :class:`fusedrnn.LSTM`, ``GRU`` and
    ``RNN``; dropout is off.

    Args:
        module: an RNN, LSTM or GRU of torch.nn or fusedrnn, of any number of layers, with or
            without projection, in one direction; or one of their cells.
        weights: how the weights are kept. ``torch.float32``; ``torch.bfloat16``, half the memory:
            the weights and what they multiply are rounded to 8 significant bits; ``torch.int8``, a
            quarter: each row of a weight has one scale, its largest size / 127, and what it
            multiplies is rounded to 8 bits too, with a scale of its own in each row and step. Sums,
            biases, gates and states are float32 in all of them.
        batch_size: rows B that advance together.

    The state starts as zeros. An object serves one thread at a time; :meth:`fork` gives each its
    own state over the same weights. A call of less than 4 M multiplications runs on the calling
    thread alone unless it is one of many that follow each other within 5 ms: else the other threads
    of ``torch.get_num_threads()`` sleep, and waking them takes longer. The results are the same,
    where threads share out the rows of a batch to rounding.

    Raises:
        TypeError: module or weights are of another kind.
        ValueError: the module is bidirectional, has forward hooks or a ``forward`` of its own, or
            parameters that do not fit together; batch_size is no integer or below 1; rows of
            weights are too long for sums of int8.
    """

    def __init__(
        self,
        module: nn.RNNBase | nn.RNNCellBase,
        *,
        weights: torch.dtype = torch.float32,
        batch_size: int = 1,
    ) -> None:
        if weights not in _FORMATS:
            raise TypeError(
                f"weights must be torch.float32, torch.bfloat16 or torch.int8, got {weights!r}"
            )
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        self.weights = weights
        self.batch_size = batch_size
        params = [
            (mode, [None if p is None else _plain(p) for p in tensors])
            for mode, tensors in _layers_of(module)
        ]
        _check_forward(module)
        _check_shapes(params)
        self._modes = [mode for mode, _ in params]
        self._sizes = [(p[1].shape[1], p[0].shape[0] // GATES[mode]) for mode, p in params]
        if weights == torch.int8:
            _check_int8_sums(params)
        self.input_size: int = params[0][1][0].shape[1]
        self.output_size: int = self._sizes[-1][0]
        self._stream = _C.Stream(params, _FORMATS[weights], batch_size)

    def step(self, x: Array) -> Array:
        """One step of all layers.

        Args:
            x: (B, I), or (I,) where the batch size is 1: a float32 torch.Tensor on the CPU or a
                numpy.ndarray.

        Returns:
            The last layer's h, (B, P) or (P,), in the kind that x came in.

        Raises:
            TypeError, ValueError: x has another type, dtype or shape.
            RuntimeError: x requires grad, or another thread is running this object.
        """
        return self._stream.step(x)

    def run(self, x: Array) -> Array:
        """T steps: (T, B, I), or (T, I) where the batch size is 1, to (T, B, P) or (T, P).

        The same results as T calls of :meth:`step` but for rounding, sooner; T may be 0. Types
        and errors are those of :meth:`step`.
        """
        return self._stream.run(x)

    @property
    def state(self) -> Tensor | tuple[Tensor, Tensor]:
        """A copy of the state: h (L, B, P), or (h, c) with c (L, B, H) for an LSTM, as torch.nn's
        h_n and c_n, float32 on the CPU. Assigning one in the same form sets it, None zeros.

        Raises:
            TypeError, ValueError: what is assigned is no such tensor or pair, or has another shape.
        """
        states = [self._stream.get_state(layer) for layer in range(len(self._modes))]
        h = torch.stack([h for h, _ in states])
        return (h, torch.stack([c for _, c in states])) if self._modes[0] == "LSTM" else h

    @state.setter
    def state(self, value: Tensor | tuple[Tensor, Tensor] | None) -> None:
        lstm = self._modes[0] == "LSTM"
        if value is None:
            h = c = None
        elif lstm:
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                raise TypeError(
                    f"state must be a pair (h, c) for an LSTM, got {type(value).__name__}"
                )
            h, c = value
            c = self._checked("state[1]", c, self._sizes[0][1])
        else:
            h, c = value, None
        if h is not None:
            h = self._checked("state[0]" if lstm else "state", h, self._sizes[0][0])
        for layer in range(len(self._modes)):
            self._stream.set_state(
                layer, None if h is None else h[layer], None if c is None else c[layer]
            )

    def reset(self) -> None:
        """Set the state to zeros, for a new sequence."""
        self.state = None

    def fork(self) -> Stream:
        """Another stream over the same weights, which it shares, with a state of its own, zeros."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._stream = self._stream.fork()
        return other

    def __copy__(self) -> Stream:
        """As :meth:`fork`, in the same state: the weights never change."""
        other = self.fork()
        other.state = self.state
        return other

    def __deepcopy__(self, memo: dict[int, object]) -> Stream:
        return self.__copy__()

    def __repr__(self) -> str:
        return (
            f"Stream({self._modes[0]}, layers={len(self._modes)}, input_size={self.input_size}, "
            f"output_size={self.output_size}, weights={self.weights}, "
            f"batch_size={self.batch_size})"
        )

    def _checked(self, name: str, value: Tensor, units: int) -> Tensor:
        expected = (len(self._modes), self.batch_size, units)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.shape != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
        return _plain(value)


# Products of two values of at most 127 each are added up in 32 bits. Kernels that multiply by a
# value + 128 instead, and take the surplus off afterwards, may wrap around meanwhile.
_MOST_INT8_PRODUCTS = (2**31 - 1) // 127**2


def _check_int8_sums(params: list[tuple[str, list[Tensor | None]]]) -> None:
    for _, tensors in params:
        columns = max(p.shape[1] for p in tensors if p is not None and p.dim() == 2)
        if columns > _MOST_INT8_PRODUCTS:
            raise ValueError(
                f"weights: int8 sums hold at most {_MOST_INT8_PRODUCTS} products, the module has "
                f"rows of {columns} weights"
            )


def _check_shapes(params: list[tuple[str, list[Tensor | None]]]) -> None:
    """Parameters that do not fit together would have the kernels read past their ends."""
    inputs: int | None = None
    for layer, (mode, tensors) in enumerate(params):
        w_ih, w_hh, *_, w_hr = tensors
        if w_ih is None or w_hh is None or w_ih.dim() != 2 or w_hh.dim() != 2:
            raise ValueError(f"module: expected matrices weight_ih and weight_hh in layer {layer}")
        hidden = w_ih.shape[0] // GATES[mode]
        state = hidden if w_hr is None else w_hh.shape[1]
        if hidden == 0 or state == 0:
            raise ValueError(f"module: expected a hidden_size of at least 1 in layer {layer}")
        columns = w_ih.shape[1] if inputs is None else inputs
        weights, biases, projection = layer_shapes(mode, columns, hidden, state)
        expected = (*weights, *biases, projection)
        for name, tensor, shape in zip(_PARAMETERS, tensors, expected, strict=True):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"module: expected {name} of shape {shape} in layer {layer}, got "
                    f"{tuple(tensor.shape)}"
                )
        inputs = state


def _plain(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        raise TypeError(f"expected floating-point values, got {t.dtype}")
    return t.detach().to("cpu", torch.float32).resolve_neg().contiguous()


def _weight(module: nn.Module, name: str) -> Tensor | None:
    if module._forward_pre_hooks and isinstance(vars(module).get(name), Tensor):
        raise ValueError(
            f"module: {name} is computed by a hook of each forward call and may be out of date: "
            "make it a parameter first (prune.remove, remove_weight_norm)"
        )
    return getattr(module, name, None)


def _check_forward(module: nn.Module) -> None:
    if "forward" in vars(module) or type(module).forward not in _FORWARDS:
        raise ValueError(
            f"module: {type(module).__name__} has a forward of its own, which a stream would not "
            "call"
        )
    if module._forward_pre_hooks or module._forward_hooks:
        raise ValueError("module has forward hooks, which a stream would not call: remove them")


def _layers_of(module: nn.Module) -> list[tuple[str, list[Tensor | None]]]:
    """The mode and w_ih, w_hh, b_ih, b_hh, w_hr of each layer, None for what it lacks."""
    if isinstance(module, nn.RNNBase):
        if module.bidirectional:
            raise ValueError(
                "module is bidirectional: its reverse direction begins at the end of a sequence, "
                "which a stream does not know"
            )
        return [
            (module.mode, [_weight(module, f"{name}_l{layer}") for name in _PARAMETERS])
            for layer in range(module.num_layers)
        ]
    if isinstance(module, nn.LSTMCell | nn.GRUCell | nn.RNNCell):
        params = [_weight(module, name) for name in CELL_PARAMETERS]
        return [(mode_of(module), [*params, None])]
    raise TypeError(
        "module must be an RNN, LSTM, GRU or one of their cells, got " + type(module).__name__
    )
