"""How quick any implementation could be here, and what is left to gain.

    python -m bench.floors                  # of bench/results/compare.json, written beside it

A layer's floor is the time of its multiplications at the rate of a tile that does nothing else and
finds its operands in the private cache, or of reading W_hh at every step through the caches where
that is longer; of its sigmoids and tanhs, which take the multipliers too; and, where threads share
the units, of one way between two cores at every step. The quickest of three splits counts: one
thread, the units shared, the rows shared. Packing, biases, storing and calls cost nothing.
bench/probe.cpp measures the rates, the project's own kernels the activations. A goal is out of
reach where the peer's time / the floor, the bound, is smaller. Layers' shapes of one step are left
out, as calls decide there; a cell's floor holds the call: of a module with as many parameters that
computes nothing, which bench.compare times beside the cells.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import timeit
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fusedrnn import _C

from . import cases, report
from .limits import GATES, SIDE
from .modes import MODES, Goal
from .shapes import Shape
from .timing import paired


@dataclass(frozen=True)
class Machine:
    """Rates of one of `threads` threads, all of which run."""

    threads: int
    flops: float  # operations a second between registers
    product: float  # the same in a product's tile
    private_cache: float  # bytes a second
    shared_cache: float
    transfer: float = 0.0  # seconds for a line from one core to another
    private_bytes: int = 1 << 20  # the private cache's size
    sigmoid: float = 0.0  # seconds a value
    tanh: float = 0.0


def probe(threads: int) -> Machine:
    source = Path(__file__).with_name("probe.cpp")
    compiler = os.environ.get("CXX") or "g++"
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/probe"
        command = [
            compiler,
            "-O2",
            "-std=gnu++20",
            "-ffp-contract=fast",
            "-march=native",
            "-pthread",
            source,
        ]
        subprocess.run([*command, "-o", program], check=True)
        found = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
    costs = {name: activation_cost(name) for name in ("sigmoid", "tanh")}
    return Machine(threads, **json.loads(found.stdout), **costs)


def activation_cost(name: str) -> float:
    """Seconds a value, at best, of the kernels' own."""
    isa = _C.get_cpu_isa()
    few, many = (torch.linspace(-4, 4, count) for count in (1024, 9216))

    def best(x: Tensor) -> float:
        def call() -> Tensor:
            return torch.ops.fusedrnn.activation(name, isa, x)

        return min(timeit.repeat(call, number=20, repeat=200)) / 20

    return (best(many) - best(few)) / (many.numel() - few.numel())


SHARE_OF_SGEMM = 0.85  # of torch.mm's rate: what the project asks of itself at large shapes


def sgemm(threads: int) -> float:
    """Operations a second of one thread while torch.mm multiplies square matrices on `threads`."""
    a, b, out = (torch.randn(SIDE, SIDE) for _ in range(3))
    call = {"product": lambda: torch.mm(a, b, out=out)}
    return 2 * SIDE**3 / statistics.median(paired(call, 9, 2.0)["product"]) / threads


# Sigmoids and tanhs of a unit; backward computes the tanh of an LSTM's cell state once more.
ACTIVATIONS = {"lstm": (3, 2), "gru": (2, 1), "rnn": (0, 1)}


def floor(machine: Machine, mode: str, cell: str, shape: Shape) -> float:
    """Seconds."""
    train = mode == "training"
    weights = GATES[cell] * shape.hidden_size  # rows
    pairs = shape.batch * shape.steps
    sigmoids, tanhs = ACTIVATIONS[cell]
    tanhs += train and cell == "lstm"
    activations = pairs * shape.hidden_size * (sigmoids * machine.sigmoid + tanhs * machine.tanh)

    def product(k: int, rows: int) -> float:
        return 2 * weights * k * rows / machine.product

    def split(threads: int, share_units: bool) -> float:
        share = 4 * weights * shape.hidden_size / (threads if share_units else 1)
        beyond = max(0.0, share - machine.private_bytes)
        reading = (share - beyond) / machine.private_cache + beyond / machine.shared_cache
        step = max(product(shape.hidden_size, shape.batch) / threads, reading)
        if share_units and threads > 1:
            step += machine.transfer
        walk = shape.steps * step
        at_once = product(shape.input_size, pairs)
        if train:
            # dx like the inputs' projection; dW of both; the walk back reads W_hh once more.
            walk, at_once = 2 * walk, 3 * at_once + product(shape.hidden_size, pairs)
        return walk + (at_once + activations) / threads

    ways = [split(1, True), split(machine.threads, True)]
    if shape.batch >= machine.threads:
        ways.append(split(machine.threads, False))
    return min(ways)


