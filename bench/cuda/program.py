"""What the programs that time cases on a GPU share: their options, their loop, their files."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from bench.machine import commit
from bench.shapes import CELLS

from .cases import DTYPES, Case, all_cases

SAVE_SECONDS = 5.0  # between two writings of the files
SAME_FAILURES = 8  # in a row: the device is gone


class Measured(Protocol):
    """One case, measured, or with the error that kept it from being."""

    @property
    def case(self) -> Case: ...
    @property
    def error(self) -> str: ...
    def figure(self) -> str: ...
    def record(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=Measured)


@dataclass(frozen=True)
class Program(Generic[R]):
    name: str  # of the module under bench.cuda
    stem: str  # of the files
    doc: str
    measure: Callable[[Case, float], R]  # in so many seconds; RuntimeError, ValueError: it failed
    failed: Callable[[Case, str], R]
    markdown: Callable[[dict[str, str], list[R]], str]


def run(
    program: Program[R],
    cases: Iterable[Case],
    seconds: float,
    total: float,
    done: Callable[[R], None],
) -> None:
    """Measure the cases in their order, and tell `done` of each, until `total` seconds are over."""
    end = time.monotonic() + total
    failures = 0
    for case in cases:
        if time.monotonic() > end or failures == SAME_FAILURES:
            return
        try:
            done(program.measure(case, seconds))
            failures = 0
        except (RuntimeError, ValueError) as error:
            done(program.failed(case, first_line(error)))
            failures += 1


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


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


def save(program: Program[R], header: dict[str, str], rows: list[R], out: Path) -> None:
    """STEM.md and STEM.json under `out`; neither is ever there in half."""
    records = [row.record() for row in rows]
    texts = {
        f"{program.stem}.json": json.dumps({"header": header, "results": records}, indent=1),
        f"{program.stem}.md": program.markdown(header, rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        part = out / f"{name}.part"
        part.write_text(text)
        os.replace(part, out / name)


def failures(rows: Iterable[Measured]) -> list[str]:
    """The last lines of a document, where something failed."""
    failed = [f"- {row.case}: {row.error}" for row in rows if row.error]
    return ["Failed:", "", *failed, ""] if failed else []


def parse(program: Program[Any], argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"bench.cuda.{program.name}", description=program.doc)
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


def main(program: Program[R], argv: list[str] | None = None) -> int:
    args = parse(program, argv)
    if not torch.cuda.is_available():
        print(f"{program.name}: there is no GPU here that torch can use: nothing measured")
        return 2
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[R] = []
    top, saved = header(), time.monotonic()

    def done(row: R) -> None:
        nonlocal saved
        rows.append(row)
        print(f"{row.case}: {row.figure()} {row.error}".rstrip(), flush=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            save(program, top, rows, args.out)
            saved = time.monotonic()

    # what `timeout` sends: leave by way of `finally`
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = [c for c in all_cases() if c.cell in args.cells and c.dtype in args.dtypes]
    try:
        run(program, wanted, args.seconds, args.total, done)
    finally:
        save(program, top, rows, args.out)
        names = f"{program.stem}.md and {program.stem}.json"
        print(f"{len(rows)} of {len(wanted)} cases; {names} under {args.out}")
    return 1 if any(row.error for row in rows) else 0
