"""RNNCell, LSTMCell and GRUCell against torch.nn's."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
import oracle
from fusedrnn import _C

NAMES = ("RNNCell", "LSTMCell", "GRUCell")
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small."""


def draw(name: str, seed: int) -> dict[str, Any]:
    r = random.Random(f"{name} {seed}")
    return {
        "seed": seed,
        "hidden_size": r.choice([*range(1, 41), 64, 100]),
        "input_size": r.choice([1, 2, 3, 8, 15, 16, 33]),
        "bias": r.random() < 0.8,
        "nonlinearity": r.choice(["tanh", "relu"]) if name == "RNNCell" else None,
        "dtype": r.choice(DTYPES),
        "batch": r.choice([None, None, 0, 1, 2, 3, 7, 17, 40, 300]),
        "hx": r.random() < 0.7,
        "input_grad": r.random() < 0.7,
        "hx_grad": r.random() < 0.7,
        "frozen": r.random() < 0.3,
        "asked": r.choice([(True, True), (True, False), (False, True)]),
        "contiguous": r.random() < 0.6,
        "isa": r.choice(fusedrnn.cpu_isas()),
    }


def execute(cell: nn.Module, case: dict[str, Any], given: list[Tensor]) -> oracle.Results:
    dtype = cell.weight_ih.dtype
    x, h, c = (t.to(dtype) for t in given[:3])
    if not case["contiguous"]:
        x, h, c = (torch.stack([t, t], -1)[..., 0] for t in (x, h, c))
    x, h, c = (t.detach() for t in (x, h, c))
    x.requires_grad_(case["input_grad"])
    leaves = {"x": x} | dict(cell.named_parameters())
    lstm = isinstance(cell, nn.LSTMCell)
    hx = None
    if case["hx"]:
        leaves["h"] = h.requires_grad_(case["hx_grad"])
        if lstm:
            leaves["c"] = c.requires_grad_(case["hx_grad"])
        hx = (h, c) if lstm else h
    kept = {n: t.detach().clone() for n, t in leaves.items()}
    outputs = cell(x, hx)
    asked = case["asked"] if lstm else (True,)
    dys = [d.to(dtype) if a else None for d, a in zip(given[3:], asked, strict=False)]
    found = oracle.results(outputs, leaves, dys)
    for i, out in enumerate(oracle.tensors(outputs)):
        found[f"requires grad {i}"] = torch.tensor(float(out.requires_grad))
    assert oracle.same_bits(leaves, kept), "an argument was modified"
    return found


@pytest.mark.parametrize("chunk", range(5))
@pytest.mark.parametrize("name", NAMES)
def test_fuzz(name: str, chunk: int) -> None:
    for seed in range(60 * chunk, 60 * (chunk + 1)):
        case = draw(name, seed)
        torch.manual_seed(seed)
        options = {"nonlinearity": case["nonlinearity"]} if name == "RNNCell" else {}
        cell = getattr(nn, name)(
            case["input_size"], case["hidden_size"], case["bias"], dtype=case["dtype"], **options
        )
        if case["frozen"]:
            cell.weight_hh.requires_grad_(False)
        shape = () if case["batch"] is None else (case["batch"],)
        widths = (case["input_size"], *(case["hidden_size"],) * 4)
        given = [torch.randn(*shape, width).to(case["dtype"]) for width in widths]
        exact = execute(oracle.twin(cell, torch.float64), case, given)
        theirs = execute(cell, case, given)
        _C.set_cpu_isa(case["isa"])
        oracle.agree(execute(oracle.twin(cell), case, given), theirs, exact, case)


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_of_cells_is_a_layer(name: str) -> None:
    cell = getattr(fusedrnn, name)(3, 5)
    layer = getattr(fusedrnn, name.removesuffix("Cell"))(3, 5)
    layer.load_state_dict({f"{n}_l0": p for n, p in cell.state_dict().items()})
    x = torch.randn(6, 2, 3)
    y, _ = layer(x)
    hx = None
    for t in range(6):
        hx = cell(x[t], hx)
        torch.testing.assert_close(oracle.tensors(hx)[0], y[t], rtol=1e-5, atol=1e-6)