def layer_floor(machine: Machine, result: report.Result) -> float | None:
    """Seconds; None for a single step, where the call decides."""
    if result.shape.steps == 1:
        return None
    return floor(machine, result.mode, result.cell, result.shape)


def cell_floor(machine: Machine, result: report.Result) -> float | None:
    """Seconds: a call, its products, or reading all weights and writing their gradients. None
    where that call was not timed."""
    if cases.NOTHING not in result.ratios:
        return None
    cell, shape, train = result.cell, result.shape, result.mode == "cell-training"
    # In turns with fusedrnn's: their ratio holds, whatever the machine did then.
    call = result.ratios[cases.NOTHING] * result.seconds[report.FUSED]
    weights = GATES[cell] * shape.hidden_size * (shape.input_size + shape.hidden_size)
    products = 2 * weights * shape.batch / (machine.threads * machine.product)
    share = 4 * weights / machine.threads
    near = share <= machine.private_bytes
    reading = share / (machine.private_cache if near else machine.shared_cache)
    step = max(products, reading)
    return call + (3 * step if train else step)


# By mode; the others have none.
FLOORS: dict[str, Callable[[Machine, report.Result], float | None]] = {
    "forward": layer_floor,
    "training": layer_floor,
    "cell-forward": cell_floor,
    "cell-training": cell_floor,
}


def line(
    machine: Machine,
    library: Machine,
    mode: str,
    cell: str,
    goal: Goal,
    results: list[report.Result],
) -> str:
    least = FLOORS[mode]
    bounds, library_bounds, shares, ratios = [], [], [], []
    for result in results:
        ratio, seconds = report.against(result, goal), least(machine, result)
        if ratio is None or seconds is None:
            continue
        share = seconds / result.seconds[report.FUSED]
        bounds.append((ratio / share, result.shape))
        library_bounds.append(ratio / share * seconds / least(library, result))
        shares.append(share)
        ratios.append(ratio)
    if not bounds:
        return ""
    mean = report.geometric_mean
    lowest, where = min(bounds)
    wanted = "-" if goal.mean is None else f"{goal.mean:.2f}"
    return (
        f"| {cell.upper()}, {mode} | {goal.against} | {mean(ratios):.2f} | {wanted} "
        f"| {mean(b for b, _ in bounds):.2f} | {lowest:.2f} at {where} "
        f"| {mean(library_bounds):.2f} | {mean(shares):.0%} |"
    )


def table(machine: Machine, product_rate: float, results: list[report.Result]) -> str:
    library = replace(machine, product=SHARE_OF_SGEMM * product_rate)
    lines = [
        "# What the machine allows",
        "",
        f"Of one thread while {machine.threads} run (`bench/probe.cpp`):",
        "",
        f"- {machine.flops / 1e9:.0f} GFLOP/s between registers, {machine.product / 1e9:.0f} in",
        "  the tile of a product, "
        f"{product_rate / 1e9:.0f} in torch.mm of {SIDE} x {SIDE} matrices",
        f"- {machine.private_cache / 1e9:.0f} GB/s from its private cache,",
        f"  {machine.shared_cache / 1e9:.0f} from the shared one",
        f"- {machine.transfer * 1e9:.0f} ns from core to core",
        f"- {machine.sigmoid * 1e9:.2f} ns a sigmoid, {machine.tanh * 1e9:.2f} a tanh",
        "",
        "The bound is the peer's time / the floor: what fusedrnn would reach if packing, storing",
        "and calls cost nothing, no product stopped for a moment and the cores were always at",
        "their nearest. Layers' shapes of one step are left out of all columns. "
        f"At {SHARE_OF_SGEMM:.0%} of sgemm:",
        "the same bound with products at that share of torch.mm's rate. A cell's floor holds a",
        "call that computes nothing, of a module with as many parameters, timed in their turns.",
        "",
        "| | time of ... / time of fusedrnn | reached | goal | bound | least bound "
        f"| at {SHARE_OF_SGEMM:.0%} of sgemm | floor / our time |",
        "|:--|:--|--:|--:|--:|:--|--:|--:|",
    ]
    for (mode, cell), members in report.groups(results).items():
        if mode in FLOORS:
            lines += [
                text
                for goal in MODES[mode].goals[cell]
                if (text := line(machine, library, mode, cell, goal, members))
            ]
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(prog="bench.floors", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=here / "compare.json")
    path = parser.parse_args(argv).results
    header, results = report.load(path)
    threads = int(header["threads"])
    torch.set_num_threads(threads)
    text = table(probe(threads), sgemm(threads), results)
    print(text)
    path.with_name("floors.md").write_text(text)


if __name__ == "__main__":
    main()
