"""Seeded differential fuzz against torch.nn, over all the options that both sides have.

Each seed draws one configuration. A failure prints the seed and the configuration;
``python tests/test_fuzz.py LSTM 1234`` runs that one alone.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fusedrnn
import oracle
from fusedrnn import _C

CHUNKS, PER_CHUNK = 14, 50  # for each of the four modes: 2800 configurations

# The last three: several blocks of W_ih in dx, some of them short.
HIDDEN = (*range(1, 41), 64, 100, 150, 180, 200)
DTYPES = (torch.float32,) * 4 + (torch.float64, torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Case:
    mode: str
    seed: int
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    dtype: torch.dtype
    lengths: list[int]
    form: str
    hx: bool
    contiguous: bool
    training: bool
    grad_mode: str
    frozen: str
    input_grad: bool
    hx_grad: bool
    cotangents: tuple[bool, ...]
    threads: int
    isa: str

    @property
    def steps(self) -> int:
        return max(self.lengths, default=3)


def draw(mode: str, seed: int) -> Case:
    r = random.Random(f"{mode} {seed}")
    hidden_size = r.choice(HIDDEN)
    form = r.choice(["dense"] * 4 + ["unbatched", "packed", "packed unsorted"])
    dtype = r.choice(DTYPES)
    batch = 1 if form == "unbatched" else r.choice([1, 1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 35])
    steps = r.choice([1, 1, 2, 3, 4, 5, 7, 9, 12, 23])
    if form == "dense" and r.random() < 0.05:
        batch = 0
    if hidden_size <= 16 and r.random() < 0.04:
        steps = 1100 // max(batch, 1)  # several chunks of time
    lengths = [steps] * batch
    if form.startswith("packed"):
        lengths = [r.randint(1, steps) for _ in range(batch)]
        if form == "packed":
            lengths.sort(reverse=True)
    half = dtype in (torch.bfloat16, torch.float16)
    # A half-precision layer hands its successor inputs that are off by 2^-9; there ReLU's slope
    # jumps, on either side, and no tolerance rule holds.
    one_layer = half and mode == "RNN_RELU"
    return Case(
        mode=mode,
        seed=seed,
        input_size=r.choice([1, 2, 3, 5, 8, 15, 16, 17, 24, 33]),
        hidden_size=hidden_size,
        proj_size=r.randint(1, hidden_size - 1)
        if mode == "LSTM" and hidden_size > 1 and r.random() < 0.3
        else 0,
        num_layers=1 if one_layer else r.choice([1, 1, 1, 2, 3]),
        bias=r.random() < 0.8,
        batch_first=r.random() < 0.4,
        dropout=r.choice([0.0, 0.0, 0.3, 0.8]),
        bidirectional=r.random() < 0.4,
        dtype=dtype,
        lengths=lengths,
        form=form,
        hx=r.random() < 0.5,
        contiguous=r.random() < 0.6,
        training=r.random() < 0.7,
        grad_mode=r.choice(["grad"] * 8 + ["no_grad", "inference"]),
        frozen=r.choice(["none", "none", "none", "some", "some", "all"]),
        input_grad=r.random() < 0.7,
        hx_grad=r.random() < 0.7,
        cotangents=r.choice([(True,) * 3, (True,) * 3, (True, False, False), (False, True, False),
                             (False, False, True), (False, True, True)]),
        threads=2 if r.random() < 0.1 else 1,
        isa=r.choice(fusedrnn.cpu_isas()),
    )  # fmt: skip


def make_module(case: Case) -> nn.Module:
    cls = getattr(nn, case.mode.split("_")[0])
    options: dict[str, Any] = {}
    if case.mode == "LSTM":
        options["proj_size"] = case.proj_size
    if case.mode.startswith("RNN"):
        options["nonlinearity"] = case.mode[4:].lower()
    module = cls(
        case.input_size, case.hidden_size, num_layers=case.num_layers, bias=case.bias,
        batch_first=case.batch_first, dropout=case.dropout, bidirectional=case.bidirectional,
        dtype=case.dtype, **options,
    )  # fmt: skip
    r = random.Random(case.seed)
    for param in module.parameters():
        frozen = case.frozen == "all" or (case.frozen == "some" and r.random() < 0.5)
        param.requires_grad_(not frozen)
    return module.train(case.training)


def values(case: Case) -> dict[str, Any]:
    """Input, initial state and cotangents, in the case's dtype."""
    batch = len(case.lengths)
    directions = 2 if case.bidirectional else 1
    outputs = case.proj_size or case.hidden_size
    state = (case.num_layers * directions, batch)
    rows = sum(case.lengths)
    dense = (batch, case.steps) if case.batch_first else (case.steps, batch)
    y = (rows,) if case.form.startswith("packed") else dense

    def draw_tensor(*shape: int) -> Tensor:
        return torch.randn(*shape).to(case.dtype)

    # The rows of a packed input are one leaf: of a single short row's gradient little may be left
    # but what cancelled.
    x = draw_tensor(*(y if case.form.startswith("packed") else dense), case.input_size)
    h, c = draw_tensor(*state, outputs), draw_tensor(*state, case.hidden_size)
    dys = [draw_tensor(*y, directions * outputs), draw_tensor(*h.shape), draw_tensor(*c.shape)]
    if case.form == "unbatched":
        batch_dim = 0 if case.batch_first else 1
        x, h, c = x.squeeze(batch_dim), h.squeeze(1), c.squeeze(1)
        dys = [dys[0].squeeze(batch_dim), dys[1].squeeze(1), dys[2].squeeze(1)]
    if not case.contiguous and not case.form.startswith("packed"):
        # Every other feature of a wider tensor; states with their last two dimensions swapped.
        x = torch.stack([x, draw_tensor(*x.shape)], dim=-1)[..., 0]
        h, c = (s.mT.contiguous().mT for s in (h, c))
    return {"x": x, "h": h, "c": c, "cotangents": dys}


