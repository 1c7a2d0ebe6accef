"""Time fusedrnn against torch.nn (cuDNN) on a GPU, in turns, with the same weights.

    python -m bench.cuda.compare --out FOLDER
    python -m bench.cuda.compare --out FOLDER --seconds 0.2 --total 240 --cells gru

Writes cuda.md and cuda.json; what has been measured is there also where it is stopped early. A
ratio is torch.nn's time / fusedrnn's: the median over rounds in which each had its turn. fusedrnn
chooses how it runs the recurrence; the other ways that can run a case are timed beside it.
Exit code: 0; 1 where a case failed or fusedrnn's results are far from torch.nn's; 2 where there is
no GPU, or fusedrnn was built without its CUDA half. float32 is float32, not TF32, on both sides.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import fusedrnn
from bench.peers import FUSED, TORCH
from bench.report import geometric_mean
from fusedrnn._ops import _C

from . import program
from .cases import DTYPES, MODES, Case
from .cudnn_table import Call, make_call, three_digits
from .small_run import far
from .timing import Clock, Events, in_turns

VARIABLE = "FUSEDRNN_CUDA_STRATEGY"
STRATEGIES = ("per_step", "one_cta", "persistent")
# Of the largest value; sums of many steps in half precision differ by some roundings.
TOLERANCES = {"float32": 1e-3, "bfloat16": 6e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Row:
    case: Case
    seconds: dict[str, float]  # a call, the median over the rounds, by contestant; empty: failed
    ratio: float | None = None  # of fusedrnn by its own choice; None: failed
    rounds: int = 0
    forced: dict[str, float] = field(default_factory=dict)  # ratios, by strategy
    error: str = ""  # of the case, or of those that were left out of it

    def step_microseconds(self, name: str) -> str:
        return three_digits(self.seconds[name] / self.case.shape.steps * 1e6)

    def figure(self) -> str:
        if not self.seconds:
            return "failed"
        if self.ratio is None:
            return f"{self.step_microseconds(TORCH)} us/step{self.others(', ')}"
        times = " against ".join(self.step_microseconds(name) for name in (TORCH, FUSED))
        return f"{times} us/step, {self.ratio:.2f}{self.others(', ')}"

    def others(self, before: str = "") -> str:
        found = [
            f"{name} {self.step_microseconds(name)}, {ratio:.2f}"
            for name, ratio in self.forced.items()
        ]
        return before * bool(found) + "; ".join(found)

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"case": asdict(self.case) | {"shape": str(self.case.shape)}}


@contextmanager
def strategy(name: str | None) -> Iterator[None]:
    """Force a strategy; None: as the caller of this program has it."""
    before = os.environ.get(VARIABLE)
    if name is not None:
        os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if name is not None:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def turn_of(name: str) -> AbstractContextManager[None]:
    """What a contestant's calls are made in."""
    return strategy(name if name in STRATEGIES else None)


def other_strategies(case: Case) -> list[str]:
    """What could run the case, but is not chosen for it."""
    net = getattr(fusedrnn, case.cell.upper())(1, case.shape.hidden_size)
    dtype = getattr(torch, case.dtype)
    chosen, others = fusedrnn.cuda_strategy(net, dtype), []
    for name in STRATEGIES:
        with strategy(name):
            try:
                runs = fusedrnn.cuda_strategy(net, dtype)
            except ValueError:  # it cannot
                continue
        if runs != chosen:
            others.append(name)
    return others


def contestants(case: Case, device: str) -> tuple[dict[str, Call], str]:
    """Both libraries' calls, the results of which have been compared; and why others were left
    out. Each is to be made in its turn_of."""
    calls, left_out = {TORCH: make_call(case, device)}, []
    theirs = calls[TORCH]()
    for name in (FUSED, *other_strategies(case)):
        try:
            with turn_of(name):
                call = make_call(case, device, fusedrnn.convert)
                results = call()
        except (RuntimeError, ValueError) as error:
            left_out.append(f"{name}: {program.first_line(error)}")
            continue
        wrong = [
            i
            for i, (found, expected) in enumerate(zip(results, theirs, strict=True))
            if far(found, expected, TOLERANCES[case.dtype])
        ]
        if wrong:
            left_out.append(f"results {wrong} of {len(theirs)} of {name} are far from torch.nn's")
        else:
            calls[name] = call
    return calls, "; ".join(left_out)


def measured(case: Case, clock: Clock, device: str, bound: float) -> Row:
    calls, left_out = contestants(case, device)
    found = in_turns(calls, clock, bound, turn_of)
    ratios = {
        name: statistics.median(
            theirs / ours for theirs, ours in zip(found[TORCH], found[name], strict=True)
        )
        for name in found
        if name != TORCH
    }
    seconds = {name: statistics.median(times) for name, times in found.items()}
    return Row(case, seconds, ratios.pop(FUSED, None), len(found[TORCH]), ratios, left_out)


# ---- the table ----------------------------------------------------------------------------------


def summary(rows: list[Row]) -> list[str]:
    """A line for each cell and stack, a column for each dtype and mode: mean and worst ratio."""
    groups: dict[tuple[str, str], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if row.ratio is not None:
            columns = groups.setdefault((row.case.cell, str(row.case.layers)), {})
            columns.setdefault((row.case.dtype, row.case.mode), []).append(row)
    wanted = [(dtype, mode) for dtype in DTYPES for mode in MODES]
    lines = [
        "| | " + " | ".join(f"{d} {m}" for d, m in wanted) + " |",
        "|:--" + "|--:" * len(wanted) + "|",
    ]
    for (cell, layers), columns in groups.items():
        cells = []
        for column in wanted:
            ratios = [row.ratio for row in columns.get(column, []) if row.ratio is not None]
            cells.append(f"{geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else "-")
        lines.append(f"| {cell.upper()}, {layers} | " + " | ".join(cells) + " |")
    return lines


def markdown(header: dict[str, str], rows: list[Row]) -> str:
    lines = [
        "# fusedrnn against torch.nn on a GPU",
        "",
        *(f"- {k}: {v}" for k, v in header.items()),
        "",
        "torch.nn's time / fusedrnn's, in turns; above 1, fusedrnn is the faster one. Geometric",
        "mean over the shapes, in brackets the worst of them.",
        "",
        *summary(rows),
        "",
        "Microseconds a time step, all layers and directions together; at the end the same, and",
        "the ratio, of what could run the case too, but was not chosen.",
        "",
        f"| case | {TORCH} | {FUSED} | ratio | |",
        "|:--|--:|--:|--:|:--|",
    ]
    for row in rows:
        if row.ratio is not None:
            figures = " | ".join(row.step_microseconds(name) for name in (TORCH, FUSED))
            lines.append(f"| {row.case} | {figures} | {row.ratio:.2f} | {row.others()} |")
        elif row.seconds:
            theirs = row.step_microseconds(TORCH)
            lines.append(f"| {row.case} | {theirs} | failed | - | {row.others()} |")
    return "\n".join([*lines, "", *program.failures(rows)])


def table(clock: Clock, device: str = "cuda") -> program.Program[Row]:
    return program.Program(
        name="compare",
        stem="cuda",
        doc=__doc__ or "",
        measure=lambda case, seconds: measured(case, clock, device, seconds),
        failed=lambda case, error: Row(case, {}, error=error),
        markdown=markdown,
    )


def main(argv: list[str] | None = None) -> int:
    if torch.cuda.is_available() and _C.build_info()["cuda"] == "no":
        print("compare: fusedrnn was built without its CUDA half: nothing measured")
        return 2
    return program.main(table(Events()), argv)


if __name__ == "__main__":
    sys.exit(main())
