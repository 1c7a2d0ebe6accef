"""What a Stream must give: the definition in float64, its operands rounded first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

KINDS = {
    "LSTM": (nn.LSTM, {}),
    "LSTM projected": (nn.LSTM, {"proj_size": 7}),
    "GRU": (nn.GRU, {}),
    "RNN": (nn.RNN, {}),
    "RNN relu": (nn.RNN, {"nonlinearity": "relu"}),
}
# (input, hidden, layers, batch): less than a vector, odd, whole vectors, several threads.
SIZES = [(3, 8, 1, 1), (19, 37, 2, 3), (64, 64, 1, 1), (33, 100, 3, 5), (130, 270, 1, 2)]
STEPS = 12


def make(kind: str, size: tuple[int, int, int, int], bias: bool = True) -> nn.RNNBase:
    cls, options = KINDS[kind]
    torch.manual_seed(3)
    return cls(size[0], size[1], num_layers=size[2], bias=bias, **options)


def make_input(size: tuple[int, int, int, int], steps: int = STEPS) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(steps, size[3], size[0], generator=generator)


# ---- the definition, with rounded operands ------------------------------------------------------


def exact(t: Tensor) -> Tensor:
    return t.double()


def rounded_to_bfloat16(t: Tensor) -> Tensor:
    return t.float().bfloat16().double()


def rounded_to_int8(t: Tensor) -> Tensor:
    """Each row to 255 levels between the largest size and its negative."""
    rows = t.float()
    factor = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / factor.clamp_min(1e-37)).round().double() * factor.double()


ROUNDED = {
    torch.float32: exact,
    torch.bfloat16: rounded_to_bfloat16,
    torch.int8: rounded_to_int8,
}


def plain(module: nn.RNNBase, x: Tensor, weights: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n, c_n in float64, a step at a time, weights and what they multiply rounded first."""
    r = ROUNDED[weights]
    finals = []
    for layer in range(module.num_layers):

        def own(name: str, layer: int = layer) -> Tensor | None:
            value = getattr(module, f"{name}_l{layer}", None)
            return None if value is None else value.detach()

        w_ih, w_hh, w_hr = own("weight_ih"), own("weight_hh"), own("weight_hr")
        b_ih = 0 if own("bias_ih") is None else own("bias_ih").double()
        b_hh = 0 if own("bias_hh") is None else own("bias_hh").double()
        h = torch.zeros(x.shape[1], w_hh.shape[1], dtype=torch.float64)
        c = torch.zeros(x.shape[1], module.hidden_size, dtype=torch.float64)
        outputs = []
        for step in x.double():
            a = r(step) @ r(w_ih).T + b_ih
            b = r(h) @ r(w_hh).T + b_hh
            if module.mode == "LSTM":
                i, f, g, o = (a + b).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                if w_hr is not None:
                    h = r(h) @ r(w_hr).T
            elif module.mode == "GRU":
                (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
                n, z = (an + (ar + br).sigmoid() * bn).tanh(), (az + bz).sigmoid()
                h = (1 - z) * n + z * h
            else:
                h = (a + b).relu() if module.mode == "RNN_RELU" else (a + b).tanh()
            outputs.append(h)
        x = torch.stack(outputs)
        finals.append((h, c))
    return x, torch.stack([h for h, _ in finals]), torch.stack([c for _, c in finals])
