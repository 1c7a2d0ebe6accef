"""Dates as people write them, in many languages, and the same dates in ISO 8601.

The writing is Babel's, from Unicode's CLDR. The same digits mean different dates in different
places, so each text starts with a token for its locale. Two digits of a year stand for 1970..2069.
"""

from __future__ import annotations

import datetime
import random
from dataclasses import dataclass

import torch
from torch import Tensor

LOCALES = (
    "en_US", "en_GB", "de_DE", "fr_FR", "es_ES", "it_IT", "pt_BR", "nl_NL", "sv_SE", "da_DK",
    "fi_FI", "pl_PL", "cs_CZ", "hu_HU", "ro_RO", "hr_HR", "tr_TR", "ru_RU", "uk_UA", "el_GR",
    "bg_BG", "vi_VN", "id_ID", "ja_JP", "zh_CN", "ko_KR",
)  # fmt: skip
STYLES = ("short", "medium", "long", "full")
FIRST, LAST = datetime.date(1970, 1, 1), datetime.date(2069, 12, 31)

PADDING, START, END = 0, 1, 2
TARGET_ALPHABET = "0123456789-"
TARGET_SIZE = 3 + len(TARGET_ALPHABET)


def format_date(date: datetime.date, style: str, locale: str) -> str:
    from babel.dates import format_date as babels

    return babels(date, style, locale=locale)


@dataclass(frozen=True)
class Example:
    locale: str
    text: str
    iso: str


@dataclass(frozen=True)
class Batch:
    source: Tensor  # (B, S)
    source_lengths: Tensor  # (B,)
    given: Tensor  # (B, T): START, then the date
    wanted: Tensor  # (B, T): the date, then END


class Vocabulary:
    """Tokens of the source: one for each locale, one for each character ever written."""

    def __init__(self, examples: list[Example]) -> None:
        characters = sorted({c for example in examples for c in example.text})
        self.names = ["", *LOCALES, *characters]
        self._index = {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def tokens(self, example: Example) -> list[int]:
        return [self._index[example.locale], *(self._index[c] for c in example.text)]

    def batch(self, examples: list[Example]) -> Batch:
        rows = [torch.tensor(self.tokens(example)) for example in examples]
        dates = torch.tensor([[3 + TARGET_ALPHABET.index(c) for c in e.iso] for e in examples])
        edge = torch.full((len(examples), 1), START)
        return Batch(
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING),
            torch.tensor([len(row) for row in rows]),
            torch.cat([edge, dates], 1),
            torch.cat([dates, torch.full_like(edge, END)], 1),
        )


def iso_of(tokens: list[int]) -> str:
    """The text of generated tokens, up to the end token."""
    stop = tokens.index(END) if END in tokens else len(tokens)
    return "".join(TARGET_ALPHABET[t - 3] if t >= 3 else "?" for t in tokens[:stop])


def make_examples(count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples. A tenth of all days is held out, in every locale and style:
    no held-out date was ever seen."""
    draw = random.Random(seed)
    days = (LAST - FIRST).days + 1
    held_days = set(draw.sample(range(days), days // 10))
    train, held_out = [], []
    while len(train) < count:
        day = draw.randrange(days)
        date = FIRST + datetime.timedelta(day)
        locale = draw.choice(LOCALES)
        text = format_date(date, draw.choice(STYLES), locale)
        example = Example(locale, text, date.isoformat())
        (held_out if day in held_days else train).append(example)
    return train, held_out
