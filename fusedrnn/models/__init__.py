"""Sequence models on fusedrnn's layers: encoder, attention, decoder, generation, losses.

Everything here is batch-first: tokens are (B, T), features (B, T, F). A model is a plain
``torch.nn.Module``; the recurrent work inside is ``fusedrnn.RNN``, ``LSTM`` and ``GRU``.
"""

from fusedrnn.models.attention import Attention, Memory
from fusedrnn.models.decoder import AttentionDecoder, DecoderState
from fusedrnn.models.encoder import Encoder
from fusedrnn.models.generation import Generated, beam_search, greedy, sample
from fusedrnn.models.init import forget_gate_bias_, identity_recurrent_, orthogonal_recurrent_
from fusedrnn.models.losses import sequence_cross_entropy
from fusedrnn.models.seq2seq import Seq2Seq
from fusedrnn.models.tbptt import truncated_bptt

__all__ = [
    "Attention",
    "AttentionDecoder",
    "DecoderState",
    "Encoder",
    "Generated",
    "Memory",
    "Seq2Seq",
    "beam_search",
    "forget_gate_bias_",
    "greedy",
    "identity_recurrent_",
    "orthogonal_recurrent_",
    "sample",
    "sequence_cross_entropy",
    "truncated_bptt",
]