def errors_of(call: Any) -> tuple[type, str]:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("no error at all")


BAD: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "input of rank 3": ((2, 2, 3), None),
    "input of rank 0": ((), None),
    "hidden of rank 3": ((2, 3), (1, 2, 5)),
    "input size": ((2, 4), None),
    "hidden size": ((2, 3), (2, 6)),
    "batch": ((2, 3), (3, 5)),
    "unbatched input size": ((4,), None),
    "unbatched hidden size": ((3,), (6,)),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_torch_nn(name: str, bad: str) -> None:
    x_shape, h_shape = BAD[bad]
    x, h = torch.randn(x_shape), None if h_shape is None else torch.randn(h_shape)
    hx = (h, h) if name == "LSTMCell" and h is not None else h
    theirs, ours = (errors_of(lambda m=m: getattr(m, name)(3, 5)(x, hx)) for m in (nn, fusedrnn))
    assert ours == theirs


def test_errors_beyond_torch_nn() -> None:
    lstm, gru = fusedrnn.LSTMCell(3, 5), fusedrnn.GRUCell(3, 5)
    x, h = torch.randn(2, 3), torch.randn(2, 5)
    with pytest.raises(TypeError, match=r"hx to be a tuple \(h, c\)"):
        lstm(x, h)
    for half in ((h, None), (None, h), (None, None)):
        with pytest.raises(
            TypeError, match=r"hx to be a tuple \(h, c\) of tensors, got None in it"
        ):
            lstm(x, half)
    with pytest.raises(RuntimeError, match="expects two hidden states"):
        lstm(x, (h, h, h))
    with pytest.raises(RuntimeError, match=r"dtype torch\.float32.*got torch\.float64"):
        gru(x.double(), h)
    with pytest.raises(RuntimeError, match=r"dtype torch\.float32.*got torch\.float64"):
        gru(x, h.double())
    with pytest.raises(RuntimeError, match="as many dimensions as input"):
        gru(x, h[0])
    with pytest.raises(RuntimeError, match=r"got torch\.float32 on meta"):
        gru(x.to("meta"))


@pytest.mark.parametrize("name", NAMES)
def test_drop_in(name: str) -> None:
    torch.manual_seed(3)
    theirs = getattr(nn, name)(3, 5)
    torch.manual_seed(3)
    ours = getattr(fusedrnn, name)(3, 5)
    assert oracle.same_bits(ours.state_dict(), theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, getattr(nn, name))


def test_the_comparison_can_fail() -> None:
    cell = nn.GRUCell(3, 5)
    wrong = oracle.twin(cell)
    with torch.no_grad():
        wrong.bias_hh[-1] += 1e-4
    case = draw("GRUCell", 0) | {"hx": True, "asked": (True, True)}
    given = [torch.randn(2, w) for w in (3, 5, 5, 5, 5)]
    exact = execute(oracle.twin(cell, torch.float64), case, given)
    with pytest.raises(AssertionError, match="beyond twice"):
        oracle.agree(execute(wrong, case, given), execute(cell, case, given), exact)


@pytest.mark.parametrize("missing", [("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh")])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_bias_that_is_taken_away(name: str, missing: tuple[str, ...]) -> None:
    """As in torch.nn, which looks at the parameters, not at the flag of the constructor."""
    theirs, ours = getattr(nn, name)(3, 4), getattr(fusedrnn, name)(3, 4)
    ours.load_state_dict(theirs.state_dict())
    ours.bias = False
    for cell in (theirs, ours):
        for bias in missing:
            setattr(cell, bias, None)
    x = torch.randn(2, 3)
    found = []
    for cell in (theirs, ours):
        outputs = oracle.tensors(cell(x))
        gradients = torch.autograd.grad(outputs[0].sum(), list(cell.parameters()))
        found.append((*outputs, *gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
