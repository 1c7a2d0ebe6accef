"""Four voices in the manner of Bach's chorales: one-to-many, next-step prediction, generation.

An RNN, a GRU and an LSTM of one size read a chorale's four voices step by step, a sixteenth note
each, and predict the next step: soprano first, then each voice below given those above it. The
program prints the negative log-likelihood per step, all four voices, on chorales over hymns that
no model has seen, writes a chorale that the best model made up as MIDI and MusicXML, and draws it.

    make example-compose          # or: python examples/compose.py --help
"""

from __future__ import annotations

import argparse
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import program
from fusedrnn import models

try:
    import music21  # noqa: F401
except ImportError as error:
    program.missing(error)

from tqdm import tqdm

from chorale_text import (
    EDGE,
    FIRST,
    LOWEST,
    SHIFTS,
    STEPS_PER_QUARTER,
    TOKENS,
    VOICES,
    Batch,
    batch_of,
    load,
    notes_of,
    transposed,
    write,
)  # fmt: skip
from torch_layers import on_torch_layers, step_seconds

CELLS = {"RNN": "rnn", "GRU": "gru", "LSTM": "lstm"}
COLORS = {"RNN": "#64748b", "GRU": "#15803d", "LSTM": "#0369a1"}
VOICE_COLORS = ("#b91c1c", "#b45309", "#15803d", "#0369a1")


