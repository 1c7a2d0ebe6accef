"""The one list of shapes that all benchmarks share."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One layer, one direction: x is (steps, batch, input_size)."""

    batch: int
    steps: int
    input_size: int
    hidden_size: int

    def __str__(self) -> str:
        return ",".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "B,T,I,H"."""
        try:
            shape = cls(*map(int, text.split(",")))
        except (TypeError, ValueError):
            raise ValueError(f"a shape is B,T,I,H, four numbers, not {text!r}") from None
        if min(shape) < 1:
            raise ValueError(f"a shape's numbers are at least 1, not {text!r}")
        return shape


def shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(Shape.parse(text) for text in texts)


SHAPES = shapes(
    "1,1,64,64",
    "1,100,64,64",
    "1,100,128,128",
    "1,100,256,256",
    "1,100,512,512",
    "4,100,256,256",
    "8,100,128,128",
    "32,50,256,256",
    "32,100,512,512",
    "64,50,1024,1024",
    "128,100,256,256",
    "16,500,128,64",
    "256,20,128,128",
)

# A look at every regime (tiny, latency, throughput) in a minute or two.
QUICK_SHAPES = shapes("1,1,64,64", "1,100,128,128", "8,100,128,128", "32,50,256,256")

CELLS = ("lstm", "gru", "rnn")
