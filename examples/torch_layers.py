"""The same model on torch.nn's layers, to compare with: speed and results, from one set of weights.

torch.nn's layers take rows of different length packed, not as ``lengths``; a shell around each sees
to that.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn.models.stack import RecurrentStack

SETTLE_SECONDS = 0.02  # another runtime's spinning threads go to sleep in this time


class Packed(nn.Module):
    """A torch.nn layer that takes ``lengths``, by packing."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = fusedrnn.revert(layer)

    def forward(self, x: Tensor, hx=None, *, lengths: Tensor | None = None, reset=None):
        assert reset is None
        if lengths is None:
            return self.layer(x, hx)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, state = self.layer(packed, hx)
        return pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0], state


def on_torch_layers(model: nn.Module) -> nn.Module:
    """A copy of the model whose recurrent layers are torch.nn's, with copies of its weights."""
    model = copy.deepcopy(model)
    for part in model.modules():
        if isinstance(part, RecurrentStack):
            part.layers = nn.ModuleList(Packed(layer) for layer in part.layers)
    return model


def paired_seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; they take turns, so that neither gets the quiet machine."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(SETTLE_SECONDS)
            call()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def step_seconds(
    sides: dict[str, nn.Module], loss_of: Callable[[nn.Module], Tensor], rounds: int
) -> dict[str, float]:
    """Of each model, the median seconds of a training step without its optimizer."""

    def step(model: nn.Module) -> Callable[[], object]:
        def call() -> None:
            model.zero_grad(set_to_none=True)
            loss_of(model).backward()

        return call

    return paired_seconds({name: step(model) for name, model in sides.items()}, rounds)
