"""Forecasts with honest error bars: sunspots a year ahead and more, CO2 a year of weeks at once.

Sunspots (statsmodels, 1700-2008, yearly): many-to-one. A GRU reads 44 years and gives the next; for
more years its forecasts are read in turn. CO2 over Mauna Loa (statsmodels, 1958-2001, weekly):
many-to-many. A GRU reads two years of weeks, a second one starts from its state and writes the 52
weeks to come. Both meet an autoregression whose order is chosen by BIC (of CO2: of its differences
to a year ago), and a seasonal-naive forecast: what was one cycle ago; for CO2 also with the last
year's rise added.

Rolling origin (Tashman 2000): every model is fitted to what lies before a fold alone, and forecasts
from every origin in it; then the next fold. Bars are 95 % intervals of a circular block bootstrap
over the origins (Politis & Romano 1992), as neighbouring origins share their errors. GRUs are
trained from several seeds: their own spread stands beside.

    make example-forecast          # or: python examples/forecast.py --help
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import program
from fusedrnn import models

try:
    import statsmodels  # noqa: F401
    from arch.bootstrap import CircularBlockBootstrap
except ImportError as error:
    program.missing(error)

from tqdm import tqdm

from series import Series, autoregression, folds, load, naive, naive_and_rise
from torch_layers import on_torch_layers, step_seconds

COLORS = {
    "seasonal naive": "#94a3b8",
    "with last year's rise": "#b45309",
    "autoregression": "#b91c1c",
    "GRU": "#0369a1",
}


# ---- the GRUs -----------------------------------------------------------------------------------


class ManyToOne(nn.Module):
    """The next value after a window."""

    def __init__(self, series: Series, hidden: int) -> None:
        super().__init__()
        self.reader = models.Encoder(1, hidden, cell="gru")
        self.head = nn.Linear(hidden, 1)

    def targets(self, future: Tensor) -> Tensor:
        return future[:, :1]

    def forward(self, windows: Tensor) -> Tensor:
        """(N, W) to (N, 1): what is added to the window's last value."""
        _, final = self.reader(windows[..., None])
        return windows[:, -1:] + self.head(self.reader.summary(final))

    def forecast(self, windows: Tensor, horizon: int) -> Tensor:
        """(N, horizon): each forecast is read in turn."""
        width = windows.shape[1]
        for _ in range(horizon):
            windows = torch.cat([windows, self(windows[:, -width:])], 1)
        return windows[:, -horizon:]


class ManyToMany(nn.Module):
    """A cycle at once: a second GRU starts from the first one's state, and is given the value of
    one cycle ago and the place in the cycle."""

    def __init__(self, series: Series, hidden: int) -> None:
        super().__init__()
        self.period = series.period
        self.reader = models.Encoder(1, hidden, cell="gru")
        self.writer = models.Encoder(3, hidden, cell="gru")
        self.head = nn.Linear(hidden, 1)

    def targets(self, future: Tensor) -> Tensor:
        return future

    def forward(self, windows: Tensor) -> Tensor:
        """(N, W) to (N, period): what is added to the values of one cycle ago."""
        # Relative to the last value: the series rises, and no level comes twice.
        level = windows[:, -1:]
        _, state = self.reader((windows - level)[..., None])
        before = windows[:, -self.period :]
        angle = torch.arange(self.period) * (2 * math.pi / self.period)
        places = torch.stack([angle.sin(), angle.cos()], -1).expand(len(windows), -1, -1)
        states, _ = self.writer(torch.cat([(before - level)[..., None], places], -1), hx=state)
        return before + self.head(states).squeeze(-1)

    def forecast(self, windows: Tensor, horizon: int) -> Tensor:
        return self(windows)[:, :horizon]


NETWORKS = {"sunspots": ManyToOne, "CO2": ManyToMany}


@dataclass(frozen=True)
class Fitted:
    """A network, and the mean and deviation of what it was fitted to."""

    network: nn.Module
    mean: float
    deviation: float

    @torch.no_grad()
    def forecast(self, series: Series, origins: list[int]) -> np.ndarray:
        scaled = torch.tensor((series.values - self.mean) / self.deviation, dtype=torch.float32)
        windows = torch.stack([scaled[o - series.window : o] for o in origins])
        future = self.network.forecast(windows, series.horizon).double().numpy()
        return future * self.deviation + self.mean


