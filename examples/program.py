"""What the programs have in common: options, the training loop, tables and pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn


def missing(error: ImportError) -> NoReturn:
    name = Path(sys.argv[0]).stem
    sys.exit(f"this program needs the package {error.name}, which `make example-{name}` installs")


try:
    from tqdm import tqdm
except ImportError as error:
    missing(error)


def options(doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options of every program; `doc` is its docstring."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="of the timing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a few seconds, to see it run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    return parser


def start(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)  # fails now, not after the training
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def fit(
    name: str,
    model: nn.Module,
    batch_loss: Callable[[], Tensor],
    steps: int,
    rate: float,
    *,
    show: bool = True,
) -> list[float]:
    """Minimise by Adam with one cycle of the rate (Smith & Topin 2018), gradients clipped to norm
    1; batch_loss() draws a batch and gives its loss. Returns the loss of every step; shows a bar
    where a terminal sees it."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    losses = []
    bar = tqdm(range(steps), desc=name, disable=None if show else True)
    for _ in bar:
        optimizer.zero_grad(set_to_none=True)
        loss = batch_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


def aligned(rows: list[list[str]]) -> str:
    """A table of texts, each column as wide as its widest."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def pyplot():
    """matplotlib.pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError as error:
        missing(error)
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(name: str, args: argparse.Namespace, figure, results: object) -> None:
    """The picture and the figures of a run, as NAME.png and NAME.json."""
    figure.savefig(args.out / f"{name}.png", dpi=110)
    pyplot().close(figure)
    (args.out / f"{name}.json").write_text(json.dumps(results))
    print(f"\ndrawn in {args.out / name}.png")
