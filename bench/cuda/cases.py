"""What the table of torch.nn on a GPU measures, the most wanted first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from bench.shapes import SHAPES, Shape, shapes

DTYPES = ("float32", "bfloat16", "float16")
MODES = ("forward", "graph", "training")  # inference, the same by a CUDA graph, with backward


@dataclass(frozen=True)
class Layers:
    """What is stacked, and over which rows."""

    count: int = 1
    bidirectional: bool = False
    packed: bool = False  # a PackedSequence, lengths spread evenly over 1..T

    def __str__(self) -> str:
        parts = [f"{self.count} layers"] if self.count > 1 else []
        parts += ["bidirectional"] if self.bidirectional else []
        parts += ["packed, lengths 1..T"] if self.packed else []
        return ", ".join(parts) or "one layer"


@dataclass(frozen=True)
class Case:
    cell: str  # lstm, gru or rnn (tanh)
    layers: Layers
    shape: Shape
    dtype: str
    mode: str

    def __str__(self) -> str:
        return f"{self.cell} {self.layers}, {self.shape}, {self.dtype}, {self.mode}"


# Published elsewhere, or on either side of a size where cuDNN changes its algorithm.
LONG = shapes("16,1024,768,768", "64,512,512,512", "128,256,1024,1024")
AROUND = shapes("64,100,192,192", "64,100,256,256", "64,100,320,320")
# What one CTA can hold.
SMALL = shapes("1,100,128,128", "64,100,128,128", "64,100,64,64")
SPECIAL = shapes("64,100,256,256", "32,100,512,512")
SPECIALS = (Layers(packed=True), Layers(bidirectional=True), Layers(count=4))
GATED = ("lstm", "gru")


def all_cases() -> Iterator[Case]:
    """No case twice."""
    plain = Layers()
    wanted = LONG + SMALL + AROUND
    rest = tuple(shape for shape in SHAPES if shape not in wanted)
    # shape by shape, so that a table that was stopped has whole rows
    yield from (Case("lstm", plain, *at) for at in product(wanted, DTYPES, MODES))
    yield from (Case("gru", plain, *at) for at in product(wanted, DTYPES, MODES))
    yield from (Case("lstm", plain, *at) for at in product(rest, DTYPES, MODES))
    for layers, cell in product(SPECIALS, GATED):
        # The lengths of a PackedSequence stay on the host: no graph.
        modes = ("forward", "training") if layers.packed else MODES
        yield from (Case(cell, layers, *at) for at in product(SPECIAL, DTYPES, modes))
    yield from (Case("gru", plain, *at) for at in product(rest, DTYPES, MODES))
    yield from (Case("rnn", plain, *at) for at in product(wanted + rest, DTYPES, MODES))
