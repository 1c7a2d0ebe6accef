"""The equations of every layer, and their back-propagation through time, in plain torch.

This file is meant to be read, and is what the kernels are tested against. It knows nothing of the
compiled extension. Both entry points are written with out-of-place torch operations only, without a
Python branch on a tensor's value, so that autograd, forward-mode AD and ``torch.func``
differentiate them to any order; ``fusedrnn._layer`` falls back on them wherever no kernel has
that derivative.

Sources: LSTM, Hochreiter & Schmidhuber 1997 with the forget gate of Gers, Schmidhuber & Cummins
2000, without peepholes; its projection, Sak, Senior & Beaufays 2014; GRU, Cho et al. 2014 in the
form that cuDNN and torch.nn compute (the reset gate applied after the recurrent product); RNN,
Elman 1990; back-propagation through time, Werbos 1990.

Sizes used throughout: T steps, B rows, I input features, H hidden units, P = projection size or H,
D directions (1 or 2), N rows of packed data. ``mode`` is one of ``"LSTM"``, ``"GRU"``,
``"RNN_TANH"``, ``"RNN_RELU"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GATES", "layer_backward", "layer_forward"]

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""How many blocks of H rows the weights of each mode hold."""


class Weights(NamedTuple):
    """One direction's parameters: w_ih (G*H, I), w_hh (G*H, P), b_* (G*H,), w_hr (P, H)."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


class Step(NamedTuple):
    """What one time step leaves behind for its backward; every tensor is (B, ...)."""

    h_prev: Tensor
    c_prev: Tensor | None
    gates: tuple[Tensor, ...]
    h: Tensor
    c: Tensor | None


def layer_forward(
    mode: str,
    x: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, all its directions.

    Args:
        x: (T, B, I), or (N, I) in PackedSequence's layout where ``batch_sizes`` is given.
        lengths: int64 (B,), valid steps of each row; steps beyond are never read.
        batch_sizes: int64 (T,) on the CPU, rows alive at each step, never increasing.
        reset: bool (T, B); where true the state that enters the step is zero. The reverse direction
            is cut at the same boundaries: its step t starts from zero where ``reset[t + 1]`` holds
            and t + 1 is a valid step.
        h0, c0: (D, B, P) and, for LSTM, (D, B, H); zeros where None.
        params: per direction w_ih, w_hh, then b_ih, b_hh if ``has_biases``, then w_hr if projected.

    Returns:
        y (T, B, D*P) or (N, D*P); h_n (D, B, P); c_n (D, B, H), or (0,) where there is no cell
        state. All in x's dtype; bfloat16 and float16 are computed in float32, as the kernels do.
    """
    dtype = x.dtype
    x, h0, c0, *params = _widen([x, h0, c0, *params])
    packing = None if batch_sizes is None else _Packing(batch_sizes, x.device)
    if packing is not None:
        x, lengths = packing.unpack(x), packing.lengths
    directions = _directions(params, has_biases, bidirectional)
    runs = [
        _run_direction(mode, x, lengths, reset, h0, c0, weights, d)
        for d, weights in enumerate(directions)
    ]
    y = torch.cat([run.y for run in runs], dim=-1)
    if packing is not None:
        y = packing.pack(y)
    h_n = torch.stack([run.h_n for run in runs])
    c_n = torch.stack([run.c_n for run in runs]) if mode == "LSTM" else x.new_zeros(0)
    return y.to(dtype), h_n.to(dtype), c_n.to(dtype)


