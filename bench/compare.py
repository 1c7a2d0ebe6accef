"""Time fusedrnn against torch.nn, ONNX Runtime and OpenVINO, and report the ratios.

    python -m bench.compare                                  # all of it, half an hour or more
    python -m bench.compare --quick
    python -m bench.compare --cells gru --mode training --shapes 1,100,64,64 8,100,128,128

See timing.py for the protocol and peers.py for who is compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from . import machine, peers, report
from .alone import alone
from .modes import MODES, Mode
from .shapes import CELLS, QUICK_SHAPES, Shape
from .timing import Call, paired, ratio

RETIMED_BELOW = 0.95  # a shape that reads below is timed again: identical code can read 0.92
RETIME_ROUNDS = 25
BUSY = 0.05  # with a core gone, spinning threads wait for one another and ratios mean nothing


def parse(argv: list[str] | None) -> argparse.Namespace:
    def shape(text: str) -> Shape:
        try:
            return Shape.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser = argparse.ArgumentParser(prog="bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), dest="modes")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="B,T,I,H")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(peers.PEERS),
        help="besides torch.nn, forward only; all that are installed unless told",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=5.0, help="bound on each measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few shapes, short measurements")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--stem", default="compare", help="name of the files written")
    parser.add_argument(
        "--update", action="store_true", help="keep the older file's rows that are not timed now"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"exit 1 if a shape stays below {RETIMED_BELOW} of torch.nn",
    )
    args = parser.parse_args(argv)
    installed = peers.installed_peers()
    if args.peers is None:
        args.peers = installed
    elif missing := sorted(set(args.peers) - set(installed)):
        parser.error(f"not installed: {', '.join(missing)} (and onnx, which both need)")
    if args.quick:
        args.rounds, args.seconds = min(args.rounds, 5), min(args.seconds, 2.0)
    if args.rounds < 1 or args.threads < 1 or args.seconds <= 0:
        parser.error("--rounds, --threads and --seconds must be positive")
    return args


def missed(result: report.Result) -> list[str]:
    """The contestants, fusedrnn aside, that a goal of the result's mode is missed against."""
    names = []
    for goal in MODES[result.mode].goals[result.cell]:
        name = report.contestant(result, goal)
        if name is not None and result.ratios[name] < goal.worst:
            names.append(name)
    if result.ratios.get(peers.TORCH, 1.0) < RETIMED_BELOW:
        names.append(peers.TORCH)
    return list(dict.fromkeys(names))


def measure(
    cell: str, mode: str, shape: Shape, calls: dict[str, Call], rounds: int, bound: float
) -> report.Result:
    """Time the calls; again, with more rounds, those beside which fusedrnn misses its goal."""
    seconds = paired(calls, rounds, bound, peers.RESTS)
    others = [name for name in calls if name != peers.FUSED]
    result = report.Result(
        cell,
        mode,
        shape,
        {name: statistics.median(values) for name, values in seconds.items()},
        {name: ratio(seconds, name, peers.FUSED) for name in others},
        len(seconds[peers.FUSED]),
    )
    low = missed(result)
    if low and result.rounds < RETIME_ROUNDS:
        some = {name: calls[name] for name in (*low, peers.FUSED)}
        # The same time a round, for fewer of them: this reading decides.
        again = paired(some, RETIME_ROUNDS, bound * RETIME_ROUNDS / rounds, peers.RESTS)
        result.ratios |= {name: ratio(again, name, peers.FUSED) for name in low}
        result.seconds |= {name: statistics.median(values) for name, values in again.items()}
        result.rounds, result.retimed = len(again[peers.FUSED]), True
    return result


def job(
    cell: str, mode: str, shape: Shape, peers: list[str], threads: int, rounds: int, bound: float
) -> report.Result:
    """One row, in a process that has measured nothing yet."""
    torch.set_num_threads(threads)
    also = (peers, threads) if MODES[mode].with_peers else ()
    return measure(cell, mode, shape, MODES[mode].calls(cell, shape, *also), rounds, bound)


def shapes_of(mode: Mode, args: argparse.Namespace) -> list[Shape]:
    """Those asked for, or the mode's own; a quick look takes those it shares with QUICK_SHAPES, or
    its first two."""
    if args.shapes is not None:
        return args.shapes
    if args.quick:
        return [s for s in mode.shapes if s in QUICK_SHAPES] or list(mode.shapes[:2])
    return list(mode.shapes)


def progress(done: int, total: int, started: float, result: report.Result) -> None:
    left = (time.monotonic() - started) / done * (total - done)
    ratios = ", ".join(f"{name} {value:.2f}" for name, value in result.ratios.items())
    print(
        f"[{done}/{total}, {left:.0f} s left] {result.cell} {result.mode} {result.shape}: "
        f"{ratios}{' (timed again)' if result.retimed else ''}",
        file=sys.stderr,
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)  # fails now, not after the measurement
    header = machine.describe(args.threads, args.peers)
    jobs = [
        (m, c, s)
        for m in args.modes
        for c in args.cells
        if c in MODES[m].goals
        for s in shapes_of(MODES[m], args)
    ]
    results: list[report.Result] = []
    load = machine.OtherLoad()
    started = time.monotonic()
    for mode, cell, shape in jobs:
        how = (args.peers, args.threads, args.rounds, args.seconds)
        result, seconds = alone(job, cell, mode, shape, *how)
        load.own(seconds)
        results.append(result)
        progress(len(results), len(jobs), started, results[-1])
    header["other load"] = f"{load.share():.0%} of the machine's time went to other processes"
    if load.share() > BUSY:
        header["other load"] += ": **THE MACHINE WAS BUSY, DO NOT QUOTE THESE NUMBERS**"
    older = args.out / f"{args.stem}.json"
    if args.update and older.exists():
        header, results = report.updated(header, results, *report.load(older))
    print(report.markdown(header, results))
    paths = report.save(header, results, args.out, args.stem)
    print("written:", ", ".join(p.name for p in paths), "under", args.out)
    low = [r for r in results[: len(jobs)] if r.ratios.get(peers.TORCH, 1.0) < RETIMED_BELOW]
    if low:
        counts = f"{len(low)} of {len(jobs)}"
        print(f"{counts} below {RETIMED_BELOW} of torch.nn, confirmed by re-timing")
    return 1 if args.check and low else 0


if __name__ == "__main__":
    sys.exit(main())
