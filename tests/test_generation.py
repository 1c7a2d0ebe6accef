"""Greedy, drawn and beam-searched sequences, against every sequence there is."""

from __future__ import annotations

import itertools

import pytest
import torch

from fusedrnn import models
from fusedrnn.models.generation import restricted
from test_models import seq2seq

START, END = 0, 1


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small."""


def sharp(attention: str | None, vocabulary: int = 4, factor: float = 3.0) -> models.Seq2Seq:
    """A model whose distributions are far from uniform."""
    model = seq2seq(attention, vocabulary=vocabulary)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(factor)
    return model


def all_sequences(model: models.Seq2Seq, row: torch.Tensor, longest: int, penalty: float):
    """(rank, tokens without the end, score) of every sequence, best first; one row of source."""
    vocabulary = model.decoder.num_embeddings
    found = []
    for length in range(1, longest + 1):
        for tokens in itertools.product(range(vocabulary), repeat=length):
            ends = tokens[-1] == END
            if END in tokens[:-1] or not (ends or length == longest):
                continue
            given = torch.tensor([[START, *tokens[:-1]]])
            logp = model(row, given)[0].log_softmax(-1)[0]
            score = sum(logp[t, token].item() for t, token in enumerate(tokens))
            rank = score / ((5 + length) / 6) ** penalty
            found.append((rank, tokens[:-1] if ends else tokens, score))
    return sorted(found, key=lambda f: -f[0])


@pytest.mark.parametrize("penalty", [0.0, 0.8, 2.0])
@pytest.mark.parametrize("attention", [None, "general", "bahdanau"])
def test_beam_search_finds_the_best_there_are(attention: str | None, penalty: float) -> None:
    """Beams as wide as the vocabulary lose nothing over two steps."""
    model = sharp(attention)
    source = torch.randint(9, (5, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        state, memory = model.encode(source)
        found = models.beam_search(
            model.decoder,
            state,
            memory,
            start=START,
            end=END,
            max_length=2,
            beam_size=4,
            length_penalty=penalty,
        )
        for row in range(5):
            expected = all_sequences(model, source[row : row + 1], 2, penalty)[:4]
            for beam, (_, tokens, score) in enumerate(expected):
                length = int(found.lengths[row, beam])
                assert tuple(found.tokens[row, beam, :length].tolist()) == tokens
                assert found.scores[row, beam].item() == pytest.approx(score, abs=1e-4)
                assert found.tokens[row, beam, length:].eq(END).all()


def test_wider_beams_find_what_narrow_ones_miss() -> None:
    model = sharp("general", vocabulary=5, factor=2.0)
    source = torch.randint(9, (12, 6), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        state, memory = model.encode(source)
        best = []
        for width in (1, 2, 4):
            found = models.beam_search(
                model.decoder, state, memory, start=START, end=END, max_length=3, beam_size=width
            )
            assert found.tokens.shape[:2] == (12, width)
            assert (found.scores.diff(dim=1) <= 1e-6).all(), "best first"
            best.append(found.scores[:, 0])
        exact = torch.tensor([all_sequences(model, row[None], 3, 0.0)[0][2] for row in source])
    assert (best[0] < exact - 1e-3).all(), "one beam is led astray in every row"
    assert (best[1] <= exact + 1e-4).all()
    torch.testing.assert_close(best[2], exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", [None, "general", "bahdanau"])
def test_beams_carry_their_own_state(attention: str | None) -> None:
    """Scores and attention of every beam are those of its tokens by teacher forcing."""
    model = sharp(attention, vocabulary=6, factor=1.5)
    source = torch.randint(9, (5, 6), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        state, memory = model.encode(source)
        found = models.beam_search(
            model.decoder, state, memory, start=START, end=END, max_length=5, beam_size=4
        )
        assert len({tuple(t) for t in found.tokens.flatten(0, 1).tolist()}) >= 4
        for row, beam in itertools.product(range(5), range(4)):
            stop = min(int(found.lengths[row, beam]) + 1, found.tokens.shape[-1])
            tokens = found.tokens[row, beam, :stop]
            given = torch.cat([torch.tensor([START]), tokens[:-1]])[None]
            logits, weights = model(source[row : row + 1], given)
            score = logits.log_softmax(-1)[0].gather(1, tokens[:, None]).sum()
            torch.testing.assert_close(found.scores[row, beam], score)
            if attention is not None:
                torch.testing.assert_close(found.attention[row, beam, :stop], weights[0])


def test_one_beam_is_greedy() -> None:
    model = sharp("general", vocabulary=7)
    state, memory = model.encode(torch.randint(9, (8, 5)))
    options = {"start": START, "end": END, "max_length": 9}
    one = models.beam_search(model.decoder, state, memory, beam_size=1, **options)
    likeliest = models.greedy(model.decoder, state, memory, **options)
    steps = min(one.tokens.shape[-1], likeliest.tokens.shape[1])
    assert one.tokens[:, 0, :steps].equal(likeliest.tokens[:, :steps])
    torch.testing.assert_close(one.scores[:, 0], likeliest.scores)
    assert one.lengths[:, 0].equal(likeliest.lengths)
    for row in range(8):
        length = int(likeliest.lengths[row])
        torch.testing.assert_close(
            one.attention[row, 0, :length], likeliest.attention[row, :length]
        )


def test_greedy_takes_the_likeliest_of_teacher_forcing() -> None:
    model = sharp("concat", vocabulary=7)
    source = torch.randint(9, (8, 5))
    state, memory = model.encode(source)
    found = models.greedy(model.decoder, state, memory, start=START, end=END, max_length=6)
    given = torch.cat([torch.full((8, 1), START), found.tokens[:, :-1]], 1)
    logits, weights = model(source, given)
    for row in range(8):
        stop = min(int(found.lengths[row]) + 1, found.tokens.shape[1])
        assert logits[row, :stop].argmax(-1).equal(found.tokens[row, :stop])
        logp = logits[row, :stop].log_softmax(-1)
        score = logp.gather(1, found.tokens[row, :stop, None]).sum()
        torch.testing.assert_close(found.scores[row], score)
        torch.testing.assert_close(found.attention[row, :stop], weights[row, :stop])


def test_samples_follow_the_distribution() -> None:
    model = seq2seq(None, vocabulary=5)
    state, _ = model.encode(torch.zeros(1, 3, dtype=torch.int64))
    many = state.select(torch.zeros(20000, dtype=torch.int64))
    generator = torch.Generator().manual_seed(0)
    options = {"start": START, "end": END, "max_length": 1, "generator": generator}
    logits = model.decoder.step(torch.tensor([START]), state)[0][0].detach()
    for temperature in (1.0, 0.3):
        drawn = models.sample(model.decoder, many, temperature=temperature, **options).tokens[:, 0]
        shares = drawn.bincount(minlength=5) / 20000
        torch.testing.assert_close(shares, (logits / temperature).softmax(-1), rtol=0, atol=0.015)
    order = logits.argsort(descending=True)
    drawn = models.sample(model.decoder, many, top_k=2, **options).tokens[:, 0]
    assert set(drawn.tolist()) == set(order[:2].tolist())
    cut = logits.softmax(-1)[order].cumsum(0)
    drawn = models.sample(model.decoder, many, top_p=float(cut[2]) - 1e-3, **options).tokens[:, 0]
    assert set(drawn.tolist()) == set(order[:3].tolist())
    scores = models.sample(model.decoder, many, top_k=1, **options).scores
    torch.testing.assert_close(scores, logits.log_softmax(-1).max().expand(20000))


def test_restricted() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.7, 0.1, 0.1, 0.1]]).log()
    kept = restricted(logits, None, 0.6).isfinite()
    assert kept.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert restricted(logits, None, 1e-9).isfinite().sum(1).tolist() == [1, 1]
    assert restricted(logits, None, 1.0).isfinite().all()
    assert restricted(logits, 2, None)[0].isfinite().tolist() == [False, True, True, False]
    assert restricted(torch.zeros(1, 5), 2, None).isfinite().sum() == 2, "equally likely ones"


@pytest.mark.parametrize(
    ("function", "options", "match"),
    [
        (models.beam_search, {"beam_size": 8}, "beam_size: expected at most the vocabulary's 7"),
        (models.beam_search, {"beam_size": 0}, "beam_size: expected a positive integer"),
        (models.greedy, {"max_length": 0}, "max_length: expected a positive integer"),
        (models.greedy, {"start": 7}, r"start: expected a token in 0\.\.6, got 7"),
        (models.greedy, {"end": -1}, r"end: expected a token in 0\.\.6, got -1"),
        (models.sample, {"temperature": 0.0}, "temperature: expected a positive number"),
        (models.sample, {"top_k": 8}, "top_k: expected at most the vocabulary's 7"),
        (models.sample, {"top_p": 0.0}, r"top_p: expected a probability in \(0, 1\]"),
    ],
)
def test_errors(function, options, match: str) -> None:
    model = seq2seq("general")
    state, memory = model.encode(torch.zeros(2, 4, dtype=torch.int64))
    defaults = {"start": START, "end": END, "max_length": 3}
    with pytest.raises(ValueError, match=match):
        function(model.decoder, state, memory, **defaults | options)
