"""What char_lm.py records of each side, and how it shows it: a table and a picture."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SIDES = ("torch.nn", "fusedrnn")


@dataclass
class Run:
    """What one side did: its losses, and the seconds of its own clock at each of them."""

    losses: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    valid: list[tuple[float, float]] = field(default_factory=list)  # (clock, loss)
    block_seconds: list[float] = field(default_factory=list)
    memory_mib: float | None = None
    sample_chars_per_second: float = 0.0
    sample: str = ""


def speed_up(plain: Run, fused: Run) -> float:
    """Median over the blocks: each compares seconds that lie side by side in time."""
    pairs = zip(plain.block_seconds, fused.block_seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)


def tail_loss(run: Run) -> float:
    return statistics.fmean(run.losses[-max(1, len(run.losses) // 10) :])


def rows_of(plain: Run, fused: Run, tokens: int) -> list[tuple[str, str, str, str]]:
    """The lines of the table for one cell: what, torch.nn, fusedrnn, how they compare."""

    def line(name: str, value: Callable[[Run], float], form: str, ratio: str = "") -> tuple:
        return (name, format(value(plain), form), format(value(fused), form), ratio)

    sampling = fused.sample_chars_per_second / plain.sample_chars_per_second
    training = f"{speed_up(plain, fused):.2f}x as fast"
    rows = [
        line("training loss, last 10 % of steps", tail_loss, ".4f"),
        line("validation loss (held-out text)", lambda r: r.valid[-1][1], ".4f"),
        line("training time, s", lambda r: r.clock[-1], ".1f"),
        line("training, characters/s", lambda r: tokens / r.clock[-1], ",.0f", training),
        line(
            "generation, characters/s",
            lambda r: r.sample_chars_per_second,
            ",.0f",
            f"{sampling:.2f}x as fast",
        ),
    ]
    if plain.memory_mib and fused.memory_mib:
        ratio = f"{fused.memory_mib / plain.memory_mib:.2f}x as much"
        rows.append(line("peak memory of training, MiB", lambda r: r.memory_mib, ".0f", ratio))
    return rows


def table(results: dict[str, dict[str, Run]], tokens: int) -> str:
    """All cells in one markdown table."""
    rows = [("", *SIDES, "fusedrnn is")]
    for cell, pair in results.items():
        rows.append((f"**{cell.upper()}**", "", "", ""))
        rows += rows_of(*(pair[side] for side in SIDES), tokens)
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for row in rows:
        first, *others = row
        cells = [first.ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(others, widths[1:], strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    rule = ["-" * (widths[0] + 2)] + ["-" * (w + 1) + ":" for w in widths[1:]]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def picture(results: dict[str, dict[str, Run]], args: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"torch.nn": "#9a3412", "fusedrnn": "#0369a1"}
    figure, axes = plt.subplots(
        1, len(results), figsize=(5.6 * len(results), 4.2), squeeze=False, layout="constrained"
    )
    for axis, (cell, pair) in zip(axes[0], results.items(), strict=True):
        for side, run in pair.items():
            # a running mean over 10 steps, the single steps pale behind it
            smooth = [
                statistics.fmean(run.losses[max(0, i - 9) : i + 1]) for i in range(len(run.losses))
            ]
            axis.plot(run.clock, run.losses, color=colors[side], alpha=0.2, linewidth=0.8)
            axis.plot(run.clock, smooth, color=colors[side], label=f"{side}, training")
            axis.plot(
                *zip(*run.valid, strict=True),
                color=colors[side],
                marker="o",
                markersize=5,
                linestyle="none",
                markerfacecolor="white",
                label=f"{side}, held-out",
            )
            axis.axvline(run.clock[-1], color=colors[side], linestyle=":", linewidth=1)
        ratio = speed_up(pair["torch.nn"], pair["fusedrnn"])
        axis.set_title(f"{cell.upper()}: the same {args.steps} steps, {ratio:.2f}x as fast")
        axis.set_xlabel("seconds of training (own clock of each side)")
        axis.set_ylabel("loss per character (nats)")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.suptitle(
        f"Character model on CPython's reference: {args.layers} x {args.hidden} units, "
        f"batch {args.batch}, {args.length} characters, {args.threads} threads",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
