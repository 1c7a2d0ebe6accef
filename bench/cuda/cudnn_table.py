"""Time torch.nn's LSTM, GRU and RNN on a GPU, which is cuDNN: the baseline. Needs torch alone.

    python -m bench.cuda.cudnn_table --out FOLDER
    python -m bench.cuda.cudnn_table --out FOLDER --seconds 0.1 --total 120 --cells lstm

Writes cudnn.md and cudnn.json; what has been measured is there also where it is stopped early.
Exit code: 0; 1 where a case failed; 2 where there is no GPU. float32 is float32, not TF32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from . import program
from .cases import DTYPES, MODES, Case
from .timing import Clock, Events, Timing, measure

MODULES = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
Call = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Row:
    case: Case
    timing: Timing | None
    error: str = ""

    def step_microseconds(self) -> float | None:
        """Of a time step, whatever is done in it: all layers and directions, backward too."""
        return self.timing and self.timing.seconds / self.case.shape.steps * 1e6

    def figure(self, unit: str = " us/step") -> str:
        step = self.step_microseconds()
        return "failed" if step is None else f"{three_digits(step)}{unit}"

    def record(self) -> dict[str, Any]:
        case = asdict(self.case) | {"shape": str(self.case.shape)}
        timing = asdict(self.timing) if self.timing else {"error": self.error}
        return case | timing | {"us_per_step": self.step_microseconds()}


def three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


# ---- what is timed ------------------------------------------------------------------------------


def make_input(case: Case, device: str, grad: bool) -> Tensor | PackedSequence:
    batch, steps, inputs, _ = case.shape
    x = torch.randn(steps, batch, inputs, device=device).to(getattr(torch, case.dtype))
    x.requires_grad_(grad)
    if not case.layers.packed:
        return x
    lengths = torch.linspace(1, steps, batch).round().long().flip(0)
    packed = pack_padded_sequence(x.detach(), lengths)
    packed.data.requires_grad_(grad)
    return packed


def flatten(module: nn.RNNBase) -> None:
    """The weights in one piece, as cuDNN wants them. torch 2.11 and 2.13 do not flatten bfloat16
    ones, though cuDNN takes them, and copy all weights at every call."""
    torch.backends.cudnn.CUDNN_TENSOR_DTYPES.add(torch.bfloat16)
    module.flatten_parameters()


def make_call(
    case: Case, device: str, change: Callable[[nn.Module], nn.Module] = lambda module: module
) -> Call:
    """A call of torch.nn, or of what `change` makes of it; checked once for results that are not
    finite. It returns the output, and in training all gradients."""
    torch.manual_seed(0)
    kind, layers, train = MODULES[case.cell], case.layers, case.mode == "training"
    plain = kind(
        case.shape.input_size,
        case.shape.hidden_size,
        num_layers=layers.count,
        bidirectional=layers.bidirectional,
    ).to(device, getattr(torch, case.dtype))
    flatten(plain)
    module = change(plain).train(train)  # cuDNN keeps nothing for backward in eval()
    x = make_input(case, device, train)

    def values(output: Tensor | PackedSequence) -> Tensor:
        return output.data if isinstance(output, PackedSequence) else output

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [values(module(x)[0])]

    output = forward()[0]
    if not output.isfinite().all():
        raise ValueError("results that are not finite")
    if not train:
        return graphed(forward) if case.mode == "graph" else forward
    gradient = torch.randn_like(output)
    leaves = [values(x), *module.parameters()]

    def training() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        output = values(module(x)[0])
        output.backward(gradient)
        return [output, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    results = training()
    if len(results) != 1 + len(leaves) or not all(r.isfinite().all() for r in results):
        raise ValueError("gradients that are missing or not finite")
    return training


def graphed(call: Call) -> Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> list[Tensor]:
        graph.replay()
        return kept

    return replay


# ---- the table ----------------------------------------------------------------------------------


def markdown(header: dict[str, str], rows: list[Row]) -> str:
    """A table for each cell and stack, a line a shape."""
    lines = ["# torch.nn on a GPU (cuDNN)", "", *(f"- {k}: {v}" for k, v in header.items()), ""]
    lines += [
        "Microseconds a time step, all layers and directions together: the time of a call / T,",
        "medians of CUDA events around many calls. forward: inference; graph: the same replayed",
        "from a CUDA graph; training: forward and backward to the input and all weights.",
        "",
    ]
    groups: dict[tuple[str, str], dict[str, dict[tuple[str, str], Row]]] = {}
    for row in rows:
        table = groups.setdefault((row.case.cell, str(row.case.layers)), {})
        table.setdefault(str(row.case.shape), {})[row.case.dtype, row.case.mode] = row
    columns = [(dtype, mode) for dtype in DTYPES for mode in MODES]
    for (cell, layers), table in groups.items():
        lines += [f"## {cell.upper()}, {layers}", ""]
        lines.append("| B,T,I,H | " + " | ".join(f"{d} {m}" for d, m in columns) + " |")
        lines.append("|:--" + "|--:" * len(columns) + "|")
        for shape, found in table.items():
            cells = [found[c].figure("") if c in found else "-" for c in columns]
            lines.append("| " + " | ".join([shape, *cells]) + " |")
        lines.append("")
    return "\n".join([*lines, *program.failures(rows)])


def table(clock: Clock, device: str = "cuda") -> program.Program[Row]:
    return program.Program(
        name="cudnn_table",
        stem="cudnn",
        doc=__doc__ or "",
        measure=lambda case, seconds: Row(case, measure(make_call(case, device), clock, seconds)),
        failed=lambda case, error: Row(case, None, error),
        markdown=markdown,
    )


if __name__ == "__main__":
    sys.exit(program.main(table(Events())))
