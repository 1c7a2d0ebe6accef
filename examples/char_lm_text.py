"""The text of char_lm.py: real English that needs no download."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Corpus:
    """Characters as numbers; no paragraph of `valid` occurs in `train`."""

    alphabet: list[str]
    train: Tensor
    valid: Tensor

    def batch(self, step: int, rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (length, rows) of one step: the same for everyone who asks."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - length, (rows,), generator=generator)
        crops = torch.stack([self.train[s : s + length + 1] for s in starts.tolist()], dim=1)
        return crops[:-1], crops[1:]

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.alphabet.index(c) for c in text])


def load_corpus(max_chars: int | None = None) -> Corpus:
    """CPython's language reference without its drawn tables, a tenth of it held out.

    Its topics quote one another at length, so each paragraph is kept once only, where it comes
    first: otherwise a part of the held-out text would have been seen in training. Of every ten
    pieces of about 4,000 characters the last is held out.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    pieces = [""]
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            key = " ".join(paragraph.split())
            if not key or key in seen or re.search(r"^\s*[+|]", paragraph, re.MULTILINE):
                continue
            seen.add(key)
            pieces[-1] += textwrap.dedent(paragraph).strip() + "\n\n"
            if len(pieces[-1]) > 4000:
                pieces.append("")
    train = "".join(p for i, p in enumerate(pieces) if i % 10 != 9)[:max_chars]
    valid = "".join(pieces[9::10])[:max_chars]
    alphabet = sorted(set(train + valid))
    index = {c: i for i, c in enumerate(alphabet)}
    return Corpus(
        alphabet, torch.tensor([index[c] for c in train]), torch.tensor([index[c] for c in valid])
    )
