"""fusedrnn.models: encoder, attention, decoder, losses, initialisers against independent forms."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn import models

CELLS = ("rnn", "lstm", "gru")
ATTENTIONS = (None, "dot", "general", "concat", "bahdanau")


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small."""


def parts(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


# ---- the encoder --------------------------------------------------------------------------------


def test_encoder_drops_out_between_layers_in_training() -> None:
    encoder = models.Encoder(5, 4, num_layers=3, dropout=0.5)
    x = torch.randn(4, 6, 5)
    torch.manual_seed(1)
    found, _ = encoder(x)
    torch.manual_seed(1)
    y = x
    for index, layer in enumerate(encoder.stack.layers):
        y = layer(F.dropout(y, 0.5) if index > 0 else y)[0]
    assert found.equal(y)
    encoder.eval()
    assert encoder(x)[0].equal(encoder(x)[0])


def test_decoder_drops_out_in_training() -> None:
    decoder = models.AttentionDecoder(9, 5, 4, attention=None, dropout=0.5)
    hidden = (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return decoder(torch.ones(3, 2, dtype=torch.long), decoder.initial_state(hidden))[0]

    assert logits(1).equal(logits(1))
    assert not logits(1).equal(logits(2))
    decoder.eval()
    assert logits(1).equal(logits(2))


def test_padding_stays_zero() -> None:
    encoder = models.Encoder(5, 4, num_embeddings=9, padding_idx=2)
    decoder = models.AttentionDecoder(9, 5, 4, attention=None, padding_idx=2)
    tokens = torch.tensor([[2, 3, 2]])
    output, hidden = encoder(tokens)
    (output.sum() + decoder(tokens, decoder.initial_state(hidden))[0].sum()).backward()
    for part in (encoder, decoder):
        assert part.embedding.weight[2].eq(0).all()
        assert part.embedding.weight.grad[2].eq(0).all()
        assert part.embedding.weight.grad[3].ne(0).any()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_encoder_is_torchs_layers_row_by_row(cell: str, bidirectional: bool) -> None:
    """A residual stack over rows of different length, against torch.nn over each row alone."""
    torch.manual_seed(0)
    encoder = models.Encoder(
        5, 4, num_embeddings=9, cell=cell, num_layers=3, bidirectional=bidirectional, residual=True
    ).double()
    tokens, lengths = torch.randint(9, (4, 6)), torch.tensor([6, 0, 3, 1])
    tokens[torch.arange(6) >= lengths[:, None]] = -100  # padding need be no token
    output, state = encoder(tokens, lengths)
    assert output.shape == (4, 6, encoder.output_size)
    kind = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell]
    for row, length in enumerate(lengths.tolist()):
        assert output[row, length:].eq(0).all()
        if length == 0:
            assert all(part[:, row].eq(0).all() for part in parts(state))
            continue
        x = encoder.embedding(tokens[row : row + 1, :length])
        finals = []
        for index, layer in enumerate(encoder.stack.layers):
            plain = kind(
                layer.input_size, 4, batch_first=True, bidirectional=bidirectional
            ).double()
            plain.load_state_dict(layer.state_dict())
            y, final = plain(x)
            x = y if index == 0 else x + y
            finals.append(parts(final))
        torch.testing.assert_close(output[row : row + 1, :length], x)
        for i, part in enumerate(parts(state)):
            torch.testing.assert_close(part[:, row], torch.cat([f[i] for f in finals])[:, 0])


def test_encoder_takes_features_states_and_resets() -> None:
    encoder = models.Encoder(3, 4, cell="lstm", num_layers=2)
    x = torch.randn(2, 5, 3)
    first, state = encoder(x[:, :2])
    second, final = encoder(x[:, 2:], hx=state)
    whole, expected = encoder(x)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(final, expected)
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[:, 2] = True
    torch.testing.assert_close(encoder(x, reset=reset)[0][:, 2:], encoder(x[:, 2:])[0])


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_summary_is_what_each_direction_saw_last(cell: str, bidirectional: bool) -> None:
    encoder = models.Encoder(3, 4, cell=cell, num_layers=2, bidirectional=bidirectional)
    x, lengths = torch.randn(3, 6, 3), torch.tensor([4, 6, 1])
    states, final = encoder(x, lengths)
    summary = encoder.summary(final)
    assert summary.shape == (3, encoder.output_size)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(summary[row, :4], states[row, length - 1, :4])
        if bidirectional:
            torch.testing.assert_close(summary[row, 4:], states[row, 0, 4:])


# ---- attention ----------------------------------------------------------------------------------


def attention_by_hand(module: models.Attention, q: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """One query (Q,) over the valid states (S, E), in float64."""
    weight = {n: p.detach().double() for n, p in module.named_parameters()}
    if module.kind == "dot":
        scores = torch.einsum("q,sq->s", q, m)
    elif module.kind == "general":
        scores = torch.einsum("q,qe,se->s", q, weight["key_layer.weight"], m)
    else:
        hidden = torch.einsum("aq,q->a", weight["query_layer.weight"], q) + torch.einsum(
            "ae,se->sa", weight["key_layer.weight"], m
        )
        hidden = hidden + weight.get("key_layer.bias", torch.zeros(()).double())
        scores = torch.einsum("a,sa->s", weight["score_layer.weight"][0], hidden.tanh())
    scores = scores * module.scale
    weights = scores.exp() / scores.exp().sum()
    return torch.einsum("s,se->e", weights, m), weights


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("kind", ATTENTIONS[1:])
def test_attention(kind: str, scale: float) -> None:
    torch.manual_seed(1)
    memory_size = 4 if kind == "dot" else 6
    module = models.Attention(kind, 4, memory_size, scale=scale)
    values, lengths = torch.randn(3, 5, memory_size), torch.tensor([5, 2, 0])
    values[1, 2:] = torch.nan  # padding is never looked at
    values.requires_grad_()
    query = torch.randn(3, 2, 4)
    context, weights = module(query, module.remember(values, lengths))
    for row, length in enumerate(lengths.tolist()):
        assert weights[row, :, length:].eq(0).all()
        for t in range(2):
            if length == 0:
                assert context[row, t].eq(0).all()
                continue
            right = attention_by_hand(
                module, query[row, t].double(), values[row, :length].detach().double()
            )
            torch.testing.assert_close(context[row, t].double(), right[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                weights[row, t, :length].double(), right[1], rtol=1e-5, atol=1e-5
            )
    context.square().sum().backward()
    assert values.grad is not None
    assert values.grad[1, 2:].eq(0).all()
    assert values.grad.isfinite().all()


# ---- the decoder --------------------------------------------------------------------------------


def seq2seq(
    attention: str | None, cell: str = "lstm", input_feeding: bool = False, vocabulary: int = 7
) -> models.Seq2Seq:
    torch.manual_seed(2)
    encoder = models.Encoder(5, 4, num_embeddings=9, cell=cell, num_layers=2, bidirectional=True)
    hidden = 8 if attention == "dot" else 6
    decoder = models.AttentionDecoder(
        vocabulary,
        3,
        hidden,
        None if attention is None else encoder.output_size,
        attention=attention,
        input_feeding=input_feeding,
        cell=cell,
        num_layers=2,
    )
    return models.Seq2Seq(encoder, decoder).eval()


FORMS = [
    *((attention, False) for attention in ATTENTIONS),
    *((attention, True) for attention in ("dot", "general", "concat")),
]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("attention", "input_feeding"), FORMS)
def test_teacher_forcing_is_step_by_step(
    attention: str | None, input_feeding: bool, cell: str
) -> None:
    model = seq2seq(attention, cell, input_feeding)
    source, lengths = torch.randint(9, (3, 5)), torch.tensor([5, 2, 4])
    target = torch.randint(7, (3, 6))
    logits, weights = model(source, target, lengths)
    assert logits.shape == (3, 6, 7)
    state, memory = model.encode(source, lengths)
    for t in range(6):
        expected, state, looked = model.decoder.step(target[:, t], state, memory)
        torch.testing.assert_close(logits[:, t], expected)
        if attention is not None:
            torch.testing.assert_close(weights[:, t], looked)
            torch.testing.assert_close(weights[:, t].sum(-1), torch.ones(3))
    for row, length in enumerate(lengths.tolist()):  # padding changes nothing
        alone, _ = model(source[row : row + 1, :length], target[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], alone)


@pytest.mark.parametrize(
    ("attention", "input_feeding", "calls"),
    [(None, False, 1), ("general", False, 1), ("general", True, 6), ("bahdanau", False, 6)],
)
def test_calls_of_the_kernel(attention: str | None, input_feeding: bool, calls: int) -> None:
    model = seq2seq(attention, input_feeding=input_feeding)
    state, memory = model.encode(torch.randint(9, (3, 5)))
    seen = []
    layer = model.decoder.stack.layers[0]
    layer.register_forward_hook(lambda *arguments: seen.append(1))
    model.decoder(torch.randint(7, (3, 6)), state, memory)
    assert len(seen) == calls


def test_who_asks() -> None:
    """Luong's query is the top layer's state after the step, Bahdanau's the one before."""
    for attention in ("general", "bahdanau"):
        model = seq2seq(attention)
        before, memory = model.encode(torch.randint(9, (3, 5)))
        _, after, weights = model.decoder.step(torch.tensor([1, 2, 3]), before, memory)
        asker = before if attention == "bahdanau" else after
        expected = model.decoder.attention(asker.hidden[0][-1][:, None], memory)[1][:, 0]
        torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_scheduled_sampling(attention: str | None) -> None:
    model = seq2seq(attention)
    state, memory = model.encode(torch.randint(9, (64, 5)))
    tokens = torch.randint(7, (64, 4))

    def logits(probability: float, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.decoder(
            tokens, state, memory, sampling_probability=probability, generator=generator
        )[0]

    def drawn_step_by_step() -> torch.Tensor:
        generator, now, given, found = torch.Generator().manual_seed(0), state, tokens[:, 0], []
        for t in range(4):
            step, now, _ = model.decoder.step(given, now, memory)
            found.append(step)
            if t < 3:
                given = torch.multinomial(step.softmax(-1), 1, generator=generator).squeeze(1)
                torch.rand(given.shape, generator=generator)
        return torch.stack(found, 1)

    torch.testing.assert_close(logits(1.0), drawn_step_by_step())
    forced = logits(0.0)
    sampled, half = logits(1.0), logits(0.5)
    torch.testing.assert_close(sampled[:, 0], forced[:, 0])
    assert sampled.equal(logits(1.0))
    kept = half[:, 1].isclose(forced[:, 1]).all(-1).float().mean()
    assert 0.4 < kept < 0.75, "half are kept, and a draw may hit the token itself"


def test_gradients_reach_everything() -> None:
    for attention, input_feeding in FORMS:
        model = seq2seq(attention, input_feeding=input_feeding)
        logits, _ = model(
            torch.randint(9, (3, 5)), torch.randint(7, (3, 6)), torch.tensor([5, 2, 4])
        )
        logits.square().sum().backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not missing, (attention, missing)


def test_a_bridge_only_where_sizes_differ() -> None:
    encoder = models.Encoder(3, 4, cell="gru", num_layers=2)
    decoder = models.AttentionDecoder(7, 3, 4, attention=None, cell="gru")
    model = models.Seq2Seq(encoder, decoder)
    assert model.bridge is None
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(model.encode(x)[0].hidden, encoder(x)[1][-1:])
    assert seq2seq(None).bridge is not None


# ---- losses, initial values, truncated BPTT -----------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_counts_no_padding(smoothing: float) -> None:
    logits = torch.randn(3, 5, 4, dtype=torch.float64)
    targets, lengths = torch.randint(4, (3, 5)), torch.tensor([5, 0, 2])
    logp = logits.log_softmax(-1)
    expected = sum(
        -(1 - smoothing) * logp[b, t, targets[b, t]] - smoothing * logp[b, t].mean()
        for b in range(3)
        for t in range(int(lengths[b]))
    )
    padded = logits.clone()
    padded[1], padded[2, 2:] = torch.nan, torch.nan
    targets[2, 3] = -1
    padded.requires_grad_()
    total = models.sequence_cross_entropy(
        padded, targets, lengths, label_smoothing=smoothing, reduction="sum"
    )
    torch.testing.assert_close(total, expected)
    mean = models.sequence_cross_entropy(padded, targets, lengths, label_smoothing=smoothing)
    torch.testing.assert_close(mean, expected / 7)
    mean.backward()
    assert padded.grad.isfinite().all()
    assert padded.grad[1].eq(0).all()
    valid = targets.clamp_min(0)
    torch.testing.assert_close(
        models.sequence_cross_entropy(logits, valid),
        F.cross_entropy(logits.flatten(0, 1), valid.flatten()),
    )


def test_initial_values() -> None:
    rnn = models.identity_recurrent_(fusedrnn.RNN(3, 4, nonlinearity="relu", num_layers=2), 0.5)
    for name, value in rnn.named_parameters():
        if "weight_hh" in name:
            assert value.equal(0.5 * torch.eye(4))
        elif "bias" in name:
            assert value.eq(0).all()
    x, h = torch.zeros(3, 2, 3), torch.rand(2, 2, 4)
    torch.testing.assert_close(rnn(x, h)[1][0], h[0] / 8)  # half is left of it at each step

    for module in (nn.GRU(3, 4), fusedrnn.LSTMCell(3, 4), fusedrnn.RNN(3, 4, bidirectional=True)):
        models.orthogonal_recurrent_(nn.Sequential(module), gain=2.0)
        for name, value in module.named_parameters():
            if "weight_hh" in name:
                for block in value.split(4):
                    torch.testing.assert_close(block @ block.T, 4 * torch.eye(4))

    lstm = fusedrnn.LSTM(3, 4, num_layers=2, bidirectional=True)
    before = {name: value.detach().clone() for name, value in lstm.named_parameters()}
    assert models.forget_gate_bias_(lstm, 1.5) is lstm
    for name, value in lstm.named_parameters():
        if "bias" in name:
            assert value[4:8].eq(1.5 if "bias_ih" in name else 0.0).all()
            before[name][4:8] = value.detach()[4:8]
        assert value.equal(before[name]), name


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_truncated_bptt(cell: str) -> None:
    torch.manual_seed(0)
    stack = models.Encoder(3, 4, cell=cell, num_layers=2).stack
    x = torch.randn(2, 9, 3, requires_grad=True)
    whole, _ = stack(x)
    outputs, states = [], []
    for index, (chunk, output, state) in enumerate(
        models.truncated_bptt(stack, ((piece, i) for i, piece in enumerate(x.split(3, 1))))
    ):
        assert chunk[1] == index
        x.grad = None
        output.sum().backward()
        assert x.grad[:, : 3 * index].eq(0).all(), "no gradient crosses"
        assert x.grad[:, 3 * index : 3 * index + 3].any()
        outputs.append(output)
        states.append(state)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    assert not any(part.requires_grad for state in states for part in parts(state))
    endless = models.truncated_bptt(stack, itertools.repeat(x[:, :3]))
    assert next(endless)[1].equal(next(models.truncated_bptt(stack, [x[:, :3]]))[1])


def test_truncated_bptt_over_packed_chunks() -> None:
    """A PackedSequence is an input, though it is a tuple too; a list of states stays one."""
    layer, chunks = fusedrnn.GRU(3, 4), [torch.randn(4, 3), torch.randn(2, 3)]
    packed = pack_sequence(chunks)
    (_, output, state), (_, _, after) = models.truncated_bptt(layer, [packed, packed])
    expected, h_n = layer(packed)
    torch.testing.assert_close(output.data, expected.data)
    torch.testing.assert_close(state, h_n.detach())
    torch.testing.assert_close(after, layer(packed, h_n)[1].detach())
    [first, second] = models.tbptt.detached([h_n, None])
    assert not first.requires_grad
    assert second is None

    class Pair(NamedTuple):
        h: Tensor
        c: Tensor | None

    named = models.tbptt.detached(Pair(h_n, None))
    assert isinstance(named, Pair)
    assert not named.h.requires_grad
    assert named.c is None


def test_initial_values_of_computed_weights() -> None:
    layer = nn.utils.parametrizations.weight_norm(fusedrnn.GRU(3, 4), "weight_hh_l0")
    with pytest.raises(ValueError, match="module: expected a plain parameter weight_hh_l0"):
        models.orthogonal_recurrent_(layer)
