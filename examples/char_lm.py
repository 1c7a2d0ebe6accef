"""Train one character-level language model twice: with torch.nn and with fusedrnn.convert.

Both models start from the same weights and see the same batches of real English text, the
language reference that comes with CPython (``pydoc_data.topics``). They take turns in blocks of
steps, each with its own clock, so that neither gets the quiet machine for itself. The program
ends with a table, a sample of generated text and a picture of loss against time, and it fails
(exit status 1) if the two loss curves do not agree.

Run it with ``make demo``, or ``python examples/char_lm.py --help`` for its options.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedrnn
from char_lm_report import SIDES, Run, picture, table
from char_lm_text import Corpus, load_corpus

SETTLE_SECONDS = 0.02  # another runtime's spinning threads go to sleep in this time
EARLY_STEPS, EARLY_TOLERANCE = 50, 1e-3
END_TOLERANCE = 1e-2


# --- model ------------------------------------------------------------------------------------


class CharModel(nn.Module):
    """embedding -> layers of LSTM or GRU -> linear."""

    def __init__(self, cell: str, alphabet: int, embed: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, embed)
        self.rnn = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](embed, hidden, layers)
        self.head = nn.Linear(hidden, alphabet)

    def forward(self, chars: Tensor, state=None):
        """Logits (T, B, alphabet) of the next character, and the state after the last."""
        output, state = self.rnn(self.embedding(chars), state)
        return self.head(output), state


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build_pair(cell: str, corpus: Corpus, args: argparse.Namespace) -> dict[str, CharModel]:
    """The same model twice, from the same weights: as it is, and converted."""
    torch.manual_seed(args.seed)
    plain = CharModel(cell, len(corpus.alphabet), args.embed, args.hidden, args.layers)
    fused = fusedrnn.convert(copy.deepcopy(plain))  # <- the one line that switches a model
    if not type(fused.rnn).__module__.startswith("fusedrnn"):
        raise SystemExit(f"fusedrnn.convert left {type(fused.rnn)} as it was")
    return {"torch.nn": plain, "fusedrnn": fused}


# --- training ---------------------------------------------------------------------------------


class Trainer:
    """A model with its optimiser and its record."""

    def __init__(self, model: CharModel, corpus: Corpus, args: argparse.Namespace) -> None:
        self.model, self.corpus, self.args = model, corpus, args
        self.optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        self.run = Run()

    def gradients(self, step: int) -> float:
        inputs, targets = self.corpus.batch(step, self.args.batch, self.args.length, self.args.seed)
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.model(inputs)[0], targets)
        loss.backward()
        return loss.item()

    def step(self, step: int) -> float:
        loss = self.gradients(step)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss

    def block(self, steps: range) -> None:
        """Train for these steps; the clock runs only here."""
        time.sleep(SETTLE_SECONDS)
        self.gradients(steps[0])  # an untimed call, which changes no weight
        before = self.run.clock[-1] if self.run.clock else 0.0
        start = time.perf_counter()
        for step in steps:
            self.run.losses.append(self.step(step))
            self.run.clock.append(before + time.perf_counter() - start)
        self.run.block_seconds.append(self.run.clock[-1] - before)

    @torch.no_grad()
    def validate(self) -> None:
        """Mean loss over the whole held-out text, read in 16 parallel streams, state carried."""
        rows, length = 16, 100
        columns = (len(self.corpus.valid) - 1) // rows
        inputs = self.corpus.valid[: rows * columns].view(rows, columns).t()
        targets = self.corpus.valid[1 : rows * columns + 1].view(rows, columns).t()
        total, state = 0.0, None
        for t in range(0, columns, length):
            logits, state = self.model(inputs[t : t + length], state)
            part = targets[t : t + length]
            total += loss_of(logits, part).item() * part.numel()
        clock = self.run.clock[-1] if self.run.clock else 0.0
        self.run.valid.append((clock, total / targets.numel()))


def train_pair(cell: str, corpus: Corpus, args: argparse.Namespace) -> dict[str, Trainer]:
    from tqdm import tqdm

    models = build_pair(cell, corpus, args)
    trainers = {side: Trainer(models[side], corpus, args) for side in SIDES}
    blocks = [range(s, min(s + args.block, args.steps)) for s in range(0, args.steps, args.block)]
    with tqdm(total=args.steps, desc=f"{cell.upper()}: both", unit="step") as bar:
        for number, steps in enumerate(blocks):
            # Whoever comes first in one block comes second in the next.
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                trainers[side].block(steps)
            if steps.stop % args.validate_every < args.block or steps.stop == args.steps:
                for trainer in trainers.values():
                    trainer.validate()
            plain, fused = (trainers[side].run for side in SIDES)
            bar.update(len(steps))
            bar.set_postfix_str(
                f"loss {plain.losses[-1]:.3f} / {fused.losses[-1]:.3f}, "
                f"speed-up {plain.clock[-1] / fused.clock[-1]:.2f}"
            )
    return trainers


def disagreement(plain: Run, fused: Run) -> list[str]:
    """What is wrong between two loss curves that should be one; empty if nothing is.

    Rounding alone pulls two runs slowly apart, so the first steps are compared one by one and the
    end as means.
    """

    def apart(a: float, b: float) -> float:
        # not abs(): a NaN must count as apart
        return abs(a - b) / abs(a) if a == a and b == b else float("inf")

    problems = []
    early = [
        apart(a, b)
        for a, b in zip(plain.losses[:EARLY_STEPS], fused.losses[:EARLY_STEPS], strict=True)
    ]
    if max(early) > EARLY_TOLERANCE:
        step = early.index(max(early))
        problems.append(
            f"step {step}: loss {plain.losses[step]:.6f} with torch.nn, {fused.losses[step]:.6f} "
            f"with fusedrnn: {early[step]:.1e} apart, {EARLY_TOLERANCE:.0e} allowed"
        )
    tail = max(1, len(plain.losses) // 10)
    ends = {
        f"training loss over the last {tail} steps": [
            statistics.fmean(run.losses[-tail:]) for run in (plain, fused)
        ],
        "validation loss": [run.valid[-1][1] for run in (plain, fused)],
    }
    for name, (a, b) in ends.items():
        if apart(a, b) > END_TOLERANCE:
            problems.append(
                f"{name}: {a:.5f} with torch.nn, {b:.5f} with fusedrnn: "
                f"{apart(a, b):.1e} apart, {END_TOLERANCE:.0e} allowed"
            )
    return problems


# --- memory -----------------------------------------------------------------------------------


def resident_mib(key: str) -> float:
    """VmRSS (now) or VmHWM (the highest so far) of this process."""
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{key}:\s+(\d+) kB", text)
    if match is None:
        raise RuntimeError(f"no {key} in /proc/self/status")
    return int(match[1]) / 1024


def memory_probe(side: str, cell: str, corpus: Corpus, args: argparse.Namespace) -> float:
    """Peak resident memory of three training steps above the process that is ready to start.

    Runs in a process of its own, as a peak is never forgotten within one. A miniature step comes
    first: it loads the libraries' code, which is no part of what training needs.
    """
    trainer = Trainer(build_pair(cell, corpus, args)[side], corpus, args)
    inputs, targets = corpus.batch(0, 1, 2, args.seed)
    loss_of(trainer.model(inputs)[0], targets).backward()
    trainer.optimizer.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from here
    ready = resident_mib("VmRSS")
    for step in range(3):
        trainer.step(step)
    return resident_mib("VmHWM") - ready


def measure_memory(side: str, cell: str, argv: list[str]) -> float | None:
    command = [sys.executable, __file__, *argv, "--cells", cell, "--memory-probe", side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"peak memory of {side} not measured:\n{done.stderr}", file=sys.stderr)
        return None
    return float(done.stdout.split()[-1])


# --- generation -------------------------------------------------------------------------------


@torch.no_grad()
def generate(model: CharModel, corpus: Corpus, args: argparse.Namespace, prompt: str) -> str:
    generator = torch.Generator().manual_seed(args.seed)
    logits, state = model(corpus.encode(prompt).unsqueeze(1))
    text = [prompt]
    for _ in range(args.sample_chars):
        chances = (logits[-1, 0] / args.temperature).softmax(-1)
        char = torch.multinomial(chances, 1, generator=generator)
        text.append(corpus.alphabet[int(char)])
        logits, state = model(char.unsqueeze(1), state)
    return "".join(text)


def sample_pair(trainers: dict[str, Trainer], corpus: Corpus, args: argparse.Namespace) -> None:
    """A sample from each side, three times in turn, with the median of its speed."""
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(3):
        for side, trainer in trainers.items():
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            trainer.run.sample = generate(trainer.model, corpus, args, "The ")
            speeds[side].append(args.sample_chars / (time.perf_counter() - start))
    for side, trainer in trainers.items():
        trainer.run.sample_chars_per_second = statistics.median(speeds[side])


# --- main -------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", choices=["lstm", "gru"], default=["lstm", "gru"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    parser.add_argument("--length", type=int, default=100, help="characters a sequence")
    parser.add_argument("--embed", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--block", type=int, default=20, help="steps before the sides take turns")
    parser.add_argument("--validate-every", type=int, default=60, help="in steps")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--sample-chars", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--tiny", action="store_true", help="a few seconds, for the tests")
    parser.add_argument("--memory-probe", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.corpus_chars = None
    if args.tiny:
        args.steps, args.batch, args.length, args.embed = min(args.steps, 12), 4, 16, 8
        args.hidden, args.block, args.validate_every, args.sample_chars = 24, 4, 8, 40
        args.corpus_chars = 20_000
        args.threads = 1  # nothing here is worth two
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    corpus = load_corpus(args.corpus_chars)
    if args.memory_probe:
        print(memory_probe(args.memory_probe, args.cells[0], corpus, args))
        return 0

    print(
        f"text: {len(corpus.train):,} characters to train on, {len(corpus.valid):,} held out, "
        f"{len(corpus.alphabet)} different ones"
    )
    results: dict[str, dict[str, Run]] = {}
    problems: list[str] = []
    for cell in args.cells:
        trainers = train_pair(cell, corpus, args)
        sample_pair(trainers, corpus, args)
        results[cell] = {side: trainer.run for side, trainer in trainers.items()}
        if not args.no_memory:
            for side in SIDES:
                results[cell][side].memory_mib = measure_memory(side, cell, argv)
        found = disagreement(*(results[cell][side] for side in SIDES))
        problems += [f"{cell.upper()}: {problem}" for problem in found]

    print()
    print(table(results, args.batch * args.length * args.steps))
    for cell in args.cells:
        print(f"\n--- {cell.upper()} with fusedrnn writes, temperature {args.temperature}: ---")
        print(results[cell]["fusedrnn"].sample)
    picture(results, args, args.out / "char_lm.png")
    options = {k: v for k, v in vars(args).items() if isinstance(v, int | float | list)}
    runs = {cell: {s: asdict(r) for s, r in pair.items()} for cell, pair in results.items()}
    (args.out / "char_lm.json").write_text(json.dumps({"options": options, "runs": runs}))
    print(f"\nloss against time: {args.out / 'char_lm.png'}")

    if problems:
        print("\nTHE TWO LOSS CURVES DO NOT AGREE:", *problems, sep="\n  ", file=sys.stderr)
        return 1
    print(
        f"The two loss curves agree: to {EARLY_TOLERANCE:.0e} in each of the first "
        f"{min(EARLY_STEPS, args.steps)} steps, to {END_TOLERANCE:.0%} at the end."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
