"""Messages of programs and names of places, from English to German and French: real translations.

One model writes both languages; the decoder's first token says which. A residual bidirectional
encoder of two LSTM layers reads subwords; a decoder of two writes them: once with Luong's
attention, once from the encoder's last state alone. BLEU and chrF (sacrebleu) of a beam search on
sources that neither has seen, beside what copying the English scores: names are often the same.

    make example-translate_messages          # or: python examples/translate_messages.py --help
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import program
from fusedrnn import models

try:
    import babel  # noqa: F401
    import django  # noqa: F401
    import pycountry  # noqa: F401
    import sacrebleu
    import tokenizers  # noqa: F401
except ImportError as error:
    program.missing(error)

from tqdm import tqdm

from message_text import (
    END,
    LANGUAGES,
    PADDING,
    SOURCES,
    Batch,
    Pair,
    Subwords,
    batches,
    load,
    start_of,
)  # fmt: skip
from torch_layers import on_torch_layers, step_seconds

ATTENTIONS = {"last state alone": None, "Luong's attention": "general"}
KINDS = tuple(dict.fromkeys(SOURCES.values()))


def build(attention: str | None, vocabulary: int, args: argparse.Namespace) -> models.Seq2Seq:
    torch.manual_seed(args.seed)
    shape = {"num_layers": 2, "residual": True, "dropout": args.dropout}
    encoder = models.Encoder(
        args.hidden,
        args.hidden // 2,
        num_embeddings=vocabulary,
        padding_idx=PADDING,
        bidirectional=True,
        **shape,
    )
    decoder = models.AttentionDecoder(
        vocabulary,
        args.hidden,
        args.hidden,
        None if attention is None else encoder.output_size,
        attention=attention,
        attention_scale=args.hidden**-0.5,
        padding_idx=PADDING,
        **shape,
    )
    models.forget_gate_bias_(encoder)
    models.forget_gate_bias_(decoder)
    return models.Seq2Seq(encoder, decoder)


def loss_of(model: nn.Module, batch: Batch, smoothing: float = 0.1) -> Tensor:
    logits, _ = model(batch.source, batch.given, batch.source_lengths)
    return models.sequence_cross_entropy(
        logits, batch.wanted, batch.lengths, label_smoothing=smoothing
    )


@torch.no_grad()
def translate(model: nn.Module, pairs: list[Pair], subwords: Subwords, beam_size: int) -> list[str]:
    """The best hypothesis for each pair's source, in its language."""
    found: dict[int, str] = {}
    model.eval()
    # Rows of about one length together; one language at a time, as the start token is its own.
    order = sorted(range(len(pairs)), key=lambda i: (pairs[i].language, len(pairs[i].source)))
    groups = [
        part[i : i + 64]
        for language in LANGUAGES
        if (part := [j for j in order if pairs[j].language == language])
        for i in range(0, len(part), 64)
    ]
    for group in tqdm(groups, desc="translating", disable=None, leave=False):
        batch = subwords.batch([pairs[i] for i in group])
        state, memory = model.encode(batch.source, batch.source_lengths)
        best = models.beam_search(
            model.decoder,
            state,
            memory,
            start=start_of(pairs[group[0]].language),
            end=END,
            max_length=2 * batch.source.shape[1] + 10,
            beam_size=beam_size,
            length_penalty=1.0,
        )
        for i, tokens in zip(group, best.tokens[:, 0].tolist(), strict=True):
            found[i] = subwords.text(tokens)
    model.train()
    return [found[i] for i in range(len(pairs))]


def scores(texts: list[str], pairs: list[Pair]) -> dict[str, dict[str, float]]:
    """By "language kind": BLEU, chrF and the share of exact matches."""
    result = {}
    for language in LANGUAGES:
        for kind in KINDS:
            rows = [
                (text, pair.target)
                for text, pair in zip(texts, pairs, strict=True)
                if (pair.language, pair.kind) == (language, kind)
            ]
            if rows:
                found, wanted = map(list, zip(*rows, strict=True))
                result[f"{language} {kind}s"] = {
                    "bleu": sacrebleu.corpus_bleu(found, [wanted]).score,
                    "chrf": sacrebleu.corpus_chrf(found, [wanted]).score,
                    "exact": sum(a == b for a, b in rows) / len(rows),
                }
    return result


