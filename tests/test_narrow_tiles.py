"""bfloat16 products of many rows, with each instruction set: tiles of all heights, sums of whole
and of broken lines, panels that leave the first cache, rows that resets have put apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedrnn
import oracle
from fusedrnn import _C


@pytest.mark.parametrize(
    "shape", [(5, 2, 24, 40), (4, 17, 33, 48), (3, 33, 64, 320), (3, 49, 320, 72)], ids=str
)
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_tiles(one_thread: None, mode: str, shape: tuple[int, ...]) -> None:
    steps, batch, input_size, hidden_size = shape
    net = getattr(nn, mode.split("_")[0])(input_size, hidden_size, dtype=torch.bfloat16)
    x = torch.randn(steps, batch, input_size).bfloat16()
    reset = torch.rand(steps, batch) < 0.2
    reset[1] = False  # a step whose rows all lie equally far apart
    cotangents = [torch.randn(steps, batch, hidden_size)]
    cotangents += [torch.randn(1, batch, hidden_size)] * (2 if mode == "LSTM" else 1)

    def results(net: nn.Module, is_ours: bool = False) -> oracle.Results:
        leaf = x.to(net.weight_ih_l0.dtype, copy=True).requires_grad_()
        if is_ours:
            y, state = net(leaf, reset=reset)
            outputs = (y, *state) if mode == "LSTM" else (y, state)
        else:
            y, *state = oracle.ragged(net, leaf, None, reset, None, None)
            outputs = (y, *state[: len(cotangents) - 1])
        dys = [dy.to(y.dtype) for dy in cotangents]
        return oracle.results(outputs, {"x": leaf} | dict(net.named_parameters()), dys)

    theirs, exact = results(net), results(oracle.twin(net, torch.float64))
    for isa in fusedrnn.cpu_isas():
        _C.set_cpu_isa(isa)
        oracle.agree(results(oracle.twin(net), is_ours=True), theirs, exact, isa)