class Composer(nn.Module):
    """p(step t+1 | steps up to t): the voices' embeddings and the place in the quarter through a
    recurrent stack; each voice's logits from the state and the voices above it at t+1."""

    def __init__(self, cell: str, hidden: int, embedding: int = 32) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(TOKENS, embedding) for _ in VOICES)
        self.places = nn.Embedding(STEPS_PER_QUARTER, embedding)
        size = (len(VOICES) + 1) * embedding
        self.encoder = models.Encoder(size, hidden, cell=cell, num_layers=2, dropout=0.2)
        if cell == "lstm":
            models.forget_gate_bias_(self.encoder)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(hidden + above * embedding, hidden // 2),
                nn.Tanh(),
                nn.Linear(hidden // 2, TOKENS),
            )
            for above in range(len(VOICES))
        )

    def read(
        self, tokens: Tensor, lengths: Tensor | None = None, state=None, first: int = 0
    ) -> tuple[Tensor, object]:
        """States (B, T, H) after the tokens (B, T, 4), whose first stands at step `first`."""
        place = (torch.arange(tokens.shape[1]) + first) % STEPS_PER_QUARTER
        place = self.places(place).expand(tokens.shape[0], -1, -1)
        parts = [embed(tokens[..., v]) for v, embed in enumerate(self.embeddings)]
        return self.encoder(torch.cat([*parts, place], -1), lengths, state)

    def logits(self, states: Tensor, voice: int, above: list[Tensor]) -> Tensor:
        """(., tokens) of the next token of `voice`, from the states (., H) and the next tokens (.)
        of the voices above."""
        parts = [self.embeddings[v](tokens) for v, tokens in enumerate(above)]
        return self.heads[voice](torch.cat([states, *parts], -1))

    def forward(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of each voice, (4,), in nats, summed over the valid steps."""
        states, _ = self.read(batch.given, batch.lengths)
        valid = torch.arange(states.shape[1]) < batch.lengths[:, None]
        states, wanted = states[valid], batch.wanted[valid].unbind(-1)
        nats = [
            F.cross_entropy(self.logits(states, v, list(wanted[:v])), wanted[v], reduction="sum")
            for v in range(len(VOICES))
        ]
        return torch.stack(nats)

    @torch.no_grad()
    def compose(
        self, steps: int, temperature: float, generator: torch.Generator, lead: Tensor
    ) -> Tensor:
        """At most `steps` steps (T, 4), the first of them `lead` (S, 4); ends where the soprano
        draws EDGE."""
        music = [*lead]
        given = torch.cat([torch.full((1, len(VOICES)), EDGE), lead])
        states, state = self.read(given[None])
        while len(music) < steps:
            step: list[Tensor] = []
            for voice in range(len(VOICES)):
                logits = self.logits(states[:, -1], voice, step) / temperature
                if voice > 0:  # the soprano alone ends a piece
                    logits[:, EDGE] = -torch.inf
                step.append(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])
                if voice == 0 and step[0].item() == EDGE:
                    return torch.stack(music)
            music.append(torch.cat(step))
            states, state = self.read(music[-1][None, None], state=state, first=len(music))
        return torch.stack(music)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Nats per step, all voices."""
    return model(batch).sum() / batch.lengths.sum()


@torch.no_grad()
def likelihood(model: nn.Module, chorales: list[Tensor]) -> list[float]:
    """Nats per step of each voice, over all chorales."""
    model.eval()
    total, steps = torch.zeros(len(VOICES), dtype=torch.float64), 0
    for i in range(0, len(chorales), 16):
        batch = batch_of(chorales[i : i + 16])
        total += model(batch).double()
        steps += int(batch.lengths.sum())
    model.train()
    return (total / steps).tolist()


def counted(train: list[Tensor], held_out: list[Tensor]) -> list[float]:
    """The same, knowing no more than how often a token follows another in its voice."""
    given, wanted = (torch.cat(rows) for rows in zip(*map(pairs_of, train), strict=True))
    test_given, test_wanted = (
        torch.cat(rows) for rows in zip(*map(pairs_of, held_out), strict=True)
    )
    nats = []
    for v in range(len(VOICES)):
        counts = torch.bincount(given[:, v] * TOKENS + wanted[:, v], minlength=TOKENS**2)
        chances = counts.view(TOKENS, TOKENS).double() + 0.1
        chances /= chances.sum(1, keepdim=True)
        nats.append(-chances[test_given[:, v], test_wanted[:, v]].log().mean().item())
    return nats


def pairs_of(tokens: Tensor) -> tuple[Tensor, Tensor]:
    batch = batch_of([tokens])
    return batch.given[0], batch.wanted[0]


def train(
    name: str, cell: str, chorales: list[Tensor], held_out: list[Tensor], args: argparse.Namespace
) -> tuple[Composer, list[list[float]]]:
    """The model, and (step, nats per step on the held-out chorales) on the way."""
    torch.manual_seed(args.seed)
    draw = random.Random(args.seed)
    model = Composer(cell, args.hidden)
    curve: list[list[float]] = []
    count = 0

    def batch_loss() -> Tensor:
        nonlocal count
        if count % args.every == 0:
            curve.append([count, sum(likelihood(model, held_out))])
        count += 1
        chosen = draw.sample(chorales, min(args.batch, len(chorales)))
        return loss_of(model, batch_of([transposed(c, draw.choice(SHIFTS)) for c in chosen]))

    program.fit(name, model, batch_loss, args.steps, args.rate)
    curve.append([count, sum(likelihood(model, held_out))])
    return model, curve


def table(results: dict[str, dict]) -> str:
    rows = [["nats a step", "all voices", *VOICES]]
    rows[0] += ["on torch.nn", "step, torch.nn", "step, fusedrnn"]
    for name, r in results.items():
        row = [name, *(f"{value:.3f}" for value in (sum(r["nats"]), *r["nats"]))]
        if "step_fused" in r:
            row.append(f"{sum(r['nats_torch']):.3f}")
            row += [program.milliseconds(r[key]) for key in ("step_torch", "step_fused")]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return program.aligned(rows)


def picture(results: dict[str, dict], music: Tensor, composer: str):
    plt = program.pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(15, 4.6), width_ratios=[1, 2.4], layout="constrained"
    )
    for name, r in results.items():
        if "curve" in r:
            left.plot(*zip(*r["curve"], strict=True), color=COLORS[name], label=name)
        else:
            left.axhline(sum(r["nats"]), color="black", linewidth=0.8, linestyle=":", label=name)
    highest = max(sum(r["nats"]) for r in results.values())
    lowest = min(sum(r["nats"]) for r in results.values())
    left.set_ylim(lowest * 0.9, highest * 1.4)
    left.set_xlabel("training steps")
    left.set_title("held-out chorales, nats a step")
    left.legend()
    for voice, color in enumerate(VOICE_COLORS):
        for begin, steps, pitch in notes_of(music[:, voice].tolist()):
            if pitch is not None:
                quarters = [x / STEPS_PER_QUARTER for x in (begin, steps)]
                right.broken_barh(
                    [(quarters[0] + 0.04, quarters[1] - 0.08)], (pitch - 0.4, 0.8), color=color
                )
        right.plot([], [], color=color, linewidth=5, label=VOICES[voice])
    octaves = range(36, 85, 12)
    right.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])
    right.grid(axis="y", linewidth=0.4)
    right.set_xlabel("quarter notes")
    right.set_title(f"made up by the {composer}")
    right.legend(ncols=4, loc="lower center", fontsize=8)
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = program.options(__doc__, rounds=7)
    parser.add_argument("--chorales", type=int, default=400, help="at most so many")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=50, help="steps from score to score")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--temperature", type=float, default=0.8, help="of the composition")
    parser.add_argument("--length", type=int, default=256, help="its steps, at most")
    args = parser.parse_args(argv)
    if args.tiny:
        args.chorales, args.steps, args.every, args.batch = 8, 10, 5, 4
        args.hidden, args.rounds, args.length = 16, 2, 40
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    program.start(args)
    known, unknown = load(
        args.chorales, args.seed, lambda works: tqdm(works, desc="chorales", disable=None)
    )
    chorales, held_out = [c.tokens for c in known], [c.tokens for c in unknown]
    print(f"{len(chorales)} chorales to learn from, {len(held_out)} over other hymns held out")
    results: dict[str, dict] = {"counted pairs": {"nats": counted(chorales, held_out)}}
    found: dict[str, Composer] = {}
    for name, cell in CELLS.items():
        model, curve = train(name, cell, chorales, held_out, args)
        plain = on_torch_layers(model)
        batch = batch_of(chorales[: args.batch])
        seconds = step_seconds(
            {"torch": plain, "fused": model}, lambda side, b=batch: loss_of(side, b), args.rounds
        )
        results[name] = {
            "nats": likelihood(model, held_out),
            "nats_torch": likelihood(plain, held_out),
            "curve": curve,
            **{f"step_{side}": value for side, value in seconds.items()},
        }
        found[name] = model
        print(f"{name}: {sum(results[name]['nats']):.3f} nats a step", flush=True)
    best = min(found, key=lambda name: sum(results[name]["nats"]))
    lead = torch.tensor([[72, 67, 64, 48]]) - LOWEST + FIRST  # a chord of C major
    generator = torch.Generator().manual_seed(args.seed)
    music = found[best].eval().compose(args.length, args.temperature, generator, lead)
    paths = write(music, args.out, "compose")
    print()
    print(table(results))
    print(f"\nthe {best} made up {len(music) / STEPS_PER_QUARTER:g} quarter notes")
    print("written:", ", ".join(str(path) for path in paths))
    program.save("compose", args, picture(results, music, best), results)


if __name__ == "__main__":
    main()
