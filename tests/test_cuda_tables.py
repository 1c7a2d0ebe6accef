"""bench/cuda's tables without a GPU: cases, timing, the files, torch.nn and fusedrnn in turns."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fusedrnn
from bench.cuda import cases, compare, cudnn_table, program, timing
from bench.cuda.cases import Case, Layers
from bench.shapes import SHAPES, Shape

SMALL = Shape(3, 7, 5, 4)


# ---- what is measured ---------------------------------------------------------------------------


def test_the_most_wanted_cases_come_first() -> None:
    found = list(cases.all_cases())
    assert len(found) == len(set(found))
    assert {c.shape for c in found[:27]} == set(cases.LONG), "LSTM, 3 dtypes, 3 modes"
    plain = {c.shape for c in found if c.layers == Layers()}
    assert plain == {*SHAPES, *cases.LONG, *cases.SMALL, *cases.AROUND}
    for cell in cudnn_table.MODULES:
        each = [c for c in found if c.cell == cell and c.layers == Layers()]
        assert len(each) == len(plain) * 9
    assert {c.layers for c in found} == {Layers(), *cases.SPECIALS}
    assert not any(c.layers.packed and c.mode == "graph" for c in found)
    assert [str(layers) for layers in cases.SPECIALS] == [
        "packed, lengths 1..T",
        "bidirectional",
        "4 layers",
    ]


class Pretended:
    """A device whose clock its calls advance; marks are asked for in pairs."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.calls, self.each = 0.0, 0, seconds

    def __call__(self) -> None:
        self.now += self.each[min(self.calls, len(self.each) - 1)]
        self.calls += 1

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, stop: float) -> float:
        return stop - start


def test_measuring_leaves_out_the_first_calls() -> None:
    device = Pretended(9.0, 1e-3)
    found = timing.measure(device, device, 0.1)
    assert found.seconds == pytest.approx(1e-3)
    assert (found.rounds, found.repeats) == (25, 4)
    assert device.calls == 3 + 4 + 25 * 4


def test_measuring_takes_the_median_round() -> None:
    quick, slow = 1.0, 50.0
    device = Pretended(quick, quick, quick, quick, slow, quick, quick, slow, quick)
    found = timing.measure(device, device, 1.0)
    assert found == timing.Timing(1.0, timing.MIN_ROUNDS, 1)


@pytest.mark.parametrize(
    ("call", "bound", "expected"),
    [
        (1e-5, 0.15, (25, 400)),  # a round of 4 ms
        (1e-3, 0.15, (25, 4)),
        (1e-2, 0.15, (15, 1)),
        (1.0, 0.15, (5, 1)),  # the bound gives way
        (1e-5, 0.001, (5, 20)),  # a round that is shorter than it should be
    ],
)
def test_rounds_fit_the_bound(call: float, bound: float, expected: tuple[int, int]) -> None:
    assert timing.plan(call, bound) == expected


@pytest.mark.parametrize("layers", [Layers(), *cases.SPECIALS], ids=str)
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_calls_run_and_use_all_rows(layers: Layers, mode: str) -> None:
    call = cudnn_table.make_call(Case("gru", layers, SMALL, "float32", mode), "cpu")
    output, *gradients = call()
    sets = layers.count * (2 if layers.bidirectional else 1)
    assert len(gradients) == (0 if mode == "forward" else 1 + 4 * sets)
    if mode == "forward":
        rows = 1 + 4 + 7 if layers.packed else SMALL.steps * SMALL.batch
        assert output.numel() == rows * SMALL.hidden_size * (2 if layers.bidirectional else 1)


def test_results_that_are_not_finite_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.full(size, float("nan")))
    with pytest.raises(ValueError, match="not finite"):
        cudnn_table.make_call(Case("lstm", Layers(), SMALL, "float32", "forward"), "cpu")


# ---- the table ----------------------------------------------------------------------------------

CASE = Case("lstm", Layers(), SMALL, "float32", "forward")


def row(seconds: float, **changes: object) -> cudnn_table.Row:
    return cudnn_table.Row(replace(CASE, **changes), timing.Timing(seconds, 9, 2))


def test_microseconds_a_step() -> None:
    assert row(14e-6).step_microseconds() == pytest.approx(2.0), "7 steps in 14 us"
    assert cudnn_table.Row(CASE, None, "lost").step_microseconds() is None


