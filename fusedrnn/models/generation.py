"""Reading a decoder out: the likeliest token each time, drawn ones, the best of many beams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedrnn.models._checks import check_positive
from fusedrnn.models.attention import Memory
from fusedrnn.models.decoder import AttentionDecoder, DecoderState


@dataclass(frozen=True)
class Generated:
    """What was generated for B rows, T steps at most; beam_search has an axis of beams after B."""

    tokens: Tensor  # int64 (B, T), the end token from the first one on
    lengths: Tensor  # int64 (B,) tokens before the end token
    scores: Tensor  # (B,) sum of the tokens' log-probabilities, the end token's included
    attention: Tensor | None  # (B, T, S)


def greedy(
    decoder: AttentionDecoder,
    state: DecoderState,
    memory: Memory | None = None,
    *,
    start: int,
    end: int,
    max_length: int,
) -> Generated:
    """The likeliest token at each step, until every row has ended or max_length tokens stand.

    Args:
        state, memory: of the rows, see :meth:`Seq2Seq.encode`.
        start, end: the tokens that open and close a sequence.

    Raises:
        ValueError: for tokens outside the vocabulary, a max_length below 1, a memory without
            attention or none with it.
    """
    return _one_by_one(
        decoder, state, memory, start, end, max_length, lambda logits: logits.argmax(-1)
    )


def sample(
    decoder: AttentionDecoder,
    state: DecoderState,
    memory: Memory | None = None,
    *,
    start: int,
    end: int,
    max_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Tokens drawn from the decoder's distribution; arguments as for :func:`greedy`.

    Args:
        temperature: logits are divided by it; below 1 likely tokens get likelier.
        top_k: only so many of the likeliest tokens.
        top_p: only the likeliest tokens whose probabilities sum to at least this much (Holtzman et
            al. 2020), after temperature and top_k.

    Returns:
        As :func:`greedy`. Scores are of the decoder's own distribution, whatever was cut.

    Raises:
        ValueError: as :func:`greedy`, and for a temperature, top_k or top_p out of range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
    if top_k is not None:
        check_positive(top_k=top_k)
        if top_k > decoder.num_embeddings:
            raise ValueError(
                f"top_k: expected at most the vocabulary's {decoder.num_embeddings}, got {top_k}"
            )
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a probability in (0, 1], got {top_p!r}")

    def draw(logits: Tensor) -> Tensor:
        kept = restricted(logits / temperature, top_k, top_p)
        return torch.multinomial(kept.softmax(-1), 1, generator=generator).squeeze(1)

    return _one_by_one(decoder, state, memory, start, end, max_length, draw)


def restricted(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (B, V), minus infinity where top_k or top_p leave a token out."""
    if top_k is not None:
        # By place: of equally likely ones, no more than so many.
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(
            1, logits.topk(top_k).indices, True
        )
        logits = logits.masked_fill(~kept, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(-1, descending=True)
        shares = ordered.softmax(-1)
        # The likelier ones already make up top_p; none of them are likelier than the first token.
        enough = shares.cumsum(-1) - shares >= top_p
        logits = logits.masked_fill(enough.gather(1, order.argsort(-1)), -torch.inf)
    return logits


def _check(decoder: AttentionDecoder, start: int, end: int, max_length: int) -> None:
    check_positive(max_length=max_length)
    for name, token in (("start", start), ("end", end)):
        if not 0 <= token < decoder.num_embeddings:
            raise ValueError(
                f"{name}: expected a token in 0..{decoder.num_embeddings - 1}, got {token!r}"
            )


@torch.no_grad()
def _one_by_one(
    decoder: AttentionDecoder,
    state: DecoderState,
    memory: Memory | None,
    start: int,
    end: int,
    max_length: int,
    choose: Callable[[Tensor], Tensor],
) -> Generated:
    _check(decoder, start, end, max_length)
    rows, device = state.h.shape[1], state.h.device
    given = torch.full((rows,), start, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    scores = torch.zeros(rows, device=device)
    tokens, attention = [], []
    for _ in range(max_length):
        logits, state, weights = decoder.step(given, state, memory)
        chosen = choose(logits)
        gained = logits.log_softmax(-1).gather(1, chosen[:, None]).squeeze(1)
        scores = scores + gained.masked_fill(ended, 0.0)
        given = chosen.masked_fill(ended, end)
        tokens.append(given)
        attention.append(weights)
        ended = ended | (given == end)
        if bool(ended.all()):
            break
    found = torch.stack(tokens, 1)
    lengths = (found != end).sum(1)
    return Generated(found, lengths, scores, None if memory is None else torch.stack(attention, 1))


@torch.no_grad()
def beam_search(
    decoder: AttentionDecoder,
    state: DecoderState,
    memory: Memory | None = None,
    *,
    start: int,
    end: int,
    max_length: int,
    beam_size: int,
    length_penalty: float = 0.0,
) -> Generated:
    """The best sequences that beams of partial ones find, best first; all rows at once.

    Hypotheses are ranked by ``score / ((5 + n) / 6) ** length_penalty``, n being the tokens with
    the end token (Wu et al. 2016); 0 ranks by the score alone. Those that reach max_length without
    an end token count as they are.

    Args:
        beam_size: K partial sequences a row; at most the vocabulary's size.

    Returns:
        tokens (B, K, T), lengths, scores (B, K), minus infinity where fewer than K were found, and
        attention (B, K, T, S) or None.

    Raises:
        ValueError: as :func:`greedy`, and for a beam wider than the vocabulary.
    """
    _check(decoder, start, end, max_length)
    check_positive(beam_size=beam_size)
    vocabulary = decoder.num_embeddings
    if beam_size > vocabulary:
        raise ValueError(
            f"beam_size: expected at most the vocabulary's {vocabulary}, got {beam_size}"
        )
    rows, device = state.h.shape[1], state.h.device
    state = state.select(torch.arange(rows, device=device).repeat_interleave(beam_size))
    memory = None if memory is None else memory.repeat(beam_size)
    first_beam = torch.arange(rows, device=device)[:, None] * beam_size
    beams = _Beams.empty(rows, beam_size, memory, device)
    finished = _Beams.none(beams)
    beams.scores[:, 1:] = -torch.inf  # all beams are alike at first: one of them counts
    given = torch.full((rows * beam_size,), start, device=device)
    for step in range(1, max_length + 1):
        logits, state, weights = decoder.step(given, state, memory)
        gained = logits.log_softmax(-1).view(rows, beam_size, vocabulary)
        # At most K of the best 2K end here, so K that go on are among them.
        candidates = (beams.scores[..., None] + gained).view(rows, -1)
        scores, index = candidates.topk(min(2 * beam_size, candidates.shape[1]))
        origin, token = index // vocabulary, index % vocabulary
        if weights is not None:
            weights = weights.view(rows, beam_size, -1)
        longer = beams.extended(origin, token, scores, weights)
        done = (token == end) | (step == max_length)
        penalty = ((5.0 + step) / 6.0) ** length_penalty
        finished = finished.best_with(longer, scores / penalty, done, end, beam_size)
        ranks = scores.masked_fill(done, -torch.inf).topk(beam_size)
        beams = longer.taken(ranks.indices, ranks.values)
        # What goes on can only lose score; a longer one is divided by more.
        reach = max(penalty, ((5.0 + max_length) / 6.0) ** length_penalty)
        if bool((ranks.values[:, 0] / reach <= finished.ranks[:, -1]).all()):
            break
        given = beams.tokens[..., -1].reshape(-1)
        state = state.select((first_beam + origin.gather(1, ranks.indices)).reshape(-1))
    lengths = (finished.tokens != end).sum(-1)
    return Generated(finished.tokens, lengths, finished.scores, finished.attention)


@dataclass
class _Beams:
    """Sequences of each row, T tokens each."""

    tokens: Tensor  # (B, K, T)
    scores: Tensor  # (B, K)
    attention: Tensor | None  # (B, K, T, S)
    ranks: Tensor  # (B, K): what finished ones are ordered by

    @staticmethod
    def empty(rows: int, beams: int, memory: Memory | None, device: torch.device) -> _Beams:
        """Sequences of no tokens."""
        scores = torch.zeros(rows, beams, device=device)
        attention = None
        if memory is not None:
            attention = memory.values.new_zeros(rows, beams, 0, memory.values.shape[1])
        tokens = torch.zeros(rows, beams, 0, dtype=torch.int64, device=device)
        return _Beams(tokens, scores, attention, scores.clone())

    @staticmethod
    def none(like: _Beams) -> _Beams:
        """As many places for finished sequences, none taken."""
        nothing = torch.full_like(like.scores, -torch.inf)
        return _Beams(like.tokens, nothing, like.attention, nothing)

    def extended(
        self, origin: Tensor, token: Tensor, scores: Tensor, weights: Tensor | None
    ) -> _Beams:
        """Sequences `origin` (B, N), each a token longer."""
        taken = self.taken(origin, scores)
        attention = taken.attention
        if attention is not None and weights is not None:
            latest = _rows_of(weights, origin)
            attention = torch.cat([attention, latest[:, :, None]], 2)
        tokens = torch.cat([taken.tokens, token[..., None]], -1)
        return _Beams(tokens, scores, attention, scores)

    def taken(self, index: Tensor, scores: Tensor) -> _Beams:
        attention = None if self.attention is None else _rows_of(self.attention, index)
        return _Beams(_rows_of(self.tokens, index), scores, attention, scores)

    def best_with(
        self, others: _Beams, ranks: Tensor, allowed: Tensor, end: int, count: int
    ) -> _Beams:
        """The best `count` of these and of the allowed others, whose tokens are one longer."""
        pad = self.tokens.new_full((*self.tokens.shape[:2], 1), end)
        tokens = torch.cat([torch.cat([self.tokens, pad], -1), others.tokens], 1)
        scores = torch.cat([self.scores, others.scores], 1)
        all_ranks = torch.cat([self.ranks, ranks.masked_fill(~allowed, -torch.inf)], 1)
        best = all_ranks.topk(count)
        attention = None
        if self.attention is not None and others.attention is not None:
            none = torch.zeros_like(others.attention[:, :1, :1]).expand(
                -1, self.attention.shape[1], -1, -1
            )
            padded = torch.cat([self.attention, none], 2)
            attention = _rows_of(torch.cat([padded, others.attention], 1), best.indices)
        kept = _Beams(
            _rows_of(tokens, best.indices),
            scores.gather(1, best.indices),
            attention,
            best.values,
        )
        kept.scores = kept.scores.masked_fill(best.values == -torch.inf, -torch.inf)
        return kept


def _rows_of(values: Tensor, index: Tensor) -> Tensor:
    """values (B, N, ...) at index (B, M): (B, M, ...)."""
    shape = index.shape + (1,) * (values.dim() - 2)
    return values.gather(1, index.view(shape).expand(*index.shape, *values.shape[2:]))
