"""examples/char_lm.py: the whole program in a tiny setting, and what it must refuse to bless."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")


@pytest.fixture
def char_lm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import char_lm

    threads = torch.get_num_threads()
    yield char_lm
    torch.set_num_threads(threads)


def test_the_program(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "char_lm.py"), "--tiny", "--out", str(tmp_path)]
    # the fusedrnn that these tests import, installed or not
    env = {**os.environ, "PYTHONPATH": str(Path(fusedrnn.__file__).resolve().parents[1])}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "The two loss curves agree" in done.stdout
    assert (tmp_path / "char_lm.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads((tmp_path / "char_lm.json").read_text())["runs"]
    assert set(runs) == {"lstm", "gru"}
    for pair in runs.values():
        for run in pair.values():
            assert len(run["losses"]) == len(run["clock"]) == 12
            assert run["losses"][-1] < run["losses"][0], "nothing was learnt"
            assert run["clock"] == sorted(run["clock"])
            assert run["memory_mib"] > 0
            assert len(run["sample"]) == len("The ") + 40
        # Equal weights and batches: the first loss differs by rounding only.
        first = [run["losses"][0] for run in pair.values()]
        assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_held_out_text_is_held_out(char_lm) -> None:
    corpus = char_lm.load_corpus()
    train, valid = (
        "".join(corpus.alphabet[i] for i in part.tolist()) for part in (corpus.train, corpus.valid)
    )
    assert 0.05 < len(valid) / len(train) < 0.2
    paragraphs = [p for p in valid.split("\n\n") if len(p) > 80]
    assert len(paragraphs) > 20
    assert not [p for p in paragraphs if p in train]


def test_batches_are_the_same_for_both(char_lm) -> None:
    corpus = char_lm.load_corpus(20_000)
    (a, b), (c, d) = (corpus.batch(3, 4, 16, seed=1) for _ in range(2))
    assert a.equal(c)
    assert b.equal(d)
    assert a[1:].equal(b[:-1]), "the target is the next character"
    assert not a.equal(corpus.batch(4, 4, 16, seed=1)[0])


def runs_of(char_lm, change):
    """Two runs of 100 steps, the second one's losses and validation losses changed."""
    losses = [4.0 * 0.99**i for i in range(100)]
    plain = char_lm.Run(losses=losses, valid=[(1.0, 1.5)])
    fused = char_lm.Run(losses=list(losses), valid=[(1.0, 1.5)])
    change(fused)
    return plain, fused


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: None, None),
        (lambda r: r.losses.__setitem__(20, r.losses[20] * 1.0005), None),
        (lambda r: r.losses.__setitem__(20, r.losses[20] * 1.002), "step 20"),
        (lambda r: r.losses.__setitem__(60, r.losses[60] * 1.002), None),
        (lambda r: r.losses.__setitem__(slice(90, 100), [1.1 * x for x in r.losses[90:]]), "last"),
        (lambda r: r.losses.__setitem__(5, float("nan")), "step 5"),
        (lambda r: r.valid.__setitem__(0, (1.0, 1.52)), "validation"),
        (lambda r: r.valid.__setitem__(0, (1.0, float("nan"))), "validation"),
    ],
)
def test_disagreement(char_lm, change, complaint) -> None:
    found = char_lm.disagreement(*runs_of(char_lm, change))
    if complaint is None:
        assert found == []
    else:
        assert len(found) == 1
        assert complaint in found[0]


def test_a_wrong_model_fails_the_program(char_lm, monkeypatch, tmp_path, capsys) -> None:
    convert = char_lm.fusedrnn.convert

    def wrong(model):
        model = convert(model)
        model.rnn.bias_hh_l0.data += 0.5
        return model

    monkeypatch.setattr(char_lm.fusedrnn, "convert", wrong)
    options = ["--tiny", "--no-memory", "--cells", "gru", "--out", str(tmp_path)]
    assert char_lm.main(options) == 1
    assert "DO NOT AGREE" in capsys.readouterr().err
