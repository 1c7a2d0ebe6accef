"""The contestants: layers, cells, stacks, rows of different length, bfloat16, streams.

Each is a call without arguments, and its results have been compared with torch.nn's in float64
before it is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

from .peers import FUSED, TOLERANCE, TORCH, check, make_input, runtime_calls
from .shapes import Shape
from .timing import Call

DENSE = "fusedrnn, no lengths"
PACKED = "torch.nn, packed"
FLOAT32 = "fusedrnn, float32"
TORCH_HALF = "torch.nn, bfloat16"
NOTHING = "a call that computes nothing"
KEPT = "fusedrnn, gates kept"

LAYER = "fusedrnn, layer"

# bfloat16 has 8 bits: results in (-1, 1) are rounded by 2^-9 at every step.
HALF_TOLERANCE = 0.05

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}

# Runs a module: its results, the first of which takes the gradient in training.
Run = Callable[[nn.Module], Sequence[Tensor]]


def module_of(cell: str, shape: Shape, **options: Any) -> nn.RNNBase:
    torch.manual_seed(0)
    return LAYERS[cell](shape.input_size, shape.hidden_size, **options)


def flat(results: Sequence[Tensor]) -> list[Tensor]:
    return [torch.as_tensor(r).detach().double().flatten() for r in results]


def copied(module: nn.Module, fused: bool = True, dtype: torch.dtype | None = None) -> nn.Module:
    """Its own weights, so that nobody finds another's gradients; in dtype, unless None."""
    module = copy.deepcopy(module).to(dtype)
    return fusedrnn.convert(module) if fused else module


def inference(module: nn.Module, run: Run) -> Call:
    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            return run(module)

    return call


def step(module: nn.Module, run: Run, inputs: Sequence[Tensor]) -> Call:
    """Forward, and backward to all parameters and `inputs`, from a random gradient."""
    seed = torch.Generator().manual_seed(2)
    shape = run(module)[0].shape
    gradient = torch.randn(shape, generator=seed).to(next(module.parameters()).dtype)
    leaves = [*(x for x in inputs if x.requires_grad), *module.parameters()]

    def call() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        output = run(module)[0]
        output.backward(gradient)
        return [output, *(leaf.grad for leaf in leaves)]

    return call


def checked(
    what: str, calls: dict[str, Call], expected: Call, tolerance: float = TOLERANCE
) -> dict[str, Call]:
    right = flat(expected())
    for name, call in calls.items():
        check(f"{name}, {what}", flat(call()), right, tolerance)
    return calls


def leaf(shape: Sequence[int], seed: int, dtype: torch.dtype, grad: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)


# ---- cells: one step ----------------------------------------------------------------------------


class Nothing(nn.Module):
    """A cell's parameters, of one element each, joined with its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
        for i, parameter in enumerate(self.joined):
            self.register_parameter(f"p{i}", parameter)

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat([*inputs, *self.joined])


def least_call(cell: str, train: bool) -> Call:
    """A call, and a backward pass to as many leaves, in which nothing is computed."""
    inputs = [torch.zeros(1, requires_grad=train) for _ in range(3 if cell == "lstm" else 2)]
    run = lambda m: (m(*inputs),)  # noqa: E731
    return step(Nothing(), run, inputs) if train else inference(Nothing(), run)


def cell_calls(cell: str, shape: Shape, train: bool) -> dict[str, Call]:
    """torch.nn's and fusedrnn's steps, and what such a call costs whoever computes."""
    torch.manual_seed(0)
    module = CELLS[cell](shape.input_size, shape.hidden_size)

    def contestant(module: nn.Module) -> Call:
        dtype = next(module.parameters()).dtype
        x = leaf((shape.batch, shape.input_size), 1, dtype, train)
        h, c = (leaf((shape.batch, shape.hidden_size), seed, dtype, train) for seed in (3, 4))
        state = (h, c) if cell == "lstm" else h
        inputs = [x, h, c] if cell == "lstm" else [x, h]

        def run(m: nn.Module) -> Sequence[Tensor]:
            result = m(x, state)
            return result if cell == "lstm" else (result,)

        return step(module, run, inputs) if train else inference(module, run)

    calls = {TORCH: contestant(copied(module, False)), FUSED: contestant(copied(module))}
    exact = contestant(copied(module, False, torch.float64))
    return checked(f"{cell} cell {shape}", calls, exact) | {NOTHING: least_call(cell, train)}


# ---- layers -------------------------------------------------------------------------------------


def layer_call(
    module: nn.Module,
    shape: Shape,
    train: bool,
    lengths: Tensor | None = None,
    packed: bool = False,
) -> Call:
    """The module over its input: as it is, with `lengths`, or packed as torch.nn wants them."""
    dtype = next(module.parameters()).dtype
    x = make_input(shape).to(dtype).requires_grad_(train)

    def run(m: nn.Module) -> Sequence[Tensor]:
        if packed:
            data = pack_padded_sequence(x, lengths, enforce_sorted=False)
            output, state = m(data)
            output = pad_packed_sequence(output, total_length=shape.steps)[0]
        elif lengths is not None:
            output, state = m(x, lengths=lengths)
        else:
            output, state = m(x)
        return [output, *(state if isinstance(state, tuple) else [state])]

    return step(module, run, [x]) if train else inference(module, run)


def both_calls(
    what: str,
    module: nn.RNNBase,
    shape: Shape,
    train: bool,
    others: Mapping[str, Call] | None = None,
) -> dict[str, Call]:
    """torch.nn's and fusedrnn's calls over a layer, and others', checked."""
    calls = {
        TORCH: layer_call(copied(module, False), shape, train),
        FUSED: layer_call(copied(module), shape, train),
        **(others or {}),
    }
    exact = layer_call(copied(module, False, torch.float64), shape, train)
    return checked(f"{what} {shape}", calls, exact)


