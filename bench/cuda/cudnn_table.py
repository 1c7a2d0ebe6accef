"""Time torch.nn's LSTM, GRU and RNN on a GPU, which is cuDNN: the baseline. Needs torch alone.

    python -m bench.cuda.cudnn_table --out FOLDER
    python -m bench.cuda.cudnn_table --out FOLDER --seconds 0.1 --total 120 --cells lstm

Writes cudnn.md and cudnn.json; what has been measured is there also where it is stopped early.
Exit code: 0; 1 where a case failed; 2 where there is no GPU. float32 is float32, not TF32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bench.machine import commit
from bench.shapes import CELLS

from .cases import DTYPES, MODES, Case, all_cases
from .timing import Clock, Events, Timing, measure

MODULES = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
SAVE_SECONDS = 5.0  # between two writings of the files
SAME_FAILURES = 8  # in a row: the device is gone

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    case: Case
    timing: Timing | None
    error: str = ""

    def step_microseconds(self) -> float | None:
        """Of a time step, whatever is done in it: all layers and directions, backward too."""
        return self.timing and self.timing.seconds / self.case.shape.steps * 1e6


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


def make_call(case: Case, device: str) -> Call:
    """A call of torch.nn, checked once for results that are not finite."""
    torch.manual_seed(0)
    kind, layers, train = MODULES[case.cell], case.layers, case.mode == "training"
    module = kind(
        case.shape.input_size,
        case.shape.hidden_size,
        num_layers=layers.count,
        bidirectional=layers.bidirectional,
    ).to(device, getattr(torch, case.dtype))
    module.flatten_parameters()
    x = make_input(case, device, train)

    def values(output: Tensor | PackedSequence) -> Tensor:
        return output.data if isinstance(output, PackedSequence) else output

    def forward() -> Tensor:
        with torch.no_grad():
            return values(module(x)[0])

    output = forward()
    if not output.isfinite().all():
        raise ValueError("results that are not finite")
    if not train:
        return graphed(forward) if case.mode == "graph" else forward
    gradient = torch.randn_like(output)
    leaves = [values(x), *module.parameters()]

    def training() -> None:
        for leaf in leaves:
            leaf.grad = None
        values(module(x)[0]).backward(gradient)

    training()
    if not all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves):
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

    def replay(kept: object = kept) -> None:  # the result's memory is the graph's
        graph.replay()

    return replay


def run(
    cases: Iterable[Case],
    clock: Clock,
    device: str,
    seconds: float,
    total: float,
    done: Callable[[Row], None],
) -> None:
    """Measure the cases in their order, and tell `done` of each, until `total` seconds are over."""
    end = time.monotonic() + total
    failures = 0
    for case in cases:
        if time.monotonic() > end or failures == SAME_FAILURES:
            return
        try:
            done(Row(case, measure(make_call(case, device), clock, seconds)))
            failures = 0
        except (RuntimeError, ValueError) as error:
            done(Row(case, None, str(error).strip().split("\n")[0]))
            failures += 1


# ---- the files ----------------------------------------------------------------------------------


def header() -> dict[str, str]:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        driver = found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    gpu = torch.cuda.get_device_properties(0)
    lines = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": f"{gpu.name}, {gpu.multi_processor_count} SMs, {gpu.total_memory / 2**30:.0f} GiB",
        "driver": driver,
        "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}, Python {platform.python_version()}",
        "float32": "TF32 off: cuDNN and products",
        "commit": commit() or "",
    }
    return {key: value for key, value in lines.items() if value}


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
            cells = [figure(found.get(column)) for column in columns]
            lines.append("| " + " | ".join([shape, *cells]) + " |")
        lines.append("")
    failed = [row for row in rows if row.error]
    if failed:
        lines += ["Failed:", "", *(f"- {row.case}: {row.error}" for row in failed), ""]
    return "\n".join(lines)


def figure(row: Row | None) -> str:
    if row is None:
        return "-"
    step = row.step_microseconds()
    return "failed" if step is None else f"{step:.3g}" if step < 100 else f"{step:.0f}"


def save(header: dict[str, str], rows: list[Row], out: Path) -> None:
    """cudnn.md and cudnn.json under `out`; neither is ever there in half."""
    records = []
    for row in rows:
        case = asdict(row.case) | {"shape": str(row.case.shape)}
        timing = asdict(row.timing) if row.timing else {"error": row.error}
        records.append(case | timing | {"us_per_step": row.step_microseconds()})
    texts = {
        "cudnn.json": json.dumps({"header": header, "results": records}, indent=1),
        "cudnn.md": markdown(header, rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        part = out / f"{name}.part"
        part.write_text(text)
        os.replace(part, out / name)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.cuda.cudnn_table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder of the files written")
    parser.add_argument("--seconds", type=float, default=0.15, help="bound on each case's timing")
    parser.add_argument("--total", type=float, default=240.0, help="bound on all of it, seconds")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args(argv)
    if args.seconds <= 0 or args.total <= 0:
        parser.error("--seconds and --total must be positive")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if not torch.cuda.is_available():
        print("cudnn_table: there is no GPU here that torch can use: nothing measured")
        return 2
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[Row] = []
    top, saved = header(), time.monotonic()

    def done(row: Row) -> None:
        nonlocal saved
        rows.append(row)
        print(f"{row.case}: {row.error or figure(row) + ' us/step'}", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            save(top, rows, args.out)
            saved = time.monotonic()

    # what `timeout` sends: leave by way of `finally`
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = [c for c in all_cases() if c.cell in args.cells and c.dtype in args.dtypes]
    try:
        run(wanted, Events(), "cuda", args.seconds, args.total, done)
    finally:
        save(top, rows, args.out)
        print(f"{len(rows)} of {len(wanted)} cases; cudnn.md and cudnn.json under {args.out}")
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
