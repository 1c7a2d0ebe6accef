"""Which arithmetic a bfloat16 layer has: its own products, or those of float32 where quicker."""

from __future__ import annotations

import pytest
import torch

import fusedrnn
import oracle

# Sets whose bfloat16 products take several instructions. Of the others it depends on the processor.
SLOW = [isa for isa in ("baseline", "avx2", "avx512") if isa in fusedrnn.cpu_isas()]


@pytest.mark.parametrize("isa", SLOW, indirect=True)
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    ("steps", "batch", "widened"), [(8, 4, True), (1, 32, True), (7, 4, False)]
)
def test_many_rows_are_multiplied_as_float32(
    isa: str, mode: str, steps: int, batch: int, widened: bool
) -> None:
    """Then nothing is rounded but the results; else the state is, at every step."""
    net = getattr(fusedrnn, mode)(24, 40, bidirectional=True, dtype=torch.bfloat16)
    wide = getattr(fusedrnn, mode)(24, 40, bidirectional=True)
    wide.load_state_dict(net.state_dict())
    x, h0 = torch.randn(steps, batch, 24).bfloat16(), torch.randn(2, batch, 40).bfloat16()
    hx, wide_hx = ((h, h) if mode == "LSTM" else h for h in (h0, h0.float()))
    for train in (False, True):
        with torch.set_grad_enabled(train):
            found = oracle.tensors(net(x, hx))
            exact = oracle.tensors(wide(x.float(), wide_hx))
        rounded = [t.bfloat16() for t in exact]
        assert oracle.same_bits(found, rounded) == widened