def forward_calls(cell: str, shape: Shape, peers: Sequence[str], threads: int) -> dict[str, Call]:
    module = module_of(cell, shape)
    others = runtime_calls(cell, module, make_input(shape), peers, threads)
    return both_calls(f"{cell} forward", module, shape, False, others)


def training_calls(cell: str, shape: Shape) -> dict[str, Call]:
    return both_calls(f"{cell} training", module_of(cell, shape), shape, True)


def bidirectional_training(cell: str, shape: Shape) -> dict[str, Call]:
    module = module_of(cell, shape, num_layers=2, bidirectional=True)
    return both_calls(f"bidirectional {cell}", module, shape, True)


def ragged_calls(cell: str, shape: Shape, train: bool, uniform: bool) -> dict[str, Call]:
    module = module_of(cell, shape)
    if uniform:  # one row of every length there is, as evenly as can be
        lengths = torch.linspace(1, shape.steps, shape.batch).round().long()
        lengths = lengths[torch.randperm(shape.batch)]
    else:
        lengths = torch.full((shape.batch,), shape.steps)
    calls = {FUSED: layer_call(copied(module), shape, train, lengths)}
    if uniform:
        calls[PACKED] = layer_call(copied(module, False), shape, train, lengths, packed=True)
    exact = layer_call(copied(module, False, torch.float64), shape, train, lengths, packed=True)
    checked(f"ragged {cell} {shape}", calls, exact)
    return calls | {DENSE: layer_call(copied(module), shape, train)}


def half_calls(cell: str, shape: Shape, train: bool) -> dict[str, Call]:
    module = module_of(cell, shape)
    calls = {
        FUSED: layer_call(copied(module, True, torch.bfloat16), shape, train),
        TORCH_HALF: layer_call(copied(module, False, torch.bfloat16), shape, train),
        FLOAT32: layer_call(copied(module), shape, train),
    }
    exact = layer_call(copied(module, False, torch.float64), shape, train)
    return checked(f"bfloat16 {cell} {shape}", calls, exact, HALF_TOLERANCE)


def recompute_calls(cell: str, shape: Shape) -> dict[str, Call]:
    module = module_of(cell, shape)
    again = copied(module)
    again.recompute = True
    calls = {
        FUSED: layer_call(again, shape, True),
        KEPT: layer_call(copied(module), shape, True),
    }
    exact = layer_call(copied(module, False, torch.float64), shape, True)
    return checked(f"recompute {cell} {shape}", calls, exact)


# ---- streams ------------------------------------------------------------------------------------


def stream_step(cell: str, shape: Shape, peers: Sequence[str], threads: int) -> dict[str, Call]:
    """One step after another. The state that each keeps, or does not, costs all of them little."""
    module = module_of(cell, shape)
    x = make_input(shape)
    stream = fusedrnn.Stream(copied(module), batch_size=shape.batch)

    def first_step() -> Sequence[Tensor]:
        stream.reset()
        return [stream.step(x[0])]

    def alone(call: Call) -> Call:
        return lambda: [torch.as_tensor(call()[0]).reshape(shape.steps, shape.batch, -1)[0]]

    torch_call = layer_call(copied(module, False), shape, False)
    peer_calls = {TORCH: torch_call, LAYER: layer_call(copied(module), shape, False)}
    peer_calls |= runtime_calls(cell, module, x, [p for p in peers if p == "onnxruntime"], threads)
    exact = alone(layer_call(copied(module, False, torch.float64), shape, False))
    checked(f"stream {cell} {shape}", {n: alone(c) for n, c in peer_calls.items()}, exact)
    checked(f"stream {cell} {shape}", {FUSED: first_step}, exact)
    step = x[0]
    return {FUSED: lambda: stream.step(step), **peer_calls}


def stream_narrow(cell: str, shape: Shape, weights: torch.dtype) -> dict[str, Call]:
    """A run with narrow weights against our own float32 layer."""
    module = module_of(cell, shape)
    x = make_input(shape)
    stream = fusedrnn.Stream(copied(module), weights=weights, batch_size=shape.batch)

    def from_zeros() -> Sequence[Tensor]:
        stream.reset()
        return [stream.run(x)]

    layer = layer_call(copied(module), shape, False)
    calls = {FUSED: from_zeros, FLOAT32: lambda: layer()[:1]}
    exact = layer_call(copied(module, False, torch.float64), shape, False)
    return checked(f"stream {cell} {shape}", calls, lambda: exact()[:1], HALF_TOLERANCE)