def execute(case: Case, module: nn.Module, given: dict[str, Any]) -> oracle.Results:
    """The module's outputs and gradients, arguments cast to its dtype."""
    dtype = next(module.parameters()).dtype
    x = cast(given["x"], dtype).requires_grad_(case.input_grad)
    h, c = (cast(given[n], dtype).requires_grad_(case.hx_grad) for n in "hc")
    argument: Tensor | PackedSequence = x
    if case.form.startswith("packed"):
        argument = pack_sequence(x.split(case.lengths), case.form == "packed")
    lstm = case.mode == "LSTM"
    leaves = {"x": x} | dict(module.named_parameters())
    if case.hx:
        leaves["h_0"] = h
        if lstm:
            leaves["c_0"] = c
    hx = None if not case.hx else (h, c) if lstm else h
    kept = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    torch.manual_seed(case.seed)
    contexts = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }
    with contexts[case.grad_mode]():
        outputs = module(argument, hx)
    if isinstance(argument, PackedSequence):
        assert isinstance(outputs[0], PackedSequence)
        for mine, theirs in zip(outputs[0][1:], argument[1:], strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or mine.equal(theirs)
    dys = [dy.to(dtype) for dy in given["cotangents"]]
    if not lstm:
        dys = dys[:2]
    asked = [dy if wanted else None for dy, wanted in zip(dys, case.cotangents, strict=False)]
    found = oracle.results(outputs, leaves, asked)
    for i, out in enumerate(oracle.tensors(outputs)):
        found[f"requires grad {i}"] = torch.tensor(float(out.requires_grad))
    assert all(oracle.same_bits(leaf, kept[name]) for name, leaf in leaves.items()), (
        f"an argument was modified: {case}"
    )
    return found


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf of that dtype with the strides that the tensor has."""
    leaf = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype)
    return leaf.copy_(tensor)


def check(case: Case) -> list[float]:
    torch.manual_seed(case.seed)
    module = make_module(case)
    given = values(case)
    torch.set_num_threads(1)
    theirs = execute(case, module, given)
    exact = execute(case, oracle.twin(module, torch.float64), given)
    torch.set_num_threads(case.threads)
    _C.set_cpu_isa(case.isa)
    ours = execute(case, oracle.twin(module), given)
    return oracle.agree(ours, theirs, exact, case, tiny_slack=4.0)


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("mode", oracle.MODES)
def test_fuzz(mode: str, chunk: int) -> None:
    seeds = range(chunk * PER_CHUNK, (chunk + 1) * PER_CHUNK)
    excesses = [excess for seed in seeds for excess in check(draw(mode, seed))]
    assert sum(excess > 0.5 for excess in excesses) <= 0.01 * len(excesses)


def test_the_draws_cover_every_option() -> None:
    cases = [draw(mode, s) for mode in oracle.MODES for s in range(CHUNKS * PER_CHUNK)]
    assert len(cases) >= 2000
    rare = {  # option: how many different values must have been drawn
        "hidden_size": 45, "num_layers": 3, "bias": 2, "batch_first": 2, "dropout": 3,
        "bidirectional": 2, "dtype": 4, "form": 4, "hx": 2, "contiguous": 2, "training": 2,
        "grad_mode": 3, "frozen": 3, "input_grad": 2, "hx_grad": 2, "cotangents": 5, "threads": 2,
        "isa": len(fusedrnn.cpu_isas()),
    }  # fmt: skip
    for name, count in rare.items():
        assert len({getattr(case, name) for case in cases}) == count, name
    assert any(case.proj_size for case in cases)
    assert any(not case.lengths for case in cases)
    assert any(case.steps * len(case.lengths) > 512 for case in cases), "more than one time chunk"


@pytest.mark.parametrize("parameter", ["weight_ih_l0", "bias_hh_l0"])
def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch, parameter: str) -> None:
    """A weight that is off by one part in ten thousand must fail the rule in float32."""
    honest = oracle.twin

    def wrong(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        new = honest(module, dtype)
        if dtype is None:
            with torch.no_grad():
                getattr(new, parameter).mul_(1 + 1e-4)
        return new

    monkeypatch.setattr(oracle, "twin", wrong)
    case = next(
        c
        for c in (draw("GRU", s) for s in range(1000))
        if c.dtype == torch.float32 and c.bias and len(c.lengths) > 3 and c.steps > 5
    )
    with pytest.raises(AssertionError, match=r"(output|grad) .*seed="):
        check(case)


if __name__ == "__main__":
    check(draw(sys.argv[1], int(sys.argv[2])))
    print("agrees")
