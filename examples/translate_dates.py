"""Dates as people write them in 26 places of the world, into ISO 8601: an encoder and a decoder.

Three models of one size: without attention, all of a date squeezed into one state; with Luong's
attention; with Bahdanau's. The program prints exact matches on dates that no model has seen, by
length of the text, the same weights' results and speed on torch.nn's layers, and draws where the
decoder looks.

    make example-translate_dates          # or: python examples/translate_dates.py --help
"""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor

import program
from fusedrnn import models

try:
    import babel  # noqa: F401
except ImportError as error:
    program.missing(error)

from date_text import END, START, TARGET_SIZE, Batch, Example, Vocabulary, iso_of, make_examples
from torch_layers import on_torch_layers, step_seconds

ATTENTIONS = {"no attention": None, "Luong": "general", "Bahdanau": "bahdanau"}
LENGTHS = ((0, 10), (11, 15), (16, 25), (26, 99))  # characters of a text


def build(attention: str | None, vocabulary: Vocabulary, hidden: int) -> models.Seq2Seq:
    torch.manual_seed(0)
    encoder = models.Encoder(
        hidden // 2, hidden, num_embeddings=len(vocabulary), padding_idx=0, bidirectional=True
    )
    decoder = models.AttentionDecoder(
        TARGET_SIZE,
        hidden // 2,
        hidden,
        None if attention is None else encoder.output_size,
        attention=attention,
    )
    models.forget_gate_bias_(encoder)
    models.forget_gate_bias_(decoder)
    return models.Seq2Seq(encoder, decoder)


def loss_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    logits, _ = model(batch.source, batch.given, batch.source_lengths)
    return models.sequence_cross_entropy(logits, batch.wanted)


def train(
    name: str, model: models.Seq2Seq, examples: list[Example], vocabulary: Vocabulary, args
) -> list[float]:
    draw = random.Random(args.seed)

    def batch_loss() -> Tensor:
        return loss_of(model, vocabulary.batch(draw.sample(examples, args.batch)))

    return program.fit(name, model, batch_loss, args.steps, args.rate)


@torch.no_grad()
def translate(model: torch.nn.Module, batch: Batch) -> tuple[list[str], Tensor | None]:
    state, memory = model.encode(batch.source, batch.source_lengths)
    found = models.greedy(model.decoder, state, memory, start=START, end=END, max_length=11)
    return [iso_of(tokens) for tokens in found.tokens.tolist()], found.attention


def exact_matches(
    model: torch.nn.Module, examples: list[Example], vocabulary: Vocabulary
) -> list[bool]:
    right = []
    for i in range(0, len(examples), 512):
        part = examples[i : i + 512]
        texts, _ = translate(model, vocabulary.batch(part))
        right += [text == e.iso for text, e in zip(texts, part, strict=True)]
    return right


def share(values: list[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")


def by_length(right: list[bool], examples: list[Example]) -> list[float]:
    pairs = list(zip(right, examples, strict=True))
    return [share([r for r, e in pairs if low <= len(e.text) <= high]) for low, high in LENGTHS]


def compare_layers(
    model: models.Seq2Seq, held_out: list[Example], vocabulary: Vocabulary, args
) -> dict[str, float]:
    """The same weights on torch.nn's layers: exact matches, and a training step's time."""
    plain = on_torch_layers(model)
    batch = vocabulary.batch(held_out[: args.batch])

    seconds = step_seconds(
        {"torch": plain, "fused": model}, lambda side: loss_of(side, batch), args.rounds
    )
    return {
        "exact_torch": share(exact_matches(plain, held_out, vocabulary)),
        "step_torch": seconds["torch"],
        "step_fused": seconds["fused"],
    }


def picture(found: dict[str, models.Seq2Seq], examples: list[Example], vocabulary: Vocabulary):
    """Where the two attentions look, for one date in each of three places."""
    plt = program.pyplot()
    # CJK characters are no part of matplotlib's own fonts.
    shown = [
        max(texts, key=lambda e: len(e.text))
        for wanted in ("de_DE", "en_US", "fr_FR")
        if (texts := [e for e in examples if e.locale == wanted])
    ]
    names = [name for name in found if ATTENTIONS[name] is not None]
    figure, axes = plt.subplots(
        len(shown), len(names), figsize=(7 * len(names), 3.4 * len(shown)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, example in zip(axes, shown, strict=True):
        for axis, name in zip(row, names, strict=True):
            (text,), attention = translate(found[name], vocabulary.batch([example]))
            axis.imshow(attention[0].numpy(), cmap="Blues", aspect="auto", vmin=0, vmax=1)
            labels = [f"<{example.locale}>", *example.text]
            axis.set_xticks(range(len(labels)), labels, fontsize=8)
            axis.set_yticks(range(len(text) + 1), [*text, "end"], fontsize=8)
            axis.set_title(f"{name}: {example.text!r} -> {text}", fontsize=9)
            axis.tick_params(axis="x", rotation=90)
    return figure


def table(results: dict[str, dict]) -> str:
    spans = [f"{low}-{high} chars" if high < 99 else f"{low}+ chars" for low, high in LENGTHS]
    head = ["", "exact", *spans, "torch.nn layers", "step, torch.nn", "step, fusedrnn"]
    rows = [head]
    for name, r in results.items():
        rows.append(
            [
                name,
                f"{r['exact']:.2%}",
                *(f"{v:.2%}" for v in r["by_length"]),
                f"{r['exact_torch']:.2%}",
                program.milliseconds(r["step_torch"]),
                program.milliseconds(r["step_fused"]),
            ]
        )
    return program.aligned(rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = program.options(__doc__, rounds=15)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--rate", type=float, default=4e-3)
    args = parser.parse_args(argv)
    if args.tiny:
        args.steps, args.batch, args.hidden, args.examples, args.rounds = 12, 32, 16, 400, 2
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    program.start(args)
    examples, held_out = make_examples(args.examples, args.seed)
    held_out = held_out[:4096]
    vocabulary = Vocabulary(examples + held_out)
    print(f"{len(examples)} dates to learn from, {len(held_out)} held out, on other days;")
    print(f"{len(vocabulary)} source tokens; for example")
    for example in examples[:4]:
        print(f"    {example.locale}  {example.text}  ->  {example.iso}")
    results, found = {}, {}
    for name, attention in ATTENTIONS.items():
        model = build(attention, vocabulary, args.hidden)
        losses = train(name, model, examples, vocabulary, args)
        model.eval()
        right = exact_matches(model, held_out, vocabulary)
        results[name] = {
            "exact": share(right),
            "by_length": by_length(right, held_out),
            "losses": losses,
            **compare_layers(model, held_out, vocabulary, args),
        }
        found[name] = model
        print(f"{name}: {results[name]['exact']:.2%} of the held-out dates right", flush=True)
    print()
    print(table(results))
    program.save("translate_dates", args, picture(found, held_out, vocabulary), results)


if __name__ == "__main__":
    main()
