"""Why gates: how far gradients reach, and who learns to add two numbers that lie far apart.

Four recurrent networks of one size: tanh; ReLU from the identity (Le et al. 2015, "IRNN"); LSTM,
its forget gates open for up to T steps at first (Tallec & Ollivier 2018); GRU. First the norm of
the gradient of the last state with respect to the input of every step before it, by the library's
own backward pass. Then the adding problem (Hochreiter & Schmidhuber 1997) at three
lengths: of T numbers in [0, 1] two are marked, and their sum is asked for at the end; who answers 1
whatever he sees has a mean squared error of 0.1667. Ends with a table, with the same weights' speed
and error on torch.nn's layers.

    make example-long_memory          # or: python examples/long_memory.py --help
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fusedrnn
import program
from fusedrnn import models
from torch_layers import step_seconds

SOLVED = 0.01  # mean squared error; 0.1667 is reached without looking
# As Le et al. did, a rate for each.
RATES = {"RNN tanh": 1e-3, "LSTM": 5e-3, "GRU": 5e-3}
COLORS = {"RNN tanh": "#64748b", "IRNN": "#b45309", "LSTM": "#0369a1", "GRU": "#15803d"}


def open_for_(lstm: fusedrnn.LSTM, steps: int) -> fusedrnn.LSTM:
    """Chrono initialisation (Tallec & Ollivier 2018): a forget gate's bias is ln u, u uniform in
    [1, steps - 1], the input gate's the same with the other sign."""
    with torch.no_grad():
        lstm.bias_hh_l0.zero_()
        bias = torch.empty(lstm.hidden_size).uniform_(1, max(2, steps - 1)).log()
        lstm.bias_ih_l0.chunk(4)[0].copy_(-bias)
        lstm.bias_ih_l0.chunk(4)[1].copy_(bias)
    return lstm


def layer(name: str, inputs: int, hidden: int, steps: int) -> nn.RNNBase:
    """A network for sequences of `steps` steps."""
    if name == "RNN tanh":
        return fusedrnn.RNN(inputs, hidden, batch_first=True)
    if name == "IRNN":
        rnn = fusedrnn.RNN(inputs, hidden, nonlinearity="relu", batch_first=True)
        return models.identity_recurrent_(rnn)
    if name == "LSTM":
        return open_for_(fusedrnn.LSTM(inputs, hidden, batch_first=True), steps)
    return fusedrnn.GRU(inputs, hidden, batch_first=True)


# ---- how far gradients reach --------------------------------------------------------------------


def gradient_norms(name: str, steps: int, hidden: int, batch: int = 32) -> list[float]:
    """By lag: the norm of d(v h_T) / d x_(T - lag) for unit vectors v, over that of lag 0."""
    torch.manual_seed(1)
    rnn = layer(name, 2, hidden, steps)
    x = torch.randn(batch, steps, 2, requires_grad=True)
    output, _ = rnn(x)
    direction = nn.functional.normalize(torch.randn(batch, hidden), dim=1)
    (output[:, -1] * direction).sum().backward()
    norms = x.grad.norm(dim=2).mean(0).flip(0)
    return (norms / norms[0]).tolist()


# ---- the adding problem -------------------------------------------------------------------------


class Adder(nn.Module):
    """A layer over the whole sequence, a linear unit on its last state."""

    def __init__(self, name: str, hidden: int, steps: int) -> None:
        super().__init__()
        self.rnn = layer(name, 2, hidden, steps)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)
        return self.head(output[:, -1]).squeeze(1)


