"""CUDA tensors where no GPU is: shapes without data, and the words of a build without CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fusedrnn
import oracle
from fusedrnn import _C

T, B, INPUT, HIDDEN = 4, 3, 5, 6
built = _C.build_info()["cuda"] != "no"


def test_build_info_tells_the_truth() -> None:
    """The version of CUDA where the extension is linked with torch's CUDA library, else "no"."""
    assert (b"libc10_cuda.so" in Path(_C.__file__).read_bytes()) == built
    assert _C.build_info()["cuda"] == (torch.version.cuda if built else "no")


@pytest.mark.skipif(built, reason="fusedrnn was built with its CUDA half")
@pytest.mark.parametrize("mode", oracle.MODES)
def test_a_build_without_cuda_says_so(mode: str) -> None:
    params = [p.float() for p in oracle.module_params(mode, INPUT, HIDDEN)]
    x, none = torch.randn(T, B, INPUT), None
    forward = (mode, x, none, none, none, none, none, params, True, False, True)
    y, _, _, gates, cells = torch.ops.fusedrnn.layer_forward(*forward)
    backward = (mode, y, none, none, *forward[1:8], y, gates, cells, True, False, [True] * 7)
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name, arguments in (("layer_forward", forward), ("layer_backward", backward)):
        op = getattr(torch.ops.fusedrnn, name).default
        with pytest.raises(NotImplementedError, match=f"{name}: .* without its CUDA half.*nvcc"):
            op.redispatch(cuda, *arguments)


@pytest.mark.parametrize("cell", oracle.CELLS)
def test_shapes_on_a_gpu(cell: str) -> None:
    """Every check in Python lets CUDA tensors through, and reads none of their values."""
    mode = FakeTensorMode()

    def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        meta = torch.empty(shape, dtype=dtype, device="meta")
        return FakeTensor(mode, meta, torch.device("cuda:0"))

    shapes = [p.shape for p in getattr(torch.nn, cell)(INPUT, HIDDEN, 2).parameters()]
    function = getattr(fusedrnn.functional, cell.lower())
    with mode, torch.no_grad():
        params = [fake(*shape) for shape in shapes]
        x, h = fake(T, B, INPUT), fake(2, B, HIDDEN)
        lengths, reset = fake(B, dtype=torch.int64), fake(T, B, dtype=torch.bool)
        hx = (h, h) if cell == "LSTM" else h
        for given in ({}, {"lengths": lengths}, {"lengths": torch.tensor([1, 2, 0])}):
            y, state = function(x, hx, params, num_layers=2, reset=reset, **given)
            found = oracle.tensors([y, state])
            assert {t.device for t in found} == {torch.device("cuda:0")}
            assert y.shape == (T, B, HIDDEN)
        with pytest.raises(ValueError, match="reset must be on input's device cuda:0, got cpu"):
            function(x, hx, params, num_layers=2, reset=torch.ones(T, B).bool())


@pytest.mark.parametrize("strategy", ["", "auto"], indirect=True)
def test_the_strategy_that_is_chosen(strategy: str) -> None:
    """No GPU has timed the others yet: they are on where they are asked for."""
    for net in (fusedrnn.LSTM(3, 4), fusedrnn.GRU(3, 500), fusedrnn.LSTM(3, 4, proj_size=2)):
        assert fusedrnn.cuda_strategy(net) == "per_step"


@pytest.mark.parametrize(
    ("strategy", "largest"), [("one_cta", 128), ("persistent", 1024), ("persistent", 2048)]
)
def test_a_strategy_that_is_forced(
    monkeypatch: pytest.MonkeyPatch, strategy: str, largest: int
) -> None:
    fits, projected = fusedrnn.GRU(3, largest), fusedrnn.LSTM(3, 4, proj_size=2)
    monkeypatch.setenv("FUSEDRNN_CUDA_STRATEGY", "per_step")
    assert fusedrnn.cuda_strategy(projected) == "per_step"
    monkeypatch.setenv("FUSEDRNN_CUDA_STRATEGY", strategy)
    half, narrow = torch.bfloat16, largest != 2048  # that many units in half precision only
    for dtype in (half, torch.float16, *[torch.float32] * narrow):
        assert fusedrnn.cuda_strategy(fits, dtype) == strategy
    for net, dtype in (
        (fits, torch.float64),
        (projected, half),
        (fusedrnn.RNN(3, 2049 if strategy == "persistent" else 129), half),
        (fusedrnn.RNN(3, largest + 1), torch.float32),
    ):
        with pytest.raises(ValueError, match=f"_STRATEGY: {strategy} needs hidden_size <= "):
            fusedrnn.cuda_strategy(net, dtype)


def test_what_names_no_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    net = fusedrnn.GRU(3, 128)
    monkeypatch.setenv("FUSEDRNN_CUDA_STRATEGY", "fastest")
    with pytest.raises(
        ValueError, match="expected auto, per_step, one_cta or persistent, got fastest"
    ):
        fusedrnn.cuda_strategy(net)
    with pytest.raises(TypeError, match=r"module: expected fusedrnn\.RNN"):
        fusedrnn.cuda_strategy(torch.nn.LSTM(3, 4))
