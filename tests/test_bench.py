"""The benchmark harness: the protocol it promises, and that no wrong peer is ever timed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import alone, cases, compare, floors, limits, machine, modes, peers, report, timing
from bench.shapes import CELLS, SHAPES, Shape

SMALL = Shape(3, 7, 5, 4)


def test_shapes() -> None:
    assert len(set(SHAPES)) == 13
    assert Shape.parse("1,2,3,4") == Shape(1, 2, 3, 4)
    assert str(Shape(1, 2, 3, 4)) == "1,2,3,4"
    for wrong in ("1,2,3", "1,2,3,4,5", "a,b,c,d", "0,1,1,1", ""):
        with pytest.raises(ValueError, match=r"B,T,I,H|at least 1"):
            Shape.parse(wrong)


def test_plan_fits_the_bound() -> None:
    how = timing.plan({"a": 1e-3, "b": 1e-2}, rounds=9, bound=5.0)
    assert how.rounds == 9
    spent = how.rounds * sum(
        timing.SETTLE_SECONDS + (how.repeats[n] + 1) * s for n, s in {"a": 1e-3, "b": 1e-2}.items()
    )
    assert 4.0 < spent <= 5.0


def test_plan_gives_up_rounds_for_slow_calls() -> None:
    assert timing.plan({"a": 0.2, "b": 0.2}, 25, 10.0) == timing.Plan(11, {"a": 1, "b": 1})
    assert timing.plan({"a": 9.0, "b": 9.0}, 25, 10.0).rounds == timing.MIN_ROUNDS
    assert timing.plan({"a": 9.0, "b": 9.0}, 3, 10.0).rounds == 3


def test_plan_makes_no_block_of_a_few_quick_calls() -> None:
    how = timing.plan({"a": 1e-5, "b": 1e-3}, rounds=9, bound=0.1)
    assert how.rounds == 9
    assert how.repeats["a"] >= 1000
    assert how.repeats["b"] >= 19


def test_rounds_are_interleaved(monkeypatch) -> None:
    order = []
    blocks = {"a": 1.0, "b": 2.0, "c": 4.0}

    rests = []

    def fake_block(call, repeats, rest=None):
        call()
        rests.append(rest)
        return blocks[order[-1]]

    monkeypatch.setattr(timing, "time_block", fake_block)
    calls = {name: (lambda name=name: order.append(name)) for name in blocks}
    seconds = timing.paired(calls, rounds=3, bound=600.0, rests={"b": 0.125})
    assert [rest == 0.125 for rest in rests[-8:]] == [name == "b" for name in "abcbcaca"]
    assert order[-9:] == list("abcbcacab"), "all in each round, another one first each time"
    assert seconds == {name: [s] * 3 for name, s in blocks.items()}
    assert timing.ratio(seconds, "c", "a") == 4.0


def test_a_block_begins_with_a_rest_and_an_untimed_call(monkeypatch) -> None:
    order: list[object] = []
    monkeypatch.setattr(timing.time, "sleep", order.append)
    clock = iter([1.0, 7.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: order.append("clock") or next(clock))
    assert timing.time_block(lambda: order.append("call"), 3) == 2.0
    assert order == [timing.SETTLE_SECONDS, "call", "clock", "call", "call", "call", "clock"]


def test_ratio_is_the_median_of_paired_ratios() -> None:
    # The machine halves its speed in the last two rounds: paired ratios do not notice.
    seconds = {"peer": [3.0, 3.0, 6.0, 6.6, 90.0], "fusedrnn": [1.0, 1.0, 2.0, 2.0, 1.0]}
    assert timing.ratio(seconds, "peer", "fusedrnn") == 3.0


@pytest.mark.parametrize("peer", list(peers.PEERS))
@pytest.mark.parametrize("cell", CELLS)
def test_peers_compute_the_same(cell: str, peer: str) -> None:
    if peer not in peers.installed_peers():
        pytest.skip(f"{peer} or onnx is not installed")
    calls = cases.forward_calls(cell, SMALL, [peer], 1)
    assert list(calls) == ["torch.nn", "fusedrnn", peers.PEERS[peer]]
    for call in calls.values():
        sizes = [x.numel() for x in cases.flat(call())]
        assert sizes == [7 * 3 * 4] + [3 * 4] * (2 if cell == "lstm" else 1)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_peer_with_wrong_gates_is_refused(cell: str, monkeypatch) -> None:
    if "onnxruntime" not in peers.installed_peers():
        pytest.skip("onnxruntime or onnx is not installed")
    straight = {name: tuple(range(len(order))) for name, order in peers.ONNX_GATES.items()}
    monkeypatch.setattr(peers, "ONNX_GATES", straight)
    with pytest.raises(peers.WrongResult, match=f"ONNX Runtime, {cell}"):
        cases.forward_calls(cell, SMALL, ["onnxruntime"], 1)


@pytest.mark.parametrize("parameter", ["weight_hh_l0", "bias_hh_l0"])
@pytest.mark.parametrize("which", ["forward", "training"])
def test_a_wrong_fused_module_is_refused(which: str, parameter: str, monkeypatch) -> None:
    honest = cases.copied

    def wrong(module, fused=True, dtype=None):
        copy = honest(module, fused, dtype)
        if fused:
            with torch.no_grad():
                getattr(copy, parameter).add_(0.01)
        return copy

    monkeypatch.setattr(cases, "copied", wrong)
    arguments = ([], 1) if which == "forward" else ()
    with pytest.raises(peers.WrongResult, match="fusedrnn, gru"):
        getattr(cases, f"{which}_calls")("gru", SMALL, *arguments)


EXTRA = [
    (name, cell)
    for name, mode in modes.MODES.items()
    if name not in ("forward", "training")
    for cell in mode.goals
]


@pytest.mark.parametrize(("mode", "cell"), EXTRA)
def test_other_modes_are_checked_too(cell: str, mode: str, monkeypatch) -> None:
    how = modes.MODES[mode]
    also = ([], 1) if how.with_peers else ()
    calls = how.calls(cell, SMALL, *also)
    wanted = {goal.against for goal in how.goals[cell]} - {modes.BEST}
    assert wanted | {peers.FUSED} <= set(calls)
    honest = cases.fusedrnn.convert

    def wrong(module):
        fused = honest(module)
        with torch.no_grad():
            next(fused.parameters()).mul_(3.0)
        return fused

    monkeypatch.setattr(cases.fusedrnn, "convert", wrong)
    with pytest.raises(peers.WrongResult, match="fusedrnn, "):
        how.calls(cell, SMALL, *also)


@pytest.mark.parametrize("uniform", [False, True])
def test_lengths_are_spread_over_all_there_are(uniform: bool, monkeypatch) -> None:
    found = []
    honest = cases.layer_call

    def note(module, shape, train, lengths=None, packed=False):
        if lengths is not None:
            found.append(sorted(lengths.tolist()))
        return honest(module, shape, train, lengths, packed)

    monkeypatch.setattr(cases, "layer_call", note)
    cases.ragged_calls("gru", Shape(7, 7, 5, 4), False, uniform)
    assert all(lengths == (list(range(1, 8)) if uniform else [7] * 7) for lengths in found)


def test_training_is_three_times_the_work() -> None:
    """dx and dW are as many multiplications as the forward pass each."""
    assert limits.multiplications("lstm", SMALL, False) == 4 * 4 * (5 + 4) * 3 * 7
    assert limits.multiplications("lstm", SMALL, True) == 3 * 4 * 4 * (5 + 4) * 3 * 7


def test_nan_and_missing_results_are_refused() -> None:
    good = [torch.zeros(3)]
    with pytest.raises(peers.WrongResult, match="away"):
        peers.check("x", [torch.full((3,), float("nan"))], good, 1e-4)
    with pytest.raises(peers.WrongResult, match="sizes"):
        peers.check("x", [], good, 1e-4)


def test_training_sides_keep_their_own_gradients() -> None:
    calls = cases.training_calls("rnn", SMALL)
    first = calls["torch.nn"]()
    kept = [g.clone() for g in first]
    second = calls["fusedrnn"]()
    assert all(a.equal(b) for a, b in zip(first, kept, strict=True))
    assert all(a is not b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("first", "second", "low"), [(0.9, 1.1, False), (0.9, 0.8, True)])
def test_a_low_reading_is_timed_again(first, second, low, monkeypatch) -> None:
    readings = iter([first, second])
    asked = []

    def fake(calls, rounds, bound, rests=None):
        asked.append((list(calls), rounds))
        value = next(readings)
        return {n: [1.0 if n == "fusedrnn" else value] * rounds for n in calls}

    monkeypatch.setattr(compare, "paired", fake)
    calls = dict.fromkeys(["torch.nn", "fusedrnn", "OpenVINO"], lambda: None)
    result = compare.measure("gru", "forward", SMALL, calls, 9, 1.0)
    assert asked == [(list(calls), 9), (["torch.nn", "fusedrnn"], 25)]
    assert result.retimed
    assert (result.ratios["torch.nn"] < compare.RETIMED_BELOW) is low
    assert result.ratios["OpenVINO"] == first


def test_any_missed_goal_is_timed_again(monkeypatch) -> None:
    asked = []

    def fake(calls, rounds, bound, rests=None):
        asked.append(list(calls))
        values = {"fusedrnn": 1.0, cases.DENSE: 1.5, cases.PACKED: 0.9 if len(asked) == 1 else 1.1}
        return {name: [values[name]] * rounds for name in calls}

    monkeypatch.setattr(compare, "paired", fake)
    calls = dict.fromkeys(["fusedrnn", cases.PACKED, cases.DENSE], lambda: None)
    result = compare.measure("gru", "uniform-lengths", SMALL, calls, 9, 1.0)
    assert asked[1:] == [[cases.DENSE, cases.PACKED, "fusedrnn"]]
    assert result.ratios == {cases.PACKED: 1.1, cases.DENSE: 1.5}


def results_of(*ratios: float) -> list[report.Result]:
    return [
        report.Result(
            "gru", "forward", s, {"torch.nn": r * 1e-3, "fusedrnn": 1e-3}, {"torch.nn": r}, 9
        )
        for s, r in zip(SHAPES, ratios, strict=False)
    ]


def test_report() -> None:
    assert report.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    text = report.markdown({"cpu": "a processor"}, results_of(4.0, 1.0, 0.5))
    assert "- cpu: a processor" in text
    assert "**1.26**" in text, "the geometric mean"
    assert f"| **0.50** (0.95) | at {SHAPES[2]} |" in text, "the worst shape, short of its goal"
    assert "| **1.26** (2.10) |" in text, "the mean, short of its goal"


def test_summary_takes_the_quickest_peer() -> None:
    ratios = {"torch.nn": 3.0, "OpenVINO": 2.5, "ONNX Runtime": 4.0, cases.LAYER: 1.2}
    seconds = dict.fromkeys([*ratios, "fusedrnn"], 1e-3)
    text = "\n".join(report.summary([report.Result("gru", "forward", SMALL, seconds, ratios, 9)]))
    assert f"| the quickest peer | 2.50 (2.10) | 2.50 (0.95) | at {SMALL} |" in text


def test_summary_has_a_line_for_each_goal() -> None:
    ratios = {cases.PACKED: 2.0, cases.DENSE: 1.5}
    seconds = dict.fromkeys([*ratios, "fusedrnn"], 1e-3)
    lines = report.summary([report.Result("gru", "uniform-lengths", SMALL, seconds, ratios, 9)])
    assert [line.split("|")[2].strip() for line in lines[2:]] == [cases.DENSE, cases.PACKED]
    assert "**1.50** (1.67)" in lines[2]
    assert "2.00 (1.00)" in lines[3]


def test_older_rows_are_kept_and_named() -> None:
    seconds = {"torch.nn": 1.0, "fusedrnn": 1.0}

    def row(mode: str, ratio: float) -> report.Result:
        return report.Result("gru", mode, SMALL, seconds, {"torch.nn": ratio}, 9)

    old = {"date": "then", "commit": "abc"}
    older = [row("forward", 1.0), row("training", 2.0), row("denormals", 3.0)]
    header, results = report.updated({"date": "now"}, [row("training", 5.0)], old, older)
    assert [(r.mode, r.ratios["torch.nn"]) for r in results] == [
        ("training", 5.0),
        ("forward", 1.0),
        ("denormals", 3.0),
    ]
    assert header == {"date": "now", "earlier rows": "abc, then: forward, denormals"}
    header, results = report.updated({"date": "later"}, [row("forward", 6.0)], header, results)
    assert header["earlier rows"] == "unknown, now: training; abc, then: denormals"
    assert report.updated(old, older, header, results) == (old, older), "nothing is left of them"


def test_the_program(tmp_path: Path, capsys) -> None:
    options = [
        "--mode",
        "forward",
        "training",
        "--shapes",
        str(SMALL),
        "--rounds",
        "3",
        "--seconds",
        "0.2",
        "--threads",
        "1",
    ]
    assert compare.main([*options, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert len(saved["results"]) == len(CELLS) * 2
    for result in saved["results"]:
        assert result["shape"] == str(SMALL)
        assert min(result["seconds"].values()) > 0
        assert result["ratios"]["torch.nn"] > 0
        contestants = 2 + (len(peers.installed_peers()) if result["mode"] == "forward" else 0)
        assert len(result["seconds"]) == contestants
    assert "### LSTM, training" in shown
    assert (tmp_path / "compare.md").read_text() in shown
    assert saved["header"]["threads"] == "1"
    assert "other processes" in saved["header"]["other load"]


def test_the_commit_that_is_measured(tmp_path: Path) -> None:
    """Files that differ from it are said, but for the results that a run itself writes."""
    assert machine.commit(tmp_path) is None

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    code, table = tmp_path / "bench" / "code.py", tmp_path / "bench" / "results" / "compare.md"
    table.parent.mkdir(parents=True)
    for file in (code, table):
        file.write_text("one")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    clean = machine.commit(code.parent)
    assert clean is not None
    assert re.fullmatch("[0-9a-f]{10}", clean)
    table.write_text("another")
    assert machine.commit(code.parent) == clean
    code.write_text("another")
    assert machine.commit(code.parent) == clean + "-dirty"


@pytest.mark.alone
def test_other_load_is_measured() -> None:
    load = machine.OtherLoad()
    deadline = time.perf_counter() + 0.5
    while time.perf_counter() < deadline:
        pass
    mine = load.share()
    assert 0 <= mine <= 1
    before = load.start
    # the same half second, but as if none of its work had been ours
    load.start = (before[0], before[1], load.now()[2])
    theirs = load.share()
    assert theirs > mine
    load.own(0.25)  # a process of ours did half of it
    assert load.share() < theirs


def who_and_whose(seconds: float) -> tuple[int, int]:
    deadline = time.process_time() + seconds
    while time.process_time() < deadline:
        pass
    return os.getpid(), os.getppid()


def fail() -> None:
    raise peers.WrongResult("gates swapped")


def let_another_spend(seconds: float) -> None:
    code = f"import time\nwhile time.process_time() < {seconds}: pass"
    subprocess.run([sys.executable, "-c", code], check=True)


def telemetry_of_openvino() -> object:
    cases.forward_calls("rnn", SMALL, ["openvino"], 1)
    return sys.modules.get("openvino_telemetry")


@pytest.mark.skipif("openvino" not in peers.installed_peers(), reason="needs OpenVINO and onnx")
def test_openvino_sends_nothing() -> None:
    """Its telemetry would run beside what is timed."""
    assert alone.alone(telemetry_of_openvino)[0] is None


def test_each_measurement_has_a_process_of_its_own() -> None:
    (first, parent), seconds = alone.alone(who_and_whose, 0.2)
    (second, _), _ = alone.alone(who_and_whose, 0.0)
    assert len({first, second, os.getpid()}) == 3
    assert parent != os.getpid(), "what this one ran, its parent has not"
    assert 0.2 <= seconds < 2.0
    assert alone.alone(let_another_spend, 0.3)[1] >= 0.3, "its children's seconds are its own"
    with pytest.raises(peers.WrongResult, match="gates swapped"):
        alone.alone(fail)


def test_bad_options(capsys) -> None:
    for options in (["--shapes", "1,2"], ["--rounds", "0"], ["--cells", "mlp"]):
        with pytest.raises(SystemExit, match="2"):
            compare.parse(options)
    assert "B,T,I,H" in capsys.readouterr().err


def test_the_table_of_floors(tmp_path: Path, monkeypatch) -> None:
    header = {"threads": "2", "cpu": "a processor", "versions": "some"}
    report.save(header, results_of(4.0, 1.0, 0.5), tmp_path, "some")
    found, results = report.load(tmp_path / "some.json")
    assert found == header
    assert results == results_of(4.0, 1.0, 0.5)
    rates = floors.Machine(2, 1e11, 1e11, 5e10, 2e10)
    monkeypatch.setattr(floors, "probe", lambda threads: rates)
    floors.main([str(tmp_path / "some.json")])
    text = (tmp_path / "floors.md").read_text()
    assert "| GRU, forward | the quickest peer | 0.71 | 2.10 |" in text, "the first is of one step"