def layer_backward(
    mode: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of :func:`layer_forward`, by back-propagation through time written out by hand.

    Nothing saved is needed: the forward pass is run again. ``dy``, ``dh_n``, ``dc_n`` have the
    shapes of y, h_n, c_n; None stands for zeros.

    Returns:
        dx like x; dh0 (D, B, P); dc0 (D, B, H), (0,) unless LSTM; dparams like ``params``.
    """
    dtype = x.dtype
    dy, dh_n, dc_n, x, h0, c0, *params = _widen([dy, dh_n, dc_n, x, h0, c0, *params])
    packing = None if batch_sizes is None else _Packing(batch_sizes, x.device)
    if packing is not None:
        x, lengths = packing.unpack(x), packing.lengths
        dy = None if dy is None else packing.unpack(dy)
    directions = _directions(params, has_biases, bidirectional)
    dys = [None] * len(directions) if dy is None else dy.chunk(len(directions), dim=-1)
    dxs, dh0s, dc0s, dparams = [], [], [], []
    for d, weights in enumerate(directions):
        run = _run_direction(mode, x, lengths, reset, h0, c0, weights, d)
        dh = None if dh_n is None else dh_n[d]
        dc = None if dc_n is None else dc_n[d]
        dx, dh, dc, dweights = _bptt(mode, run, dys[d], dh, dc, weights)
        dxs.append(dx)
        dh0s.append(dh)
        dc0s.append(dc)
        dparams.extend(dw.to(dtype) for dw in dweights)
    dx = sum(dxs[1:], start=dxs[0])
    if packing is not None:
        dx = packing.pack(dx)
    dc0 = torch.stack(dc0s) if mode == "LSTM" else x.new_zeros(0)
    return dx.to(dtype), torch.stack(dh0s).to(dtype), dc0.to(dtype), dparams


class _Run(NamedTuple):
    """One direction's forward pass: masked input, masks, steps by time, and results."""

    x: Tensor
    valid: Tensor | None
    enters: Tensor | None
    order: range
    steps: list[Step]
    y: Tensor
    h_n: Tensor
    c_n: Tensor | None


def _run_direction(
    mode: str,
    x: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Weights,
    direction: int,
) -> _Run:
    num_steps, batch, _ = x.shape
    hidden_size = weights.w_hh.shape[0] // GATES[mode]
    h = x.new_zeros(batch, weights.w_hh.shape[1]) if h0 is None else h0[direction]
    c = None
    if mode == "LSTM":
        c = x.new_zeros(batch, hidden_size) if c0 is None else c0[direction]
    valid, enters = _masks(x, lengths, reset, reverse=direction == 1)
    # Padding is replaced before any product: 0 * NaN would reach the weights' gradient.
    x = _where(valid, x, 0.0)
    x_gates = x @ weights.w_ih.mT
    if weights.b_ih is not None:
        x_gates = x_gates + weights.b_ih
    order = range(num_steps - 1, -1, -1) if direction == 1 else range(num_steps)
    steps: dict[int, Step] = {}
    for t in order:
        keep = None if enters is None else enters[t]
        h_prev, c_prev = _where(keep, h, 0.0), None if c is None else _where(keep, c, 0.0)
        step = _step(mode, x_gates[t], h_prev, c_prev, weights)
        alive = None if valid is None else valid[t]
        h = _where(alive, step.h, h)
        c = None if c is None else _where(alive, step.c, c)
        steps[t] = step
    y = _where(valid, torch.stack([steps[t].h for t in range(num_steps)]), 0.0)
    return _Run(x, valid, enters, order, [steps[t] for t in range(num_steps)], y, h, c)


def _masks(
    x: Tensor, lengths: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(T, B, 1) masks: the valid steps, and those into which the running state enters."""
    valid = None
    if lengths is not None:
        steps = torch.arange(x.shape[0], device=x.device)
        valid = (steps.unsqueeze(1) < lengths.to(x.device)).unsqueeze(-1)
    if reset is None:
        return valid, valid
    cut = reset.unsqueeze(-1)
    if reverse:
        # Step t continues from step t + 1, unless a segment starts there. Beyond the last valid
        # step lies only padding, so nothing is cut there and the state is still hx.
        cut = cut if valid is None else cut & valid
        cut = torch.cat([cut[1:], torch.zeros_like(cut[:1])])
    return valid, ~cut if valid is None else valid & ~cut


def _step(mode: str, x_gates: Tensor, h: Tensor, c: Tensor | None, weights: Weights) -> Step:
    """One step from the projected input (B, G*H) and the state: the equations themselves."""
    h_gates = h @ weights.w_hh.mT
    if weights.b_hh is not None:
        h_gates = h_gates + weights.b_hh
    if mode == "LSTM":
        assert c is not None
        i, f, g, o = (x_gates + h_gates).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_new = f * c + i * g
        h_new = o * c_new.tanh()
        if weights.w_hr is not None:
            h_new = h_new @ weights.w_hr.mT
        return Step(h, c, (i, f, g, o), h_new, c_new)
    if mode == "GRU":
        xr, xz, xn = x_gates.chunk(3, dim=-1)
        hr, hz, hn = h_gates.chunk(3, dim=-1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * hn).tanh()
        return Step(h, None, (r, z, n, hn), (1 - z) * n + z * h, None)
    pre = x_gates + h_gates
    return Step(h, None, (), pre.tanh() if mode == "RNN_TANH" else pre.relu(), None)


def _bptt(
    mode: str,
    run: _Run,
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    weights: Weights,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Walk one direction's steps backwards; returns dx, dh0, dc0 and the weights' gradients."""
    first = run.steps[0]
    dh = torch.zeros_like(first.h) if dh is None else dh
    if first.c is not None and dc is None:
        dc = torch.zeros_like(first.c)
    per_step: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
    for t in reversed(run.order):
        alive = None if run.valid is None else run.valid[t]
        keep = None if run.enters is None else run.enters[t]
        # A row that is past its end hands its state, hence its gradient, on unchanged.
        dh_step = _where(alive, dh if dy is None else dh + dy[t], 0.0)
        dc_step = None if dc is None else _where(alive, dc, 0.0)
        dx_gates, dh_gates, dh_prev, dc_prev = _step_backward(
            mode, run.steps[t], dh_step, dc_step, weights
        )
        per_step[t] = (dx_gates, dh_gates, dh_step)
        dh_prev = _where(keep, dh_prev, 0.0)
        dh = dh_prev if alive is None else torch.where(alive, dh_prev, dh)
        if dc is not None:
            dc_prev = _where(keep, dc_prev, 0.0)
            dc = dc_prev if alive is None else torch.where(alive, dc_prev, dc)
    steps = range(len(run.steps))
    dx_gates = torch.stack([per_step[t][0] for t in steps])
    dh_gates = torch.stack([per_step[t][1] for t in steps])
    h_prev = torch.stack([step.h_prev for step in run.steps])
    dweights = [_outer(dx_gates, run.x), _outer(dh_gates, h_prev)]
    if weights.b_ih is not None:
        dweights += [dx_gates.sum((0, 1)), dh_gates.sum((0, 1))]
    if weights.w_hr is not None:
        hidden = torch.stack([step.gates[3] * step.c.tanh() for step in run.steps])
        dweights.append(_outer(torch.stack([per_step[t][2] for t in steps]), hidden))
    return dx_gates @ weights.w_ih, dh, dc, dweights


def _step_backward(
    mode: str, step: Step, dh: Tensor, dc: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of one step: of the two gate sums (B, G*H), of h_prev and of c_prev."""
    if mode == "LSTM":
        assert step.c is not None and step.c_prev is not None and dc is not None
        i, f, g, o = step.gates
        if weights.w_hr is not None:
            dh = dh @ weights.w_hr
        tanh_c = step.c.tanh()
        do = dh * tanh_c
        dc = dc + dh * o * (1 - tanh_c * tanh_c)
        di, df, dg = dc * g, dc * step.c_prev, dc * i
        dgates = torch.cat(
            [di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)], dim=-1
        )
        return dgates, dgates, dgates @ weights.w_hh, dc * f
    if mode == "GRU":
        r, z, n, hn = step.gates
        dn = dh * (1 - z) * (1 - n * n)
        dz = dh * (step.h_prev - n) * z * (1 - z)
        dr = dn * hn * r * (1 - r)
        dh_gates = torch.cat([dr, dz, dn * r], dim=-1)
        dh_prev = dh * z + dh_gates @ weights.w_hh
        return torch.cat([dr, dz, dn], dim=-1), dh_gates, dh_prev, None
    slope = 1 - step.h * step.h if mode == "RNN_TANH" else (step.h > 0).to(step.h.dtype)
    dgates = dh * slope
    return dgates, dgates, dgates @ weights.w_hh, None


class _Packing:
    """PackedSequence's layout: step t's rows 0 .. batch_sizes[t]-1 follow those of step t-1."""

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        sizes = batch_sizes.tolist()
        self.steps, self.batch = len(sizes), sizes[0]
        rows = torch.arange(self.batch, device=batch_sizes.device)
        alive = rows < batch_sizes.unsqueeze(1)
        starts = (batch_sizes.cumsum(0) - batch_sizes).unsqueeze(1)
        self.lengths = alive.sum(0).to(device)
        # Dead places point at row 0; the lengths keep them from being used.
        self._source = torch.where(alive, starts + rows, 0).reshape(-1).to(device)
        self._alive = alive.reshape(-1).nonzero().squeeze(1).to(device)

    def unpack(self, data: Tensor) -> Tensor:
        """(N, F) to (T, B, F)."""
        return data.index_select(0, self._source).reshape(self.steps, self.batch, data.shape[1])

    def pack(self, dense: Tensor) -> Tensor:
        """(T, B, F) to (N, F)."""
        rows = dense.reshape(self.steps * self.batch, dense.shape[2])
        return rows.index_select(0, self._alive)


def _directions(params: Sequence[Tensor], has_biases: bool, bidirectional: bool) -> list[Weights]:
    count = len(params) // (2 if bidirectional else 1)
    directions = []
    for start in range(0, len(params), count):
        w_ih, w_hh, *rest = params[start : start + count]
        b_ih, b_hh = rest[:2] if has_biases else (None, None)
        w_hr = rest[-1] if count in (3, 5) else None
        directions.append(Weights(w_ih, w_hh, b_ih, b_hh, w_hr))
    return directions


def _widen(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Half-precision tensors as float32; all others, and None, as they are."""
    halves = (torch.bfloat16, torch.float16)
    return [t.float() if t is not None and t.dtype in halves else t for t in tensors]


def _where(mask: Tensor | None, value: Tensor, other: Tensor | float) -> Tensor:
    return value if mask is None else torch.where(mask, value, other)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    """The sum over steps and rows of outer products: (T, B, M), (T, B, N) -> (M, N)."""
    count = rows.shape[0] * rows.shape[1]
    return rows.reshape(count, rows.shape[2]).t() @ columns.reshape(count, columns.shape[2])
