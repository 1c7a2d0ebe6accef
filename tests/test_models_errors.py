"""fusedrnn.models: what is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import models

ENCODER = {"input_size": 5, "hidden_size": 4, "num_embeddings": 9}
DECODER = {"num_embeddings": 7, "embedding_size": 3, "hidden_size": 6, "memory_size": 4}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cell": "LSTM"}, "cell: expected one of 'rnn', 'lstm', 'gru'"),
        ({"hidden_size": 0}, "hidden_size: expected a positive integer, got 0"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
        ({"num_embeddings": -1}, "num_embeddings: expected a positive"),
    ],
)
def test_encoder_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        models.Encoder(**ENCODER | options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attention": "luong"}, "attention: expected one of None, 'dot'"),
        ({"attention": None}, "memory_size: expected with attention"),
        ({"memory_size": None}, "memory_size: expected with attention"),
        ({"attention": "dot"}, "memory_size: dot needs query_size = 6, got 4"),
        ({"attention": "bahdanau", "input_feeding": True}, "input_feeding: needs Luong"),
        ({"attention_scale": 0.0}, "scale: expected a positive number, got 0.0"),
    ],
)
def test_decoder_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        models.AttentionDecoder(**DECODER | options)


@pytest.mark.parametrize(
    ("tokens", "lengths", "error", "match"),
    [
        (torch.zeros(0, 4, dtype=torch.int64), None, ValueError, "input: expected at least one"),
        (torch.zeros(2, 0, dtype=torch.int64), None, ValueError, "input: expected at least one"),
        (torch.full((2, 4), 9), None, ValueError, r"input: expected indices in 0\.\.8, got 9"),
        (torch.full((2, 4), -1), None, ValueError, r"input: expected indices in 0\.\.8, got -1"),
        (torch.zeros(2, 4), None, TypeError, "input: expected int64"),
        (torch.full((2, 4), 1), torch.tensor([5, 1]), ValueError, r"lengths must lie in 0\.\.4"),
        (torch.full((2, 4), 1), torch.tensor([1]), ValueError, r"lengths must have shape \(2,\)"),
        (torch.full((2, 4), 1), torch.tensor([1.0, 2.0]), ValueError, "lengths must have dtype"),
    ],
)
def test_encoder_input(tokens: Tensor, lengths: Tensor | None, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        models.Encoder(**ENCODER)(tokens, lengths)


def test_other_errors() -> None:
    encoder = models.Encoder(3, 4)
    with pytest.raises(ValueError, match=r"input: expected a non-empty \(B, T, 3\)"):
        encoder(torch.randn(2, 5, 4))
    with pytest.raises(ValueError, match=r"hx: expected \(1, B, 4\)"):
        encoder(torch.randn(2, 5, 3), hx=(torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)))
    gru = models.AttentionDecoder(7, 3, 6, attention=None, cell="gru")
    with pytest.raises(ValueError, match="decoder: expected cell 'lstm', got 'gru'"):
        models.Seq2Seq(encoder, gru)
    deep = models.AttentionDecoder(7, 3, 6, attention=None, num_layers=2)
    with pytest.raises(ValueError, match="at most the encoder's 1 layers, got 2"):
        models.Seq2Seq(encoder, deep)
    wide = models.AttentionDecoder(7, 3, 6, 5)
    with pytest.raises(ValueError, match="expected memory_size 4, got 5"):
        models.Seq2Seq(encoder, wide)
    whole = models.Encoder(5, 4, num_embeddings=9)
    model = models.Seq2Seq(whole, models.AttentionDecoder(7, 3, 4, whole.output_size))
    with pytest.raises(ValueError, match="target: expected 2 rows like source, got 3"):
        model(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens: expected indices in 0\.\.6, got 7"):
        model(torch.zeros(2, 4, dtype=torch.int64), torch.full((2, 4), 7))
    state, _ = model.encode(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="memory: expected with attention"):
        model.decoder(torch.zeros(2, 4, dtype=torch.int64), state)
    with pytest.raises(TypeError, match="targets: expected int64"):
        models.sequence_cross_entropy(
            torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int32), torch.tensor([1, 3])
        )
    with pytest.raises(ValueError, match="module: expected RNNs alone, got GRU"):
        models.identity_recurrent_(fusedrnn.GRU(3, 4))
    with pytest.raises(ValueError, match="module: expected a recurrent module inside Linear"):
        models.orthogonal_recurrent_(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="module: expected an LSTM with biases inside LSTM"):
        models.forget_gate_bias_(fusedrnn.LSTM(3, 4, bias=False))
    logits, targets = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="valid step to take the mean over"):
        models.sequence_cross_entropy(logits, targets, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"targets: expected indices in 0\.\.3, got 4"):
        models.sequence_cross_entropy(logits, targets + 4)
    with pytest.raises(ValueError, match=r"logits: expected \(B, T, V\)"):
        models.sequence_cross_entropy(logits[:, :2], targets)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        models.sequence_cross_entropy(logits, targets, reduction="none")


def test_a_decoder_and_its_memory() -> None:
    """Attention needs a memory, and nothing else takes one, by whatever way the decoder is read."""
    first = {"start": 1, "end": 2, "max_length": 3}
    memory = models.Attention("general", 6, 4).remember(torch.randn(2, 5, 4))
    hidden = (torch.zeros(1, 2, 6), torch.zeros(1, 2, 6))
    attending = models.AttentionDecoder(**DECODER)
    alone = models.AttentionDecoder(**DECODER | {"memory_size": None, "attention": None})
    for decoder, wrong in ((attending, None), (alone, memory)):
        state = decoder.initial_state(hidden)
        for read in (
            lambda d, s, m: d.step(torch.zeros(2, dtype=torch.int64), s, m),
            lambda d, s, m: d(torch.zeros(2, 4, dtype=torch.int64), s, m),
            lambda d, s, m: models.greedy(d, s, m, **first),
            lambda d, s, m: models.sample(d, s, m, **first),
            lambda d, s, m: models.beam_search(d, s, m, beam_size=2, **first),
        ):
            with pytest.raises(ValueError, match="memory: expected with attention, and only then"):
                read(decoder, state, wrong)


def test_attention_input() -> None:
    attention = models.Attention("general", 6, 4)
    memory = attention.remember(torch.randn(2, 5, 4))
    with pytest.raises(ValueError, match=r"query: expected \(B, T, 6\), got shape \(2, 3, 5\)"):
        attention(torch.randn(2, 3, 5), memory)
    with pytest.raises(ValueError, match="memory: expected the query's 3 rows, got 2"):
        attention(torch.randn(3, 1, 6), memory)