def table(results: dict[str, dict]) -> str:
    columns = list(results["copied"]["scores"])
    rows = [["BLEU / chrF / exact", *columns, "step, torch.nn", "step, fusedrnn"]]
    for name, r in results.items():
        row = [name]
        for column in columns:
            s = r["scores"][column]
            row.append(f"{s['bleu']:.1f} / {s['chrf']:.1f} / {s['exact']:.0%}")
        if "step_fused" in r:
            row += [program.milliseconds(r[key]) for key in ("step_torch", "step_fused")]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return program.aligned(rows)


def picture(model: models.Seq2Seq, pairs: list[Pair], subwords: Subwords):
    """Where the decoder looks, for a sentence in each language."""
    plt = program.pyplot()
    model.eval()
    shown = [
        max(
            (p for p in pairs if p.language == language and p.kind == "sentence"),
            key=lambda p: (len(p.source) <= 60, len(p.source)),
            default=pairs[0],
        )
        for language in LANGUAGES
    ]
    figure, axes = plt.subplots(1, len(shown), figsize=(8 * len(shown), 7), layout="constrained")
    for axis, pair in zip(axes, shown, strict=True):
        batch = subwords.batch([pair])
        with torch.no_grad():
            state, memory = model.encode(batch.source, batch.source_lengths)
            start = start_of(pair.language)
            found = models.greedy(model.decoder, state, memory, start=start, end=END, max_length=60)
        axis.imshow(found.attention[0].numpy(), cmap="Blues", aspect="auto", vmin=0, vmax=1)
        read = subwords.pieces(batch.source[0].tolist())
        written = subwords.pieces(found.tokens[0].tolist())
        axis.set_xticks(range(len(read)), read, fontsize=9, rotation=90)
        axis.set_yticks(range(len(written)), written, fontsize=9)
        axis.set_title(f"{pair.source}\n{pair.target} (the translator)", fontsize=9)
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = program.options(__doc__, rounds=7)
    parser.add_argument("--pairs", type=int, help="at most so many of either part")
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--beam", type=int, default=5)
    args = parser.parse_args(argv)
    if args.tiny:
        args.pairs, args.vocabulary, args.steps, args.batch = 60, 300, 10, 16
        args.hidden, args.rounds, args.beam = 16, 2, 2
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    program.start(args)
    try:
        pairs, held_out = load(args.seed, args.pairs)
    except ImportError as error:  # whose translations they are
        program.missing(error)
    subwords = Subwords(pairs, args.vocabulary)
    for name, part in (("to learn from", pairs), ("held out", held_out)):
        counts = ", ".join(f"{sum(p.kind == kind for p in part)} {kind}s" for kind in KINDS)
        print(f"{len(part)} pairs {name}: {counts}")
    results: dict[str, dict] = {
        "copied": {"scores": scores([p.source for p in held_out], held_out)}
    }
    shown: dict[str, list[str]] = {}
    for name, attention in ATTENTIONS.items():
        model = build(attention, len(subwords), args)
        drawn = batches(pairs, args.batch, args.seed)

        def batch_loss(model=model, drawn=drawn) -> Tensor:
            return loss_of(model, subwords.batch(next(drawn)))

        losses = program.fit(name, model, batch_loss, args.steps, args.rate)
        texts = translate(model, held_out, subwords, args.beam)
        plain = on_torch_layers(model)
        some = held_out[:256]
        batch = subwords.batch(next(drawn))
        seconds = step_seconds(
            {"torch": plain, "fused": model}, lambda side, b=batch: loss_of(side, b), args.rounds
        )
        same = zip(translate(plain, some, subwords, args.beam), texts, strict=False)
        results[name] = {
            "losses": losses,
            "scores": scores(texts, held_out),
            "same_on_torch": sum(a == b for a, b in same) / len(some),
            **{f"step_{side}": value for side, value in seconds.items()},
        }
        shown[name] = texts
    print()
    print(table(results))
    for name in ATTENTIONS:
        share = results[name]["same_on_torch"]
        print(f"{name}: on torch.nn's layers {share:.1%} of {len(some)} texts are the same")
    sentences = [i for i, p in enumerate(held_out) if p.kind == "sentence"][:6]
    for i in sentences:
        pair = held_out[i]
        print(f"\n{pair.source}\n    {pair.target} (the translator)")
        for name, texts in shown.items():
            print(f"    {texts[i]} ({name})")
    program.save("translate_messages", args, picture(model, held_out, subwords), results)


if __name__ == "__main__":
    main()