def test_tables(tmp_path: Path) -> None:
    rows = [
        row(14e-6),
        row(7e-3, dtype="float16", mode="training"),
        cudnn_table.Row(replace(CASE, mode="graph"), None, "out of memory"),
        row(21e-6, layers=Layers(packed=True)),
    ]
    program.save(cudnn_table.table(timing.HostClock()), {"gpu": "none"}, rows, tmp_path)
    text = (tmp_path / "cudnn.md").read_text()
    assert "- gpu: none" in text
    assert "| 3,7,5,4 | 2 | failed | - | - | - | - | - | - | 1000 |" in text
    assert "## LSTM, packed, lengths 1..T" in text
    assert "- lstm one layer, 3,7,5,4, float32, graph: out of memory" in text
    saved = json.loads((tmp_path / "cudnn.json").read_text())
    assert saved["header"] == {"gpu": "none"}
    assert saved["results"][0]["us_per_step"] == pytest.approx(2.0)
    assert saved["results"][2]["error"] == "out of memory"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cudnn.json", "cudnn.md"]


def test_running_goes_on_after_a_failure_and_stops_in_time() -> None:
    rows: list[cudnn_table.Row] = []
    wanted = [replace(CASE, mode="graph"), CASE]  # there is no graph without a GPU
    if torch.cuda.is_available():
        pytest.skip("the case that must fail does not, with a GPU")
    table = cudnn_table.table(timing.HostClock(), "cpu")
    program.run(table, wanted, 0.01, 60, rows.append)
    assert [bool(r.error) for r in rows] == [True, False]
    assert rows[1].step_microseconds() > 0
    rows.clear()
    program.run(table, wanted, 0.01, -1, rows.append)
    assert rows == [], "the time was over before the first one"
    program.run(table, [wanted[0]] * 99, 0.01, 60, rows.append)
    assert len(rows) == program.SAME_FAILURES, "it gives up where nothing works"