def examples_of(series: Series, known: int, mean: float, deviation: float) -> tuple[Tensor, Tensor]:
    """Every window before step `known` and what follows it, scaled: (N, W), (N, horizon)."""
    scaled = torch.tensor((series.values[:known] - mean) / deviation, dtype=torch.float32)
    rows = scaled.unfold(0, series.window + series.horizon, 1)
    return rows[:, : series.window], rows[:, series.window :]


def fit_network(series: Series, known: int, seed: int, args: argparse.Namespace) -> Fitted:
    torch.manual_seed(seed)
    mean, deviation = series.values[:known].mean(), series.values[:known].std()
    windows, future = examples_of(series, known, mean, deviation)
    network = NETWORKS[series.name](series, args.hidden)
    wanted = network.targets(future)
    generator = torch.Generator().manual_seed(seed)

    def batch_loss() -> Tensor:
        rows = torch.randint(len(windows), (args.batch,), generator=generator)
        return nn.functional.mse_loss(network(windows[rows]), wanted[rows])

    program.fit("", network, batch_loss, args.steps, args.rate, show=False)
    return Fitted(network.eval(), mean, deviation)


# ---- rolling origin -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    errors: dict[str, np.ndarray]  # (origins, horizon), absolute; the GRU's are the seeds' mean
    seeds: np.ndarray  # (seeds,): each GRU's mean absolute error
    on_torch: float  # the GRUs' on torch.nn's layers
    last: Fitted
    origins: list[int]
    forecasts: dict[str, np.ndarray]  # (origins, horizon); the GRU's of the first seed


def evaluate(series: Series, args: argparse.Namespace) -> Found:
    forecasts: dict[str, list[np.ndarray]] = {}
    gru: list[list[np.ndarray]] = []
    plain: list[list[np.ndarray]] = []
    origins: list[int] = []
    all_folds = folds(series)[: args.folds]
    bar = tqdm(total=len(all_folds) * args.seeds, desc=series.name, disable=None)
    for known, here in all_folds:
        forecasts.setdefault("seasonal naive", []).append(naive(series, here))
        if series.rises:
            forecasts.setdefault("with last year's rise", []).append(naive_and_rise(series, here))
        forecasts.setdefault("autoregression", []).append(autoregression(series, known, here))
        row, plain_row = [], []
        for seed in range(args.seeds):
            fitted = fit_network(series, known, args.seed + seed, args)
            row.append(fitted.forecast(series, here))
            on_torch = Fitted(on_torch_layers(fitted.network), fitted.mean, fitted.deviation)
            plain_row.append(on_torch.forecast(series, here))
            bar.update()
        gru.append(row)
        plain.append(plain_row)
        origins += here
    bar.close()
    truth = np.stack([series.values[o : o + series.horizon] for o in origins])
    joined = {name: np.concatenate(parts) for name, parts in forecasts.items()}
    of_seeds = np.concatenate(gru, axis=1)  # (seeds, origins, horizon)
    errors = {name: np.abs(found - truth) for name, found in joined.items()}
    errors["GRU"] = np.abs(of_seeds - truth).mean(0)
    joined["GRU"] = of_seeds[0]
    return Found(
        errors,
        np.abs(of_seeds - truth).mean((1, 2)),
        float(np.abs(np.concatenate(plain, axis=1) - truth).mean()),
        fitted,
        origins,
        joined,
    )


def interval(errors: np.ndarray, series: Series, draws: int) -> np.ndarray:
    """95 % of the mean over origins, (2, ...); blocks of a cycle stay together."""
    block = min(len(errors), math.ceil(series.period / series.stride))
    bootstrap = CircularBlockBootstrap(block, errors, seed=0)
    mean: Callable[[np.ndarray], np.ndarray] = lambda e: np.atleast_1d(e.mean(0))  # noqa: E731
    return bootstrap.conf_int(mean, reps=draws, method="percentile")


