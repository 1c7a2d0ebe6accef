"""Initial values that matter to recurrent networks; each works in place and returns the module.

They reach every RNN, LSTM, GRU and cell inside a module, fusedrnn's and torch.nn's, and raise
ValueError where there is none or a parametrization computes what they would set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from fusedrnn._checks import mode_of
from fusedrnn.cells import CELL_PARAMETERS
from fusedrnn.reference import GATES

M = TypeVar("M", bound=nn.Module)


def _recurrent(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every recurrent module and its mode."""
    found = False
    for part in module.modules():
        if isinstance(part, nn.RNNBase | nn.RNNCell | nn.LSTMCell | nn.GRUCell):
            found = True
            yield part, mode_of(part)
    if not found:
        raise ValueError(f"module: expected a recurrent module inside {type(module).__name__}")


def _named(module: nn.Module, kind: str) -> Iterator[Tensor]:
    """The module's own parameters of a kind, ``weight_hh`` or ``bias``, of all its layers."""
    layer = isinstance(module, nn.RNNBase)
    for name in module._flat_weights_names if layer else CELL_PARAMETERS:
        if not name.startswith(kind):
            continue
        if name not in module._parameters:
            raise ValueError(
                f"module: expected a plain parameter {name}, it is computed from others"
            )
        parameter = module._parameters[name]
        if parameter is not None:
            yield parameter


@torch.no_grad()
def identity_recurrent_(module: M, scale: float = 1.0) -> M:
    """W_hh of every RNN is ``scale`` times the identity and its biases zero: with ReLU, the IRNN of
    Le et al. 2015. Raises ValueError for gated cells."""
    for part, mode in _recurrent(module):
        if not mode.startswith("RNN"):
            raise ValueError(f"module: expected RNNs alone, got {mode}")
        for weight in _named(part, "weight_hh"):
            nn.init.eye_(weight).mul_(scale)
        for bias in _named(part, "bias"):
            bias.zero_()
    return module


@torch.no_grad()
def orthogonal_recurrent_(module: M, gain: float = 1.0) -> M:
    """Each gate's block of W_hh is orthogonal (Saxe et al. 2014)."""
    for part, mode in _recurrent(module):
        for weight in _named(part, "weight_hh"):
            for block in weight.chunk(GATES[mode]):
                block.copy_(nn.init.orthogonal_(torch.empty_like(block), gain))
    return module


@torch.no_grad()
def forget_gate_bias_(module: M, value: float = 1.0) -> M:
    """The forget gate of every LSTM starts with a bias of ``value`` in all (Gers et al. 2000;
    Jozefowicz et al. 2015): b_ih holds it, b_hh zero. Raises ValueError where there is no LSTM with
    biases."""
    found = False
    for part, mode in _recurrent(module):
        if mode != "LSTM":
            continue
        for kind, wanted in (("bias_ih", value), ("bias_hh", 0.0)):
            for bias in _named(part, kind):
                bias.chunk(4)[1].fill_(wanted)
                found = True
    if not found:
        raise ValueError(f"module: expected an LSTM with biases inside {type(module).__name__}")
    return module
