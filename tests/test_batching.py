"""The operators under vmap: the slices' own results, in one call where they can be rows of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from fusedrnn import _batching, _ops
from test_ops import Log
from test_tangents import B, Problem

N = 5  # slices
FORWARD = ("x", "reset", "h0", "c0", "lengths")
BACKWARD = ("dy", "dh_n", "dc_n", "y", "gates", "cells", *FORWARD)
OPS = {
    "forward": _ops.layer_forward,
    "saving": _ops.layer_forward,
    "backward": _ops.layer_backward,
    "tangents": _ops.layer_tangents,
}


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small."""


class Call:
    """One operator's arguments, by name; no weights' gradients are wanted."""

    def __init__(self, name: str, mode: str, form: str = "reset", **options: Any) -> None:
        problem = Problem(mode, form, **options)
        problem.tangents[6:] = [None] * len(problem.tangents[6:])
        mask = [given and i < 3 for i, given in enumerate(problem.mask())]
        self.op, values = OPS[name], list(problem.args(mask))
        if name == "backward":
            values[14:16] = []
        if name in ("forward", "saving"):
            values = [values[i] for i in (0, 4, 5, 6, 7, 8, 9, 10, 16, 17)] + [name == "saving"]
        names = [argument.name for argument in self.op._schema.arguments][: len(values)]
        self.args = dict(zip(names, values, strict=True))

    def slices(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """N calls whose arguments ``names`` differ."""

        def varied(value: Any, i: int) -> Any:
            if isinstance(value, (list, tuple)):
                return [varied(v, i) for v in value]
            return value.roll(i, -1) if isinstance(value, Tensor) else value

        return [
            {n: varied(a, i) if n in names else a for n, a in self.args.items()} for i in range(N)
        ]

    def vmapped(self, names: Sequence[str], dim: int) -> Any:
        """All slices at once, their axis standing at ``dim``."""

        def stacked(values: Sequence[Any]) -> Any:
            if isinstance(values[0], (list, tuple)):
                return [stacked(v) for v in zip(*values, strict=True)]
            return torch.stack(values, dim) if isinstance(values[0], Tensor) else values[0]

        def dims(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [dims(v) for v in value]
            return dim if isinstance(value, Tensor) else None

        slices = self.slices(names)
        args, in_dims = [], []
        for name, value in self.args.items():
            varies = name in names and value is not None
            args.append(stacked([s[name] for s in slices]) if varies else value)
            in_dims.append(dims(value) if varies else None)
        tensors = [i for i, d in enumerate(in_dims) if d is not None]

        def call(*given: Any) -> Any:
            whole = list(args)
            for i, value in zip(tensors, given, strict=True):
                whole[i] = value
            return self.op(*whole)

        given = [args[i] for i in tensors]
        return torch.vmap(call, tuple(in_dims[i] for i in tensors))(*given)


def check(call: Call, names: Sequence[str], dim: int, calls: int) -> None:
    with Log() as log:
        found = oracle.tensors(call.vmapped(names, dim))
    assert sum(name.startswith("fusedrnn") for name in log.names) == calls, log.names
    one_by_one = [oracle.tensors(call.op(*s.values())) for s in call.slices(names)]
    for mine, right in zip(found, map(torch.stack, zip(*one_by_one, strict=True)), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dim", [0, 1])
def test_slices_of_everything(name: str, mode: str, dim: int) -> None:
    call = Call(name, mode, projected=mode == "LSTM")
    names = [*BACKWARD, "tangents", "gradient_tangents"]
    names.remove("lengths")
    call.args = {n: list(a) if n.endswith("tangents") else a for n, a in call.args.items()}
    check(call, names, dim, calls=1)


@pytest.mark.parametrize(
    ("name", "varies"),
    [(n, v) for n in OPS for v in (FORWARD if n in ("forward", "saving") else BACKWARD)],
)
def test_slices_of_one_argument(name: str, varies: str) -> None:
    call = Call(name, "LSTM", "dense" if varies == "lengths" else "reset", both=False)
    if varies == "lengths":
        call.args["lengths"] = torch.arange(B)
    check(call, [varies], 0, calls=N if varies == "lengths" and name != "forward" else 1)


@pytest.mark.parametrize("name", OPS)
def test_as_many_slices_as_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(name, "GRU")
    w_ih = call.args["params"][0]
    of_one = 5 * B * (w_ih.shape[0] + w_ih.shape[1])
    monkeypatch.setattr(_batching, "_MOST_VALUES", 2 * of_one)
    check(call, ["x"], 0, calls=3)
    monkeypatch.setattr(_batching, "_MOST_VALUES", 0)
    check(call, ["x"], 0, calls=N)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("why", ["weights", "packed"])
def test_slices_one_by_one(name: str, why: str) -> None:
    call = Call(name, "GRU", "packed" if why == "packed" else "dense")
    check(call, ["params"] if why == "weights" else ["x"], 0, calls=N)


@pytest.mark.parametrize("name", ["backward", "tangents"])
def test_slices_that_want_weights_gradients(name: str) -> None:
    call = Call(name, "GRU")
    call.args["output_mask"] = [given or i > 2 for i, given in enumerate(call.args["output_mask"])]
    check(call, ["x"], 0, calls=N)


def test_slices_of_the_weights_tangents() -> None:
    call = Call("tangents", "GRU")
    tangents = call.args["tangents"]
    call.args["tangents"] = [*tangents[:3], *(torch.ones_like(p) for p in call.args["params"])]
    check(call, ["tangents"], 0, calls=N)
    check(call, ["x"], 0, calls=1)