def test_without_a_gpu_the_table_says_so(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (cudnn_table, compare):
        table = module.table(timing.HostClock())
        assert program.main(table, ["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_was_measured_is_written_where_it_is_stopped(tmp_path: Path, monkeypatch) -> None:
    def stopped(table, wanted, seconds, total, done) -> None:
        done(row(14e-6))
        raise SystemExit(143)  # as on SIGTERM

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program, "header", lambda: {"gpu": "pretended"})
    monkeypatch.setattr(program, "run", stopped)
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    # torch.testing, which other tests import, forbids what a program may do.
    with torch.backends.__allow_nonbracketed_mutation():
        try:
            with pytest.raises(SystemExit, match="143"):
                program.main(cudnn_table.table(timing.HostClock()), ["--out", str(tmp_path)])
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    assert len(json.loads((tmp_path / "cudnn.json").read_text())["results"]) == 1


# ---- fusedrnn beside it -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_both_take_their_turns(cell: str, mode: str) -> None:
    case = Case(cell, Layers(), SMALL, "float32", mode)
    row = compare.measured(case, timing.HostClock(), "cpu", 0.05)
    forced = ["one_cta", "persistent"]
    assert list(row.seconds) == ["torch.nn", "fusedrnn", *forced]
    assert row.ratio > 0
    assert list(row.forced) == forced
    assert row.rounds >= timing.MIN_ROUNDS
    assert "us/step" in row.figure()


@pytest.mark.parametrize("before", [None, "auto", "per_step"])
def test_strategies_are_forced_while_they_run(monkeypatch, before: str | None) -> None:
    if before is None:
        monkeypatch.delenv(compare.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(compare.VARIABLE, before)
    asked = []
    convert = fusedrnn.convert

    def listening(module: torch.nn.Module) -> torch.nn.Module:
        module = convert(module)
        module.register_forward_hook(lambda *_: asked.append(os.environ.get(compare.VARIABLE)))
        return module

    monkeypatch.setattr(compare.fusedrnn, "convert", listening)
    calls, left_out = compare.contestants(CASE, "cpu")
    assert list(calls) == ["torch.nn", "fusedrnn", "one_cta", "persistent"]
    assert left_out == ""
    assert asked[::2] == [before, "one_cta", "persistent"], "once while it is made, once compared"
    asked.clear()
    timing.in_turns(calls, timing.HostClock(), 0.01, compare.turn_of)
    assert set(asked) == {before, "one_cta", "persistent"}
    assert os.environ.get(compare.VARIABLE) == before
    large = replace(CASE, shape=SMALL._replace(hidden_size=1025))
    assert compare.other_strategies(large) == []
    monkeypatch.setenv(compare.VARIABLE, "one_cta")
    assert compare.other_strategies(CASE) == ["per_step", "persistent"]


@pytest.mark.parametrize("fails", ["fusedrnn", "one_cta"])
def test_who_is_wrong_is_left_out(fails: str, monkeypatch) -> None:
    """The others are timed all the same."""

    def convert(module: torch.nn.Module) -> torch.nn.Module:
        if os.environ.get(compare.VARIABLE, "fusedrnn") != fails:
            return module
        if fails == "one_cta":
            raise RuntimeError("unspecified launch failure\nand more")
        with torch.no_grad():
            module.weight_hh_l0.mul_(1.1)
        return module

    monkeypatch.delenv(compare.VARIABLE, raising=False)
    monkeypatch.setattr(compare.fusedrnn, "convert", convert)
    case = Case("gru", Layers(), SMALL, "float32", "training")
    row = compare.measured(case, timing.HostClock(), "cpu", 0.05)
    text = compare.markdown({}, [row])
    if fails == "fusedrnn":
        assert row.ratio is None
        assert list(row.forced) == ["one_cta", "persistent"]
        assert row.error == "results [0, 1, 2, 3, 4, 5] of 6 of fusedrnn are far from torch.nn's"
        assert "| failed | - | one_cta " in text
        assert "us/step, one_cta " in row.figure()
    else:
        assert row.ratio is not None
        assert list(row.forced) == ["persistent"]
        assert row.error == "one_cta: unspecified launch failure"
    assert f"- {case}: {row.error}" in text


def test_a_ratio_is_the_others_time_by_ours(monkeypatch) -> None:
    device = Pretended(1.0)

    def theirs() -> None:
        for _ in range(3):
            device()

    calls = {"torch.nn": theirs, "fusedrnn": device}
    monkeypatch.setattr(compare, "contestants", lambda *_: (calls, ""))
    row = compare.measured(CASE, device, "cpu", 40.0)
    assert row.ratio == 3.0
    assert row.seconds == {"torch.nn": 3.0, "fusedrnn": 1.0}
    assert row.figure() == "428571 against 142857 us/step, 3.00"


def test_turns_are_taken_from_the_front_in_turn() -> None:
    device, order = Pretended(1.0), []

    def contestant(name: str) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            device()

        return call

    found = timing.in_turns({n: contestant(n) for n in "ab"}, device, 12.0)
    assert found == {"a": [1.0] * 6, "b": [1.0] * 6}
    assert "".join(order)[-12:] == "abbaabbaabba"


def test_the_comparison_as_a_table(tmp_path: Path) -> None:
    def found(ratio: float, **changes: object) -> compare.Row:
        seconds = {"torch.nn": ratio * 14e-6, "fusedrnn": 14e-6}
        forced = {"one_cta": 5.0} if ratio == 4.0 else {}
        seconds |= dict.fromkeys(forced, 7e-6)
        return compare.Row(replace(CASE, **changes), seconds, ratio, 9, forced)

    rows = [found(4.0), found(1.0), found(3.0, mode="training"), compare.Row(CASE, {}, error="no")]
    program.save(compare.table(timing.HostClock()), {"gpu": "none"}, rows, tmp_path)
    assert rows[0].figure() == "8 against 2 us/step, 4.00, one_cta 1, 5.00"
    text = (tmp_path / "cuda.md").read_text()
    assert "| LSTM, one layer | 2.00 (1.00) | - | 3.00 (3.00) | - |" in text
    assert "| lstm one layer, 3,7,5,4, float32, forward | 8 | 2 | 4.00 | one_cta 1, 5.00 |" in text
    assert "- lstm one layer, 3,7,5,4, float32, forward: no" in text
    saved = json.loads((tmp_path / "cuda.json").read_text())["results"]
    assert saved[0]["ratio"] == 4.0
    assert saved[3]["error"] == "no"


def test_the_comparison_says_where_there_is_no_cuda_half(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compare._C, "build_info", lambda: {"cuda": "no"})
    assert compare.main(["--out", "/nowhere"]) == 2
    assert "without its CUDA half" in capsys.readouterr().out
