"""A comparison's results as a table, as files, and as a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .modes import BEST, MODES, Goal
from .peers import FUSED, TORCH
from .shapes import Shape


@dataclass
class Result:
    """One cell in one mode at one shape."""

    cell: str
    mode: str
    shape: Shape
    seconds: dict[str, float]  # median seconds a call of each contestant
    ratios: dict[str, float]  # median over rounds of its time / fusedrnn's time
    rounds: int
    retimed: bool = False
    made: str | None = None  # commit and date, where they are not the header's


# The modes of the picture.
DRAWN = ("forward", "training")


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def groups(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by (mode, cell), in the order they came."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault((result.mode, result.cell), []).append(result)
    return found


def peers_of(results: list[Result]) -> list[str]:
    """Everyone but fusedrnn, torch.nn first."""
    names = dict.fromkeys(name for r in results for name in r.ratios)
    return sorted(names, key=lambda n: n != TORCH)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def group_table(mode: str, cell: str, results: list[Result]) -> list[str]:
    peers = peers_of(results)
    names = [*peers[:1], FUSED]
    lines = [
        f"### {cell.upper()}, {mode}",
        "",
        "| B,T,I,H | "
        + " | ".join([*(f"{name} ms" for name in names), *(f"{p} / {FUSED}" for p in peers)])
        + " |",
        "|:--" + "|--:" * (len(names) + len(peers)) + "|",
    ]
    for r in results:
        cells = [f"{r.shape}{' *' if r.retimed else ''}"]
        cells += [milliseconds(r.seconds[name]) for name in names]
        cells += [f"{r.ratios[p]:.2f}" if p in r.ratios else "-" for p in peers]
        lines.append("| " + " | ".join(cells) + " |")
    means = [f"**{geometric_mean(r.ratios[p] for r in results):.2f}**" for p in peers]
    lines.append("| **geometric mean** | | | " + " | ".join(means) + " |")
    return [*lines, ""]


def contestant(result: Result, goal: Goal) -> str | None:
    """Whom a goal speaks of; None where that one took no part. No form of fusedrnn is its peer."""
    if goal.against == BEST:
        peers = [name for name in result.ratios if not name.startswith(FUSED)]
        return min(peers, key=lambda name: result.ratios[name])
    return goal.against if goal.against in result.ratios else None


def against(result: Result, goal: Goal) -> float | None:
    name = contestant(result, goal)
    return None if name is None else result.ratios[name]


def reached(value: float, goal: float | None) -> str:
    """A figure, bold where it falls short, and what it should be."""
    if goal is None:
        return f"{value:.2f}"
    return f"{value:.2f} ({goal:.2f})" if value >= goal else f"**{value:.2f}** ({goal:.2f})"


def summary(results: list[Result]) -> list[str]:
    """One line for each goal: the numbers to quote."""
    lines = [
        f"| | time of ... / time of {FUSED} | geometric mean (goal) | worst shape (goal) | |",
        "|:--|:--|--:|--:|:--|",
    ]
    for (mode, cell), members in groups(results).items():
        for goal in MODES[mode].goals[cell]:
            found = {r.shape: v for r in members if (v := against(r, goal)) is not None}
            if not found:
                continue
            worst = min(found, key=lambda shape: found[shape])
            mean = geometric_mean(found.values())
            lines.append(
                f"| {cell.upper()}, {mode} | {goal.against} | {reached(mean, goal.mean)} "
                f"| {reached(found[worst], goal.worst)} | at {worst} |"
            )
    return lines


def markdown(header: dict[str, str], results: list[Result]) -> str:
    lines = ["# fusedrnn against its peers", ""]
    lines += [f"- {key}: {value}" for key, value in header.items()]
    lines += [
        "",
        "Ratios are medians over paired, interleaved rounds; above 1, fusedrnn is the faster one.",
        f"In brackets the project's goals, bold what falls short of them; {BEST}: shape by shape.",
        "",
        *summary(results),
        "",
    ]
    for (mode, cell), members in groups(results).items():
        lines += group_table(mode, cell, members)
    if any(r.retimed for r in results):
        lines += ["\\* timed again with more rounds, as the first reading was low.", ""]
    return "\n".join(lines)


def picture(header: dict[str, str], results: list[Result], path: Path) -> None:
    """One panel a cell and mode of whole layers; a dot for each peer at each shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    results = [r for r in results if r.mode in DRAWN]
    found = groups(results)
    modes = list(dict.fromkeys(mode for mode, _ in found))
    cells = list(dict.fromkeys(cell for _, cell in found))
    looks = {
        TORCH: ("#0369a1", "o"),
        "ONNX Runtime": ("#b45309", "s"),
        "OpenVINO": ("#7c3aed", "^"),
    }
    shapes = list(dict.fromkeys(r.shape for r in results))
    figure, axes = plt.subplots(
        len(modes),
        len(cells),
        figsize=(1.6 + 4.2 * len(cells), 1.6 + (0.9 + 0.27 * len(shapes)) * len(modes)),
        squeeze=False,
        sharex="row",
        sharey=True,
        layout="constrained",
    )
    for row, mode in zip(axes, modes, strict=True):
        for axis, cell in zip(row, cells, strict=True):
            members = {r.shape: r for r in found.get((mode, cell), [])}
            axis.axvspan(0, 1, color="#fee2e2", zorder=0)
            axis.axvline(1, color="#7f1d1d", linewidth=1)
            for y, shape in enumerate(shapes):
                if shape not in members:
                    continue
                ratios = members[shape].ratios
                axis.plot([1, ratios[TORCH]], [y, y], color=looks[TORCH][0], linewidth=2, alpha=0.4)
                for name, value in ratios.items():
                    color, marker = looks[name]
                    axis.plot(value, y, marker, color=color, markersize=6)
                axis.annotate(
                    f"{ratios[TORCH]:.2f}",
                    (ratios[TORCH], y),
                    xytext=(0, 5),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color=looks[TORCH][0],
                )
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(axis="x", alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            title = f"{cell.upper()}, {mode}"
            if members:
                mean = geometric_mean(r.ratios[TORCH] for r in members.values())
                title += f": {mean:.2f}x torch.nn"
            axis.set_title(title, fontsize=11)
        row[0].set_ylabel("batch, steps, input, hidden")
        values = [v for r in results if r.mode == mode for v in r.ratios.values()]
        row[0].set_xlim(min(0.8, 0.85 * min(values)), max(2.0, 1.25 * max(values)))
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(shapes)), [str(s) for s in shapes], fontsize=8)
        axis.set_ylim(len(shapes) - 0.4, -0.8)
    handles = [
        plt.Line2D([], [], color=looks[n][0], marker=looks[n][1], linestyle="none", label=n)
        for n in peers_of(results)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(
        f"time of the peer / time of fusedrnn: right of 1x, fusedrnn is faster\n"
        f"{header['cpu']}, {header['threads']} threads, {header['versions']}\n"
        f"{header.get('other load', '').replace('*', '')}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save(header: dict[str, str], results: list[Result], out: Path, stem: str) -> list[Path]:
    """Write STEM.md, .json and, where matplotlib is installed, .png."""
    paths = [out / f"{stem}.md", out / f"{stem}.json"]
    paths[0].write_text(markdown(header, results))
    records = [asdict(r) | {"shape": str(r.shape)} for r in results]
    paths[1].write_text(json.dumps({"header": header, "results": records}, indent=1))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("matplotlib is not installed: no picture")
        return paths
    if not any(r.mode in DRAWN for r in results):
        return paths
    paths.append(out / f"{stem}.png")
    picture(header, results, paths[-1])
    return paths


def updated(
    header: dict[str, str],
    results: list[Result],
    older_header: dict[str, str],
    older: list[Result],
) -> tuple[dict[str, str], list[Result]]:
    """The results, and those older ones that they do not repeat, which the header names."""
    key = {(r.cell, r.mode, r.shape) for r in results}
    last = f"{older_header.get('commit', 'unknown')}, {older_header['date']}"
    kept = [replace(r, made=r.made or last) for r in older if (r.cell, r.mode, r.shape) not in key]
    if not kept:
        return header, results
    modes: dict[str | None, dict[str, None]] = {}
    for r in kept:
        modes.setdefault(r.made, {})[r.mode] = None
    earlier = "; ".join(f"{made}: {', '.join(names)}" for made, names in modes.items())
    return header | {"earlier rows": earlier}, results + kept


def load(path: Path) -> tuple[dict[str, str], list[Result]]:
    """What save() wrote to STEM.json."""
    found = json.loads(path.read_text())
    results = [Result(**r | {"shape": Shape.parse(r["shape"])}) for r in found["results"]]
    return found["header"], results
