"""The programs under examples/, each in a tiny setting from end to end, and what they rest on."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn import models

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("babel")


def run(program: str, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / program), "--out", str(out), *arguments]
    env = {**os.environ, "PYTHONPATH": str(Path(fusedrnn.__file__).resolve().parents[1])}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_translate_dates(tmp_path: Path) -> None:
    done = run("translate_dates.py", tmp_path, "--tiny")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "translate_dates.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "translate_dates.json").read_text())
    assert list(results) == ["no attention", "Luong", "Bahdanau"]
    for result in results.values():
        assert result["losses"][-1] < result["losses"][0], "nothing was learnt"
        assert result["exact_torch"] == result["exact"], "the same weights, the same results"
        assert result["step_torch"] > 0


def test_long_memory(tmp_path: Path) -> None:
    done = run("long_memory.py", tmp_path, "--tiny")
    assert done.returncode == 0, done.stderr
    assert "reproduced  the tanh network's gradient vanishes" in done.stdout
    assert (tmp_path / "long_memory.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "long_memory.json").read_text())
    assert {name: len(values) for name, values in found["norms"].items()} == dict.fromkeys(
        ("RNN tanh", "IRNN", "LSTM", "GRU"), 60
    )
    for by_length in found["adding"].values():
        assert list(by_length) == ["6", "10"]
        for result in by_length.values():
            assert len(result["curve"]) == 3
            assert result["error_torch"] == pytest.approx(result["error_fused"], rel=1e-3)


def test_what_long_memory_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import long_memory

    x, wanted = long_memory.make_batch(500, 9, torch.Generator().manual_seed(0))
    assert x[..., 1].sum(1).eq(2).all()
    assert x[:, :4, 1].sum(1).eq(1).all()
    torch.testing.assert_close(wanted, (x[..., 0] * x[..., 1]).sum(1))
    assert x[..., 0].mean().item() == pytest.approx(0.5, abs=0.02)
    assert long_memory.solved_at([0.2, 0.001, 0.2, 0.001, 0.002], 50) == 150
    assert long_memory.solved_at([0.2, 0.001, 0.2], 50) is None
    # By hand: the gradient reaches back through W_hh and the tanh of every step.
    norms = long_memory.gradient_norms("RNN tanh", 5, 4, batch=1)
    torch.manual_seed(1)
    rnn = long_memory.layer("RNN tanh", 2, 4)
    x = torch.randn(1, 5, 2)
    states, h = [], torch.zeros(4)
    for t in range(5):
        h = torch.tanh(
            rnn.weight_ih_l0 @ x[0, t] + rnn.bias_ih_l0 + rnn.weight_hh_l0 @ h + rnn.bias_hh_l0
        )
        states.append(h)
    g = torch.nn.functional.normalize(torch.randn(1, 4), dim=1)[0]
    expected = []
    for t in reversed(range(5)):
        g = g * (1 - states[t] ** 2)
        expected.append((rnn.weight_ih_l0.T @ g).norm().item())
        g = rnn.weight_hh_l0.T @ g
    assert norms == pytest.approx([e / expected[0] for e in expected], rel=1e-4)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "babel.py").write_text("raise ImportError('gone', name='babel')")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(fusedrnn.__file__).resolve().parents[1]}"}
    command = [sys.executable, str(EXAMPLES / "translate_dates.py"), "--tiny"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this program needs the package babel: pip install" in done.stderr


def test_dates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import date_text

    assert len(date_text.LOCALES) >= 20
    day = datetime.date(2031, 4, 9)
    assert date_text.format_date(day, "short", "en_US") == "4/9/31"
    assert date_text.format_date(day, "short", "en_GB") == "09/04/2031"
    assert date_text.format_date(day, "long", "de_DE") == "9. April 2031"
    train, held_out = date_text.make_examples(2000, seed=1)
    assert not {e.iso for e in train} & {e.iso for e in held_out}, "held-out days are held out"
    assert {e.locale for e in train} == set(date_text.LOCALES)
    vocabulary = date_text.Vocabulary(train + held_out)
    batch = vocabulary.batch(train[:3])
    for row in range(3):
        length = int(batch.source_lengths[row])
        names = [vocabulary.names[i] for i in batch.source[row, :length].tolist()]
        assert names == [train[row].locale, *train[row].text]
        assert batch.source[row, length:].eq(date_text.PADDING).all()
        assert date_text.iso_of(batch.wanted[row].tolist()) == train[row].iso
    assert batch.given[:, 1:].equal(batch.wanted[:, :-1])
    # A text and its place mean one date, or no model could learn it.
    meaning: dict[tuple[str, str], str] = {}
    for e in train + held_out:
        assert meaning.setdefault((e.locale, e.text), e.iso) == e.iso


def test_torchs_layers_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from torch_layers import on_torch_layers

    encoder = models.Encoder(5, 4, num_embeddings=9, bidirectional=True, num_layers=2)
    decoder = models.AttentionDecoder(7, 3, 6, encoder.output_size)
    model = models.Seq2Seq(encoder, decoder)
    plain = on_torch_layers(model)
    assert not any(isinstance(m, fusedrnn.LSTM) for m in plain.modules())
    assert any(isinstance(m, fusedrnn.LSTM) for m in model.modules())
    arguments = torch.randint(9, (3, 5)), torch.randint(7, (3, 6)), torch.tensor([5, 2, 4])
    found, expected = model(*arguments), plain(*arguments)
    torch.testing.assert_close(found, expected)
    found[0].square().sum().backward()
    expected[0].square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
