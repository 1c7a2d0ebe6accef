"""The floors under the times: what they count, and the table of them."""

from __future__ import annotations

import dataclasses

import pytest

from bench import cases, floors, peers, report
from bench.shapes import Shape


def test_a_floor_is_products_or_reading_weights() -> None:
    rates = floors.Machine(2, 2e9, product=1e9, private_cache=1e9, shared_cache=1e8)
    assert floors.floor(rates, "forward", "lstm", Shape(8, 10, 4, 4)) == pytest.approx(
        2 * 16 * (4 + 4) * 8 * 10 / 2e9
    )
    # One row: half of W_hh's 256 bytes, 128 ns, is longer than its 64 ns of products.
    inputs, step = 2 * 16 * 4 * 10 / 2e9, 128e-9
    one_row = Shape(1, 10, 4, 4)
    assert floors.floor(rates, "forward", "lstm", one_row) == pytest.approx(inputs + 10 * step)
    assert floors.floor(rates, "training", "lstm", one_row) == pytest.approx(4 * inputs + 20 * step)
    beyond = 4 * 4 * 1024 * 1024 / 2 - rates.private_bytes
    assert floors.floor(rates, "forward", "lstm", Shape(1, 1, 1, 1024)) == pytest.approx(
        2 * 4096 / 2e9 + rates.private_bytes / 1e9 + beyond / 1e8
    )


def test_a_floor_is_of_the_quickest_split() -> None:
    free = floors.Machine(2, 2e9, product=1e9, private_cache=1e12, shared_cache=1e12)
    shape = Shape(1, 10, 4, 4)
    inputs, step = 2 * 16 * 4 * 10 / 1e9, 2 * 16 * 4 / 1e9
    near, far = inputs / 2 + 10 * (step / 2 + 1e-8), inputs + 10 * step
    for transfer, expected in ((1e-8, near), (1.0, far)):
        rates = dataclasses.replace(free, transfer=transfer)
        assert floors.floor(rates, "forward", "lstm", shape) == pytest.approx(expected)
        rows = Shape(2, 10, 4, 4)  # a row each: nothing to hand over
        assert floors.floor(rates, "forward", "lstm", rows) == pytest.approx(inputs + 10 * step)


def test_a_floor_holds_the_activations() -> None:
    rates = floors.Machine(1, 2e9, 1e9, 1e12, 1e12, sigmoid=1e-9, tanh=1e-6)
    shape, products = Shape(3, 10, 4, 4), 2 * 4 * (4 + 4) * 30 / 1e9
    for cell, gates, each in (("lstm", 4, 2.003e-6), ("gru", 3, 1.002e-6), ("rnn", 1, 1e-6)):
        found = floors.floor(rates, "forward", cell, shape)
        assert found == pytest.approx(gates * products + 4 * 30 * each)
    more = floors.floor(rates, "training", "lstm", shape)
    assert more == pytest.approx(3 * 4 * products + 4 * 30 * 3.003e-6)


def test_a_cells_floor_holds_the_call() -> None:
    rates = floors.Machine(2, 2e9, product=1e9, private_cache=1e9, shared_cache=1e8)

    def floor(mode: str, shape: Shape, nothing: float = 0.25) -> float | None:
        seconds = {peers.FUSED: 4e-5, peers.TORCH: 1e-4, cases.NOTHING: 9e-6}
        ratios = {peers.TORCH: 2.0, cases.NOTHING: nothing}
        return floors.cell_floor(rates, report.Result("lstm", mode, shape, seconds, ratios, 9))

    many = Shape(100, 1, 8, 4)
    products = 2 * 16 * (8 + 4) * 100 / 2e9
    assert floor("cell-forward", many) == pytest.approx(1e-5 + products)
    assert floor("cell-training", many) == pytest.approx(1e-5 + 3 * products)
    one = floor("cell-forward", Shape(1, 1, 1024, 1024), nothing=0.5)
    assert one == pytest.approx(2e-5 + 4 * 4096 * 2048 / 2 / 1e8), "read from the shared cache"
    untimed = report.Result("lstm", "cell-forward", many, {peers.FUSED: 1.0}, {peers.TORCH: 2.0}, 9)
    assert floors.cell_floor(rates, untimed) is None


@pytest.mark.parametrize("train", [False, True])
def test_the_least_call_computes_nothing_and_reaches_every_leaf(train: bool) -> None:
    calls = cases.cell_calls("lstm", Shape(2, 1, 3, 4), train)
    assert list(calls) == [peers.TORCH, peers.FUSED, cases.NOTHING]
    found = calls[cases.NOTHING]()
    assert found[0].shape == (7,), "three inputs and four parameters"
    assert len(found) == (8 if train else 1)
    assert all(gradient is not None for gradient in found[1:])


def test_the_probe() -> None:
    found = floors.probe(1)
    assert found.flops > found.private_cache / 4 > 0
    # The two are near each other where the machine is idle; beside other work either may halve.
    assert found.flops * 4 > found.product > found.flops / 4
    assert 1e-11 < found.sigmoid < 1e-7
    assert 1e-11 < found.tanh < 1e-7
    assert found.transfer == 0.0, "of one thread"
    assert found.private_cache >= found.shared_cache * 0.5 > 0
