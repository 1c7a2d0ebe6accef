"""Drop-in: whatever one does with torch.nn's modules gives the same with ours."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
import oracle

NAMES = ("RNN", "LSTM", "GRU")
ALL_NAMES = (*NAMES, *(f"{name}Cell" for name in NAMES))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_layers": 3, "bidirectional": True, "dropout": 0.25},
    {"bias": False, "batch_first": True},
)


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small."""


def pair(name: str, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours, made after the same seed."""
    made = []
    for place in (nn, fusedrnn):
        torch.manual_seed(11)
        made.append(getattr(place, name)(*(args or (3, 4)), **options))
    return made[0], made[1]


with_modules = pytest.mark.parametrize(
    ("name", "options"),
    [
        *itertools.product(NAMES, OPTIONS),
        ("LSTM", {"proj_size": 2, "num_layers": 2}),
        ("RNN", {"nonlinearity": "relu"}),
        *((f"{n}Cell", o) for n in NAMES for o in ({}, {"bias": False})),
    ],
)


@with_modules
def test_construction(name: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(name, **options)
    assert type(ours) is getattr(fusedrnn, name)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert oracle.same_bits(ours.state_dict(), theirs.state_dict())
    theirs.reset_parameters()
    for mine, other in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for p in other.parameters():
                p.uniform_()
        mine.load_state_dict(other.state_dict())
        assert oracle.same_bits(mine.state_dict(), other.state_dict())
    public = {n for n in dir(theirs) if not n.startswith("_")}
    public -= {"get_expected_cell_size"}  # a helper of nn.LSTM's own forward
    assert public <= set(dir(ours))
    for attribute in public:
        value = getattr(theirs, attribute)
        if isinstance(value, (int, float, str, bool)):
            assert getattr(ours, attribute) == value, attribute


@with_modules
def test_copies(name: str, options: dict[str, Any]) -> None:
    ours = pair(name, **options)[1].eval()
    x = torch.randn(5, 3)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    twins = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(saved, weights_only=False),
    ]
    for twin in twins:
        assert type(twin) is type(ours)
        assert oracle.same_bits(twin(x), ours(x))
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not oracle.same_bits(twin(x), ours(x)), "the copy shares its weights"


def test_constructor_positions() -> None:
    ours = fusedrnn.LSTM(3, 4, 2, False, True, 0.5, True, 2)
    assert repr(ours) == repr(nn.LSTM(3, 4, 2, False, True, 0.5, True, 2))
    for nonlinearity in ("tanh", "relu"):
        ours, theirs = (
            place.RNN(3, 4, 2, nonlinearity, False, True, 0.5, True) for place in (fusedrnn, nn)
        )
        assert repr(ours) == repr(theirs)
        assert (ours.mode, ours.nonlinearity) == (theirs.mode, theirs.nonlinearity)
    double = fusedrnn.GRU(3, 4, dtype=torch.float64)
    assert double.weight_ih_l0.dtype == torch.float64
    assert fusedrnn.GRU(3, 4, device="meta").weight_ih_l0.is_meta


BAD_CONSTRUCTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "hidden 0": ((3, 0), {}),
    "input 0": ((0, 3), {}),
    "layers 0": ((3, 4, 0), {}),
    "float size": ((3, 4.0), {}),
    "dropout above 1": ((3, 4), {"dropout": 1.5}),
    "dropout bool": ((3, 4), {"dropout": True}),
    "bias int": ((3, 4), {"bias": 1}),
    "projection too large": ((3, 4), {"proj_size": 4}),
    "projection negative": ((3, 4), {"proj_size": -1}),
    "missing size": ((3,), {}),
    "unknown option": ((3, 4), {"layers": 2}),
    "nonlinearity": ((3, 4), {"nonlinearity": "gelu"}),
}


@pytest.mark.parametrize("bad", BAD_CONSTRUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_construction_errors(name: str, bad: str) -> None:
    args, options = BAD_CONSTRUCTIONS[bad]
    theirs, ours = (
        oracle.outcome(lambda p=p: getattr(p, name)(*args, **options)) for p in (nn, fusedrnn)
    )
    if bad == "missing size":
        # Python's own words, about whose constructor it was.
        theirs, ours = theirs[0], ours[0]
    assert theirs == ours


class Calls:
    """Bad calls: x and hx for a module of sizes 3, 4."""

    def __init__(self, lstm: bool, batch_first: bool = False) -> None:
        def state(*shape: int, **options: Any) -> Any:
            h = torch.randn(shape, **options)
            return (h, h) if lstm else h

        x = torch.randn(5, 2, 3)
        batch = 5 if batch_first else 2
        self.bad: dict[str, tuple[Any, Any]] = {
            "rank 1": (torch.randn(3), None),
            "rank 4": (torch.randn(5, 2, 3, 1), None),
            "features": (torch.randn(5, 2, 4), None),
            "features, one row": (torch.randn(5, 4), None),
            "dtype": (x.double(), None),
            "no steps": (torch.randn(2, 0, 3) if batch_first else torch.randn(0, 2, 3), None),
            "state's rank": (x, state(1, 4)),
            "state's rank, one row": (x[:, 0], state(1, 2, 4)),
            "state's layers": (x, state(2, batch, 4)),
            "state's batch": (x, state(1, batch + 1, 4)),
            "state's size": (x, state(1, batch, 5)),
            "state's size, one row": (x[:, 0], state(1, 5)),
        }
        rows = [torch.randn(n, 3) for n in (3, 2)]
        packed = pack_sequence(rows)
        self.bad["packed features"] = (pack_sequence([torch.randn(n, 4) for n in (3, 2)]), None)
        self.bad["packed state"] = (packed, state(1, 3, 4))
        if lstm:
            h = torch.randn(1, batch, 4)
            self.bad["cell's size"] = (x, (h, torch.randn(1, batch, 5)))
            self.bad["cell's rank"] = (x, (h, torch.randn(1, 4)))


# Where nn.LSTM runs into an error deep inside, ours says what nn.GRU says.
CLEARER = {
    "packed features": "input.size(-1) must be equal to input_size. Expected 3, got 4",
    "packed state": "Expected hidden[0] size (1, 2, 4), got [1, 3, 4]",
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_call_errors(name: str, batch_first: bool) -> None:
    theirs, ours = pair(name, batch_first=batch_first)
    for what, (x, hx) in Calls(name == "LSTM", batch_first).bad.items():
        expected = oracle.outcome(lambda x=x, hx=hx: theirs(x, hx))
        assert expected is not None, what
        if name == "LSTM" and what in CLEARER:
            expected = (expected[0], CLEARER[what])
        assert oracle.outcome(lambda x=x, hx=hx: ours(x, hx)) == expected, what


@with_modules
def test_weights_are_read_afresh(name: str, options: dict[str, Any]) -> None:
    """Writes through .data bump no version counter; nothing may be cached behind them."""
    theirs, ours = pair(name, **options)
    theirs.eval(), ours.eval()
    x = torch.randn(5, 3)
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.data.mul_(1.5).add_(0.1)
            other.data.mul_(1.5).add_(0.1)
    before = oracle.tensors(ours(x))[0]
    first = next(n for n, _ in ours.named_parameters())
    setattr(ours, first, nn.Parameter(torch.zeros_like(getattr(ours, first))))
    assert not oracle.tensors(ours(x))[0].equal(before), "a replaced parameter is not seen"


def test_shared_weights() -> None:
    """One Parameter at two places: its gradient is the sum."""
    theirs, ours = pair("GRU", 4, 4, num_layers=2)
    for net in (theirs, ours):
        net.weight_hh_l1 = net.weight_hh_l0
        net.weight_ih_l1 = net.weight_ih_l0
        net._init_flat_weights()
    x = torch.randn(5, 2, 4)
    grads = []
    for net in (theirs, ours):
        assert len(list(net.parameters())) == 6
        grads.append(torch.autograd.grad(net(x)[0].pow(2).sum(), list(net.parameters())))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("name", ALL_NAMES)
def test_parametrized_weights(name: str, parametrization: str) -> None:
    theirs, ours = pair(name)
    cell = name.endswith("Cell")
    for net in (theirs, ours):
        for weight in ("weight_ih", "weight_hh"):
            torch.manual_seed(5)
            getattr(parametrizations, parametrization)(net, weight if cell else f"{weight}_l0")
        # While training, spectral_norm changes at every reading, and torch.nn reads several times.
        net.eval()
    x = torch.randn(5, 3)
    hx = torch.randn(5 if cell else 1, 4)
    hx = (hx, hx) if name.startswith("LSTM") else hx
    found = []
    for net in (theirs, ours):
        y = net(x, hx)
        params = list(net.parameters())
        grads = torch.autograd.grad(sum(t.sum() for t in oracle.tensors(y)), params)
        assert all(g.abs().max() > 0 for g in grads)
        found.append((oracle.tensors(y), grads))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def autocast_call(
    net: nn.Module, name: str, form: str, dtype: torch.dtype, with_hx: bool, hx_dtype: torch.dtype
) -> list[Tensor]:
    cell = name.endswith("Cell")
    torch.manual_seed(1)
    hx: Any = None
    if with_hx:
        hx = torch.randn((2, 4) if cell else (1, 2, 4), dtype=hx_dtype)
        hx = (hx, hx) if name.startswith("LSTM") else hx
    x: Any = torch.randn((2, 3) if cell else (5, 2, 3), dtype=dtype)
    if form == "packed":
        x = pack_sequence([x[:, 0], x[:3, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(x, hx)
    return oracle.tensors(outputs)


@pytest.mark.parametrize("with_hx", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "form"), [*itertools.product(ALL_NAMES, ["dense"]), *((n, "packed") for n in NAMES)]
)
def test_autocast(name: str, form: str, dtype: torch.dtype, with_hx: torch.dtype | None) -> None:
    theirs, ours = pair(name)
    options = (name, form, dtype, with_hx is not None, with_hx or torch.float32)
    refusal = oracle.outcome(lambda: autocast_call(theirs, *options))
    if refusal is not None:
        # States that torch.nn takes only in x's dtype: ours may take them, or say why not.
        assert refusal[0] in (RuntimeError, ValueError)
        own = oracle.outcome(lambda: autocast_call(ours, *options))
        assert own is None or (own[0] in (RuntimeError, ValueError) and "dtype" in own[1]), own
        return
    expected, found = autocast_call(theirs, *options), autocast_call(ours, *options)
    dtypes = [t.dtype for t in expected]
    if (name, form) == ("LSTM", "dense") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # Where oneDNN knows no bfloat16, torch.nn composes this one too, and its results take the
        # state's dtype. Ours are the same on every machine.
        dtypes = [torch.bfloat16] * len(expected)
    assert [t.dtype for t in found] == dtypes
    for mine, other in zip(found, expected, strict=True):
        assert (mine.double() - other.double()).abs().max() <= 2**-6  # bfloat16 keeps 8 bits
    sum(t.sum() for t in found).backward()
    for parameter in ours.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ALL_NAMES)
def test_autocast_leaves_float64(name: str) -> None:
    theirs, ours = (net.double() for net in pair(name))
    options = (name, "dense", torch.float64, False, torch.float64)
    expected, found = autocast_call(theirs, *options), autocast_call(ours, *options)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_autocast_with_a_projection() -> None:
    theirs, ours = pair("LSTM", proj_size=2)
    for form in ("dense", "packed"):
        options = ("LSTM", form, torch.float32, False, torch.float32)
        expected, found = autocast_call(theirs, *options), autocast_call(ours, *options)
        assert [t.dtype for t in found] == [t.dtype for t in expected]


def test_isinstance() -> None:
    """Documented: a RNNBase, but no instance of torch.nn's own class, which Dynamo refuses."""
    for name in NAMES:
        ours = getattr(fusedrnn, name)(3, 4)
        assert isinstance(ours, nn.RNNBase)
        assert not isinstance(ours, getattr(nn, name))
        assert isinstance(getattr(fusedrnn, f"{name}Cell")(3, 4), getattr(nn, f"{name}Cell"))
