"""What programs say, in English, German and French: the message catalogues of Django and Wagtail
(sentences), and the names of countries, regions, languages and currencies that pycountry carries.

Translators wrote them all. Catalogues are read by Babel, texts become subwords by a byte-level BPE
(Sennrich et al. 2016) of the package tokenizers, learnt from the training part alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

LANGUAGES = ("de", "fr")
SOURCES = {"django": "sentence", "wagtail": "sentence", "pycountry": "name"}
SPECIAL = ["<pad>", "<end>", *(f"<{language}>" for language in LANGUAGES)]
PADDING, END = 0, 1
MOST_CHARACTERS = 160  # of a text; a dozen longer ones are left out


def start_of(language: str) -> int:
    """The decoder's first token says which language to write."""
    return SPECIAL.index(f"<{language}>")


@dataclass(frozen=True)
class Pair:
    kind: str  # "sentence" or "name"
    language: str
    source: str
    target: str


def catalogue(path: Path) -> Iterator[tuple[str, str]]:
    """(English, translation) of a compiled catalogue; of plurals both forms."""
    from babel.messages.mofile import read_mo

    with open(path, "rb") as file:
        for message in read_mo(file):
            ids = message.id if isinstance(message.id, (tuple, list)) else [message.id]
            texts = (
                message.string if isinstance(message.string, (tuple, list)) else [message.string]
            )
            for source, target in zip(
                ids, texts, strict=False
            ):  # French has two forms, others more
                source, target = (" ".join(text.split()) for text in (source, target or ""))
                if source and target and max(len(source), len(target)) <= MOST_CHARACTERS:
                    yield source, target


def load(seed: int, most: int | None = None) -> tuple[list[Pair], list[Pair]]:
    """Pairs to learn from and a tenth of the sources held out, in both languages."""
    found: dict[tuple[str, str], Pair] = {}
    for package, kind in SOURCES.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(name=package)
        root = Path(spec.submodule_search_locations[0])
        for language in LANGUAGES:
            for path in sorted(root.glob(f"**/{language}/LC_MESSAGES/*.mo")):
                for source, target in catalogue(path):
                    pair = Pair(kind, language, source, target)
                    found.setdefault((language, source), pair)  # the first translation counts
    sources = sorted({pair.source for pair in found.values()})
    draw = random.Random(seed)
    held = set(draw.sample(sources, len(sources) // 10))
    train = [pair for pair in found.values() if pair.source not in held]
    held_out = [pair for pair in found.values() if pair.source in held]
    draw.shuffle(train)
    draw.shuffle(held_out)
    return train[:most], held_out[:most]


@dataclass(frozen=True)
class Batch:
    source: Tensor  # (B, S), without an end: attention would rest there
    source_lengths: Tensor  # (B,)
    given: Tensor  # (B, T): the language, then the translation
    wanted: Tensor  # (B, T): the translation, then END
    lengths: Tensor  # (B,)


class Subwords:
    """Texts as token numbers, and back."""

    def __init__(self, pairs: list[Pair], size: int) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self._bpe = Tokenizer(models.BPE())
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        self._bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = [text for pair in pairs for text in (pair.source, pair.target)]
        self._bpe.train_from_iterator(texts, trainer)

    def __len__(self) -> int:
        return self._bpe.get_vocab_size()

    def tokens(self, text: str) -> list[int]:
        return self._bpe.encode(text).ids

    def pieces(self, tokens: list[int]) -> list[str]:
        """Each token as it reads by itself."""
        return [self._bpe.decode([token], skip_special_tokens=False) for token in tokens]

    def text(self, tokens: list[int]) -> str:
        """The text of generated tokens, up to the end token."""
        stop = tokens.index(END) if END in tokens else len(tokens)
        return self._bpe.decode(tokens[:stop]).strip()

    def batch(self, pairs: list[Pair]) -> Batch:
        sources = [torch.tensor(self.tokens(p.source)) for p in pairs]
        targets = [torch.tensor([start_of(p.language), *self.tokens(p.target), END]) for p in pairs]

        def padded(rows: list[Tensor]) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)

        return Batch(
            padded(sources),
            torch.tensor([len(row) for row in sources]),
            padded([row[:-1] for row in targets]),
            padded([row[1:] for row in targets]),
            torch.tensor([len(row) - 1 for row in targets]),
        )


def batches(pairs: list[Pair], size: int, seed: int) -> Iterator[list[Pair]]:
    """Endless batches, rows of about one length in each: sentences as often as names, though there
    are fewer of them."""
    draw = random.Random(seed)
    kinds = [[p for p in pairs if p.kind == kind] for kind in ("sentence", "name")]
    kinds = [kind for kind in kinds if kind]
    while True:
        many = [p for kind in kinds for p in draw.choices(kind, k=16 * size // len(kinds))]
        many.sort(key=lambda p: len(p.target))
        parts = [many[i : i + size] for i in range(0, len(many), size)]
        draw.shuffle(parts)
        yield from parts