def make_batch(rows: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x (rows, steps, 2): numbers, and a 1 beside one of them in either half; their sums (rows)."""
    numbers = torch.rand(rows, steps, generator=generator)
    marks = torch.zeros(rows, steps)
    half = steps // 2
    every = torch.arange(rows)
    marks[every, torch.randint(half, (rows,), generator=generator)] = 1
    marks[every, half + torch.randint(steps - half, (rows,), generator=generator)] = 1
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1)


@torch.no_grad()
def error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    x, wanted = batch
    return nn.functional.mse_loss(model(x), wanted).item()


def train(name: str, steps: int, args: argparse.Namespace) -> tuple[Adder, list[float]]:
    """The trained model, and its error on held-out sequences every `every` steps."""
    torch.manual_seed(args.seed)
    model = Adder(name, args.hidden, steps)
    generator = torch.Generator().manual_seed(args.seed + steps)
    held_out = make_batch(1000, steps, torch.Generator().manual_seed(99))
    # The IRNN explodes where gated cells learn, the sooner the longer the sequence.
    rate = 0.1 / steps if name == "IRNN" else RATES[name]
    optimizer = torch.optim.Adam(model.parameters(), rate)
    curve = [error(model, held_out)]
    bar = tqdm(range(1, args.steps + 1), desc=f"{name}, T = {steps}", disable=None)
    for step in bar:
        x, wanted = make_batch(args.batch, steps, generator)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.mse_loss(model(x), wanted).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if norm.isfinite():  # an IRNN's may overflow
            optimizer.step()
        if step % args.every == 0:
            curve.append(error(model, held_out))
            bar.set_postfix(error=f"{curve[-1]:.4f}")
    return model, curve


def compare_layers(model: Adder, steps: int, args: argparse.Namespace) -> dict[str, float]:
    """The same weights on torch.nn's layer: error, and a training step's time on both."""
    plain = copy.deepcopy(model)
    plain.rnn = fusedrnn.revert(plain.rnn)
    x, wanted = make_batch(args.batch, steps, torch.Generator().manual_seed(5))

    seconds = step_seconds(
        {"torch": plain, "fused": model},
        lambda side: nn.functional.mse_loss(side(x), wanted),
        args.rounds,
    )
    held_out = make_batch(1000, steps, torch.Generator().manual_seed(99))
    return {
        "error_fused": error(model, held_out),
        "error_torch": error(plain, held_out),
        "step_torch": seconds["torch"],
        "step_fused": seconds["fused"],
    }


def solved_at(curve: list[float], every: int) -> int | None:
    """The first step from which the error stays below SOLVED."""
    at = len(curve)
    while at > 0 and curve[at - 1] < SOLVED:
        at -= 1
    return at * every if at < len(curve) else None


# ---- what is shown ------------------------------------------------------------------------------


def verdicts(norms: dict[str, list[float]], curves: dict[str, dict[str, list[float]]]) -> list[str]:
    """Which published behaviour is reproduced here, and which is not."""

    def learned(name: str, steps: str) -> bool:
        return curves[name][steps][-1] < SOLVED

    longest, shortest = max(curves["LSTM"], key=int), min(curves["LSTM"], key=int)
    tanh, irnn = norms["RNN tanh"][-1], norms["IRNN"][-1]
    claims = [
        (tanh < 1e-3, "the tanh network's gradient vanishes (Hochreiter & Schmidhuber 1997)"),
        (0.1 < irnn < 10, "the IRNN's neither vanishes nor explodes at first (Le et al. 2015)"),
        (
            learned("LSTM", longest),
            f"the LSTM adds at T = {longest} (Hochreiter & Schmidhuber 1997)",
        ),
        (learned("IRNN", longest), f"so does the IRNN at T = {longest} (Le et al. 2015)"),
        (
            not learned("RNN tanh", shortest),
            f"the tanh network fails, here at T = {shortest} already (Le et al. 2015)",
        ),
    ]
    return [f"{'reproduced' if held else 'NOT here  '}  {text}" for held, text in claims]


def table(results: dict[str, dict[str, dict]], every: int) -> str:
    rows = [["", "T", "solved at step", "error", "on torch.nn", "step, torch.nn", "step, fusedrnn"]]
    for name, by_length in results.items():
        for steps, r in by_length.items():
            at = solved_at(r["curve"], every)
            rows.append(
                [
                    name,
                    steps,
                    "-" if at is None else str(at),
                    *(
                        f"{error:.4f}" if error < 10 else f"{error:.0e}"
                        for error in (r["error_fused"], r["error_torch"])
                    ),
                    program.milliseconds(r["step_torch"]),
                    program.milliseconds(r["step_fused"]),
                ]
            )
    return program.aligned(rows)


def picture(norms: dict[str, list[float]], curves: dict[str, dict[str, list[float]]], every: int):
    plt = program.pyplot()
    lengths = list(curves["LSTM"])
    figure, axes = plt.subplots(1, 1 + len(lengths), figsize=(17, 4.2), layout="constrained")
    for name, values in norms.items():
        axes[0].plot(range(len(values)), values, color=COLORS[name], label=name)
    axes[0].set_yscale("log")
    axes[0].set_ylim(1e-12, 1e3)
    axes[0].set_xlabel("lag, steps")
    axes[0].set_title("gradient norm / that of lag 0, untrained")
    axes[0].legend()
    for axis, steps in zip(axes[1:], lengths, strict=True):
        for name, by_length in curves.items():
            values = by_length[steps]
            axis.plot([i * every for i in range(len(values))], values, color=COLORS[name])
        axis.axhline(1 / 6, color="black", linewidth=0.8, linestyle=":")
        axis.set_yscale("log")
        axis.set_ylim(1e-4, 1)
        axis.set_xlabel("training steps")
        axis.set_title(f"adding, T = {steps}: mean squared error")
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = program.options(__doc__, rounds=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--lags", type=int, default=400)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=50, help="steps from error to error")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=64)
    args = parser.parse_args(argv)
    if args.tiny:
        args.lengths, args.lags, args.steps, args.every = [6, 10], 60, 20, 10
        args.hidden, args.rounds = 16, 2
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    program.start(args)
    norms = {name: gradient_norms(name, args.lags, args.hidden) for name in COLORS}
    print("gradient norm by lag, over that of lag 0:")
    shown = [lag for lag in (1, 10, 50, 100, 200, 400) if lag < args.lags] + [args.lags - 1]
    for name, values in norms.items():
        print(f"{name:>9}  " + "  ".join(f"{lag}: {values[lag]:.1e}" for lag in shown))
    results: dict[str, dict[str, dict]] = {}
    for name in COLORS:
        results[name] = {}
        for steps in args.lengths:
            model, curve = train(name, steps, args)
            found = {"curve": curve, **compare_layers(model, steps, args)}
            results[name][str(steps)] = found
            print(f"{name}, T = {steps}: error {curve[-1]:.4f}", flush=True)
    curves = {name: {t: r["curve"] for t, r in by.items()} for name, by in results.items()}
    print()
    print(table(results, args.every))
    print()
    print("\n".join(verdicts(norms, curves)))
    everything = {"norms": norms, "adding": results}
    program.save("long_memory", args, picture(norms, curves, args.every), everything)


if __name__ == "__main__":
    main()