def summary(series: Series, found: Found, args: argparse.Namespace) -> dict[str, dict]:
    result: dict[str, dict] = {}
    draws = args.draws
    for name, errors in found.errors.items():
        low, high = interval(errors.mean(1), series, draws)
        against = interval((errors - found.errors["autoregression"]).mean(1), series, draws)
        result[name] = {
            "mean": float(errors.mean()),
            "interval": [float(low[0]), float(high[0])],
            "first": float(errors[:, 0].mean()),
            "last": float(errors[:, -1].mean()),
            "less than autoregression": [float(x[0]) for x in against],
            "by horizon": errors.mean(0).tolist(),
            "bars": interval(errors, series, draws).tolist(),
        }
    result["GRU"] |= {
        "seeds": found.seeds.tolist(),
        "mean_torch": found.on_torch,
        **layer_seconds(series, found, args.rounds),
    }
    return result


def layer_seconds(series: Series, found: Found, rounds: int) -> dict[str, float]:
    windows, future = examples_of(series, len(series.values), found.last.mean, found.last.deviation)
    network = found.last.network
    sides = {"torch": on_torch_layers(network), "fused": network}

    def loss_of(side: nn.Module) -> Tensor:
        return nn.functional.mse_loss(side(windows[:64]), network.targets(future[:64]))

    seconds = step_seconds(sides, loss_of, rounds)
    return {f"step_{side}": value for side, value in seconds.items()}


def table(series: Series, result: dict[str, dict]) -> str:
    head = [f"{series.name}, {series.unit}", "mean abs. error", "95 %", "first step", "last step"]
    rows = [[*head, "minus autoregression's, 95 %", "seeds' deviation", "on torch.nn"]]
    rows[0] += ["step, torch.nn", "step, fusedrnn"]
    for name, r in result.items():
        low, high = r["interval"]
        less, more = r["less than autoregression"]
        row = [name, f"{r['mean']:.3f}", f"{low:.3f} to {high:.3f}"]
        row += [f"{r['first']:.3f}", f"{r['last']:.3f}"]
        row += ["" if name == "autoregression" else f"{less:+.3f} to {more:+.3f}"]
        if name == "GRU":
            row += [f"{np.std(r['seeds']):.3f}", f"{r['mean_torch']:.3f}"]
            row += [program.milliseconds(r[key]) for key in ("step_torch", "step_fused")]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return program.aligned(rows)


def picture(everything: list[tuple[Series, Found, dict[str, dict]]]):
    plt = program.pyplot()
    figure, axes = plt.subplots(len(everything), 2, figsize=(14, 8), layout="constrained")
    for (left, right), (series, found, result) in zip(axes, everything, strict=True):
        steps = np.arange(1, series.horizon + 1)
        for name, r in result.items():
            low, high = np.array(r["bars"])
            left.plot(steps, r["by horizon"], color=COLORS[name], label=name)
            left.fill_between(steps, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
        left.set_xlabel("steps ahead")
        left.set_ylabel(f"mean absolute error, {series.unit}")
        left.set_title(f"{series.name}: {len(found.origins)} origins, bars of 95 %")
        left.legend()
        at = len(found.origins) // 2
        origin = found.origins[at]
        seen = np.arange(origin - 2 * series.period, origin)
        right.plot(seen - origin, series.values[seen], color="black")
        truth = series.values[origin : origin + series.horizon]
        right.plot(steps - 1, truth, color="black", linestyle=":", label="came")
        for name in result:
            right.plot(steps - 1, found.forecasts[name][at], color=COLORS[name], label=name)
        right.set_title(f"{series.name}: one of the origins")
        right.set_xlabel("steps from the origin")
        right.legend()
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = program.options(__doc__, rounds=9)
    parser.add_argument("--steps", type=int, default=400, help="of a GRU's training")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folds", type=int, default=99, help="at most so many")
    parser.add_argument("--draws", type=int, default=2000, help="of the bootstrap")
    args = parser.parse_args(argv)
    if args.tiny:
        args.steps, args.batch, args.hidden, args.seeds = 5, 16, 8, 2
        args.folds, args.draws, args.rounds = 1, 50, 2
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    program.start(args)
    everything = []
    for series in load():
        found = evaluate(series, args)
        result = summary(series, found, args)
        everything.append((series, found, result))
        print(f"\n{len(found.origins)} origins, {series.horizon} steps from each")
        print(table(series, result), flush=True)
    results = {series.name: result for series, _, result in everything}
    program.save("forecast", args, picture(everything), results)


if __name__ == "__main__":
    main()
