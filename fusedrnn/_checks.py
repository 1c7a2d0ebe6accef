"""What callers may pass: checked before any operator runs.

Arguments that torch.nn has too raise torch.nn's error, with its words. ``lengths``, ``reset`` and
the parameter lists of ``fusedrnn.functional`` raise TypeError for what is no tensor and ValueError
else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusedrnn.reference import GATES

__all__ = [
    "check_dropout",
    "check_input",
    "check_lengths",
    "check_params",
    "check_reset",
    "check_state",
    "layer_shapes",
    "mode_of",
    "rnn_mode",
]


def check_input(x: Tensor, weight: Tensor) -> None:
    """x (..., I) against the first layer's w_ih (G*H, I): dtype, device, size."""
    if x.dtype != weight.dtype:
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.device != weight.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{x.device} and parameter tensor at {weight.device}"
        )
    if x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {weight.shape[1]}, got {x.shape[-1]}"
        )


def check_state(name: str, state: Tensor, x: Tensor, expected: tuple[int, int, int]) -> None:
    """An initial state (L*D, B, P or H) against its size and x's dtype and device.

    ``name`` is torch.nn's: ``hidden``, or ``hidden[0]`` and ``hidden[1]`` for LSTM.
    """
    if state.shape != expected:
        raise RuntimeError(f"Expected {name} size {expected}, got {list(state.shape)}")
    if state.device != x.device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, found input tensor at "
            f"{x.device} and hidden tensor at {state.device}"
        )
    if state.dtype != x.dtype:
        raise RuntimeError(f"Expected {name} dtype {x.dtype} as the input's, got {state.dtype}")


def check_dropout(dropout: float) -> None:
    """A probability; NaN is none."""
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a number in range [0, 1], got {dropout!r}")


def check_lengths(lengths: Tensor, num_steps: int, batch: int, device: torch.device) -> None:
    """lengths of an input with so many steps and rows: int64 (batch,), values in 0..num_steps.

    Values are read only where that costs nothing and is possible: of a plain CPU tensor, and not
    while tracing. The kernels clamp or refuse what cannot be checked here.
    """
    _require_tensor("lengths", lengths, "an int64 tensor of shape (batch,)")
    if lengths.dtype != torch.int64:
        raise ValueError(f"lengths must have dtype torch.int64, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths must have shape ({batch},), one entry a row of input, got "
            f"{tuple(lengths.shape)}"
        )
    if lengths.device != device and lengths.device.type != "cpu":
        raise ValueError(
            f"lengths must be on the CPU or on input's device {device}, got {lengths.device}"
        )
    readable = (
        not torch.compiler.is_compiling()
        and type(lengths) is Tensor
        and lengths.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
    )
    if readable and batch > 0:
        values = lengths.tolist()
        if min(values) < 0 or max(values) > num_steps:
            raise ValueError(
                f"lengths must lie in 0..{num_steps} (input's number of steps), got values from "
                f"{min(values)} to {max(values)}"
            )


def check_reset(reset: Tensor, x: Tensor, expected: tuple[int, ...]) -> None:
    """reset as the caller gave it: bool, shaped as input without its features, on x's device."""
    _require_tensor("reset", reset, f"a bool tensor of shape {expected}")
    if reset.dtype != torch.bool:
        raise ValueError(f"reset must have dtype torch.bool, got {reset.dtype}")
    if reset.shape != expected:
        raise ValueError(
            f"reset must have shape {expected}, input's without its features, got "
            f"{tuple(reset.shape)}"
        )
    if reset.device != x.device:
        raise ValueError(f"reset must be on input's device {x.device}, got {reset.device}")


def check_params(
    mode: str,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
) -> None:
    """A flat parameter list: count, shapes, one dtype, one device."""
    directions = 2 if bidirectional else 1
    counts = [2 + 2 * bool(has_biases) + projected for projected in range(1 + (mode == "LSTM"))]
    if num_layers < 1:
        raise ValueError("num_layers must be greater than zero")
    if len(params) not in [count * num_layers * directions for count in counts]:
        raise ValueError(
            f"params must hold {' or '.join(map(str, counts))} tensors for each of {num_layers} "
            f"layers and {directions} directions (has_biases={bool(has_biases)}), got {len(params)}"
        )
    for index, param in enumerate(params):
        _require_tensor(f"params[{index}]", param, "a tensor")
    if params[0].dim() != 2 or params[1].dim() != 2:
        raise ValueError(
            "params[0] and params[1] must be 2-D weights, got shapes "
            f"{tuple(params[0].shape)} and {tuple(params[1].shape)}"
        )
    gate_rows, state_size = params[1].shape
    hidden_size = gate_rows // GATES[mode]
    per_direction = len(params) // (num_layers * directions)
    projected = per_direction == counts[-1] and mode == "LSTM"
    if gate_rows % GATES[mode] or (state_size != hidden_size and not projected):
        raise ValueError(
            f"params[1] must have shape ({GATES[mode]} * hidden_size, hidden_size), got "
            f"{tuple(params[1].shape)}"
        )
    input_size = params[0].shape[1]
    for index, param in enumerate(params):
        layer, place = index // (per_direction * directions), index % per_direction
        columns = input_size if layer == 0 else state_size * directions
        weights, biases, projection = layer_shapes(mode, columns, hidden_size, state_size)
        shapes = [*weights, *(biases if has_biases else ()), projection]
        if param.shape != shapes[place]:
            raise ValueError(
                f"params[{index}] must have shape {shapes[place]}, got {tuple(param.shape)}"
            )
        if param.dtype != params[0].dtype or param.device != params[0].device:
            raise ValueError(
                f"params[{index}] must have dtype {params[0].dtype} on {params[0].device}, as "
                f"params[0], got {param.dtype} on {param.device}"
            )


def layer_shapes(
    mode: str, input_size: int, hidden_size: int, state_size: int
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int], ...], tuple[int, int]]:
    """The shapes of w_ih and w_hh, of b_ih and b_hh, and of w_hr, of one direction of a layer."""
    rows = GATES[mode] * hidden_size
    weights = (rows, input_size), (rows, state_size)
    return weights, ((rows,), (rows,)), (state_size, hidden_size)


def mode_of(module: nn.RNNBase | nn.RNNCellBase) -> str:
    """The mode of a recurrent module, torch.nn's or fusedrnn's; ValueError as :func:`rnn_mode`."""
    if isinstance(module, nn.RNNBase):
        return module.mode
    if isinstance(module, nn.RNNCell):
        return rnn_mode(module.nonlinearity)
    return "LSTM" if isinstance(module, nn.LSTMCell) else "GRU"


def rnn_mode(nonlinearity: str) -> str:
    """The mode of an RNN with this nonlinearity; ValueError, as torch.nn's, where there is none."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return "RNN_TANH" if nonlinearity == "tanh" else "RNN_RELU"


def _require_tensor(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
