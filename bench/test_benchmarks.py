"""pytest-benchmark cases of fusedrnn alone over the shared shapes, to catch regressions.

    P="python -m pytest bench/test_benchmarks.py"
    $P --benchmark-save=before -k "lstm and forward"
    $P --benchmark-compare --benchmark-compare-fail=median:10% -k "lstm and forward"

Absolute times of two runs hold only on the same quiet machine; compare.py gives paired ratios.
`make test` does not collect this file.
"""

from __future__ import annotations

import pytest

from bench.cases import forward_calls, training_calls
from bench.peers import FUSED
from bench.shapes import CELLS, SHAPES, Shape

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_speed(benchmark, mode: str, cell: str, shape: Shape) -> None:
    calls = forward_calls(cell, shape, [], 1) if mode == "forward" else training_calls(cell, shape)
    benchmark.group = f"{cell} {mode}"
    benchmark(calls[FUSED])
