"""What the programs under examples/ rest on: their data, and what they measure."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn import models
from test_examples import EXAMPLES


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
    lstm = long_memory.layer("LSTM", 2, 200, 50)
    total = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach()
    assert 0 <= total[200:400].min() < 1
    assert 3.5 < total[200:400].max() <= torch.tensor(49.0).log()
    torch.testing.assert_close(total[:200], -total[200:400])
    # By hand: the gradient reaches back through W_hh and the tanh of every step.
    norms = long_memory.gradient_norms("RNN tanh", 5, 4, batch=1)
    torch.manual_seed(1)
    rnn = long_memory.layer("RNN tanh", 2, 4, 5)
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


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import classify

    codes, train, held_out = classify.load(5, 300, seed=3)
    assert not {p.name for p in train} & {p.name for p in held_out}, "held-out names are held out"
    assert 100 < len(held_out) < 200
    assert {p.country for p in train} == set(range(len(codes))) == set(range(5))
    alphabet = classify.Alphabet([classify.Place("abab", 0), classify.Place("bx", 1)])
    assert len(alphabet) == 4, "padding, unknown, a and b"
    batch = alphabet.batch([classify.Place("xba", 1), classify.Place("b", 0)])
    assert batch.letters.tolist() == [[classify.UNKNOWN, 3, 2], [3, 0, 0]]
    assert batch.lengths.tolist() == [3, 1]
    # A bag does not see the order; a reader does.
    places = [classify.Place("Lichtenrade", 0), classify.Place("Ahmedabad", 1)]
    mixed = classify.shuffled(places, seed=1)
    letters = classify.Alphabet(places)
    assert [sorted(p.name) for p in mixed] == [sorted(p.name) for p in places]
    bag = classify.Bag(len(letters), 2, None)
    torch.testing.assert_close(bag(letters.batch(places)), bag(letters.batch(mixed)))
    alone = torch.cat([bag(letters.batch([place])) for place in places])
    torch.testing.assert_close(bag(letters.batch(places)), alone)  # padding is no letter
    reader = classify.Reader("gru", len(letters), 2, 8).eval()
    assert not torch.allclose(reader(letters.batch(places)), reader(letters.batch(mixed)))


def test_scores_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import classify

    _, longest = classify.LENGTHS[0]
    names = ("abc", "a" * (longest + 1), "b" * longest)
    places = [classify.Place(name, n) for name, n in zip(names, (0, 1, 1), strict=True)]
    logits = torch.tensor([[3.0, 0, 0, 1], [0, 3, 0, 2], [3, 0, 1, 2]])
    assert classify.confusion(logits, places)[:2, :2].tolist() == [[1, 0], [1, 1]]
    found = classify.scores(logits, places)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["top3"] == pytest.approx(2 / 3), "the third's is the least likely of four"
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 3) / 4)
    assert found["by_length"][:2] == [0.5, 1.0]


def test_chorales_as_tokens_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from music21 import converter

    import chorale_text as text

    train, held_out = text.load(12, 0, lambda works: works)
    assert held_out
    assert not {c.title for c in train} & {c.title for c in held_out}
    for chorale in [*train, *held_out]:
        paths = text.write(chorale.tokens, tmp_path, "again")
        again = text.read_chorale(converter.parse(paths[1]), chorale.title)
        assert again is not None
        # What is left beyond the last note's measure is rests.
        steps = len(chorale.tokens)
        assert again.tokens[:steps].equal(chorale.tokens), chorale.title
        assert again.tokens[steps:].eq(text.REST).all()
    first = train[0].tokens
    up = text.transposed(first, 3)
    sounding = first >= text.FIRST
    assert up[sounding].equal(first[sounding] + 3)
    assert up[~sounding].equal(first[~sounding])
    silent = torch.tensor([[text.HOLD, text.REST, text.EDGE, text.FIRST]])
    assert text.transposed(silent, 2).tolist() == [
        [text.HOLD, text.REST, text.EDGE, text.FIRST + 2]
    ]
    batch = text.batch_of([first, first[:5]])
    assert batch.lengths.tolist() == [len(first) + 1, 6]
    assert batch.given[:, 0].eq(text.EDGE).all()
    assert batch.wanted[1, 5].eq(text.EDGE).all()
    assert batch.given[0, 1:].equal(batch.wanted[0, :-1])
    hold, rest, note = text.HOLD, text.REST, text.FIRST
    voice = [rest, rest, note, hold, note + 2, rest]
    assert text.notes_of(voice) == [(0, 2, None), (2, 2, 30), (4, 1, 32), (5, 1, None)]


def test_what_a_composer_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its likelihood, by hand: the steps before, and the voices above at this one."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import chorale_text as text
    import compose

    model = compose.Composer("gru", 8).eval()
    generator = torch.Generator().manual_seed(2)
    pieces = [torch.randint(text.TOKENS, (n, 4), generator=generator) for n in (6, 3)]
    batch = text.batch_of(pieces)
    nats = torch.zeros(4)
    for piece in pieces:
        edge = torch.full((1, 4), text.EDGE)
        state, wanted = None, torch.cat([piece, edge])
        for t, given in enumerate(torch.cat([edge, piece])):
            states, state = model.read(given[None, None], state=state, first=t)
            for voice in range(4):
                above = [wanted[t, v][None] for v in range(voice)]
                chances = model.logits(states[:, 0], voice, above).log_softmax(-1)
                nats[voice] -= chances[0, wanted[t, voice]]
    torch.testing.assert_close(model(batch), nats)
    steps = sum(len(piece) + 1 for piece in pieces)
    assert compose.likelihood(model, pieces) == pytest.approx((nats / steps).tolist(), rel=1e-4)
    # Pairs that were counted predict what was counted.
    again = torch.tensor([[5, 6, 7, 8], [9, 9, 9, 9]] * 40)
    assert max(compose.counted([again], [again])) < 0.5
    assert min(compose.counted([again], [pieces[0]])) > 1.5
    # Each of edge, 5, 9 was followed once by the next; a tenth is added to every count.
    piece = torch.tensor([[5] * 4, [9] * 4])
    chance = torch.tensor(1.1 / (1 + 0.1 * text.TOKENS))
    assert compose.counted([piece], [piece]) == pytest.approx([-chance.log().item()] * 4)


def test_no_forecast_looks_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after an origin changes no forecast from it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    import numpy as np

    import forecast
    import series as data

    args = forecast.parse(["--tiny"])
    for whole in data.load():
        known, origins = data.folds(whole)[0]
        origins = origins[:3]

        def all_forecasts(series, known=known, origins=origins):
            fitted = forecast.fit_network(series, known, 0, args)
            return [
                fitted.forecast(series, origins),
                data.autoregression(series, known, origins),
                data.naive(series, origins),
                data.naive_and_rise(series, origins),
            ]

        other = whole.values.copy()
        other[origins[-1] :] += 1000
        found = all_forecasts(whole)
        same = all_forecasts(dataclasses.replace(whole, values=other))
        for a, b in zip(found, same, strict=True):
            assert a.shape == (3, whole.horizon)
            assert np.array_equal(a, b)
        other = whole.values.copy()
        other[known - 1 :] += 1000
        changed = all_forecasts(dataclasses.replace(whole, values=other))
        assert all(not np.array_equal(a, b) for a, b in zip(found, changed, strict=True))


def test_folds_and_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import numpy as np

    import forecast
    import series as data

    shape = (False, 4, 8, 3, 10, 5, 2, 2)  # rises, period, window, horizon, test, fold, ...
    line = data.Series("line", "m", np.arange(40.0), *shape)
    assert data.folds(line) == [(30, [30, 32, 34]), (35, [35, 37])]
    assert data.naive(line, [30, 32]).tolist() == [[26, 27, 28], [28, 29, 30]]
    assert data.naive_and_rise(line, [30]).tolist() == [[30, 31, 32]], "a line is no surprise"
    fading = data.Series("fading", "m", 100 * 0.9 ** np.arange(40.0), *shape)
    found = data.autoregression(fading, 30, [32, 36])
    assert found == pytest.approx(np.stack([fading.values[o : o + 3] for o in (32, 36)]))
    bent = np.arange(40.0) ** 2  # its differences rise by the same each step: an AR(1) of them
    rising = dataclasses.replace(line, values=bent, rises=True)
    found = data.autoregression(rising, 30, [32, 36])
    assert found == pytest.approx(np.stack([bent[o : o + 3] for o in (32, 36)]))
    windows, future = forecast.examples_of(line, 30, 0.0, 1.0)
    assert windows.shape == (20, 8)
    assert future[-1].tolist() == [27, 28, 29], "nothing from beyond"
    same = np.full((30, 2), 7.0)
    assert forecast.interval(same, line, 20).tolist() == [[7.0, 7.0], [7.0, 7.0]]


def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from babel.messages.catalog import Catalog
    from babel.messages.mofile import write_mo

    import message_text as text
    import translate_messages

    catalogue = Catalog(locale="de")
    catalogue.add("Save  it\n", "Sichern")
    catalogue.add(("%d page", "%d pages"), ("%d Seite", "%d Seiten"))
    catalogue.add("not yet", "")
    with open(tmp_path / "a.mo", "wb") as file:
        write_mo(file, catalogue)
    assert sorted(text.catalogue(tmp_path / "a.mo")) == [
        ("%d page", "%d Seite"),
        ("%d pages", "%d Seiten"),
        ("Save it", "Sichern"),
    ]
    pairs, held_out = text.load(seed=0)
    assert not {p.source for p in pairs} & {p.source for p in held_out}
    counts = {k: sum(p.kind == k for p in pairs + held_out) for k in ("sentence", "name")}
    assert counts["sentence"] > 4500, "of both languages"
    assert counts["name"] > 25000
    assert len({(p.language, p.source) for p in pairs}) == len(pairs)
    subwords = text.Subwords(pairs[:2000], 600)
    assert len(subwords) == 600
    for pair in held_out[:50]:
        assert subwords.text([*subwords.tokens(pair.target), text.END, 7]) == pair.target
    batch = subwords.batch(held_out[:3])
    for row, pair in enumerate(held_out[:3]):
        length = int(batch.lengths[row])
        read = batch.source[row, : batch.source_lengths[row]].tolist()
        assert text.END not in read, "attention would rest there"
        assert subwords.text(read) == pair.source
        assert subwords.text(batch.wanted[row].tolist()) == pair.target
        assert batch.given[row, 0] == text.start_of(pair.language)
        assert batch.given[row, 1:length].equal(batch.wanted[row, : length - 1])
        assert batch.wanted[row, length - 1] == text.END
    drawn = text.batches(pairs[:3000], 8, 0)
    many = [pair for _ in range(16) for pair in next(drawn)]
    assert sum(p.kind == "name" for p in many) == 64, "as many sentences as names"
    perfect = translate_messages.scores([p.target for p in held_out], held_out)
    assert list(perfect) == ["de sentences", "de names", "fr sentences", "fr names"]
    german = [p.target if p.language == "de" else "" for p in held_out]
    half = translate_messages.scores(german, held_out)
    assert [score["exact"] for score in half.values()] == [1.0, 1.0, 0.0, 0.0]
    for score in perfect.values():
        assert score == {"bleu": pytest.approx(100), "chrf": pytest.approx(100), "exact": 1.0}
