"""Calls of one layer that the CUDA half must answer rightly, on a GPU as well as emulated.

A case is a strategy, a mode, a form and a dtype. It is answered by the operators under test, by
torch.nn in the same dtype (row by row and segment by segment where it knows no lengths or resets),
and by ``fusedrnn.reference`` in float64; oracle.py's rule compares the three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from fusedrnn import reference

T, B, INPUT, HIDDEN, PROJ = 6, 5, 4, 19, 7
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no biases": {"bias": False},
    "no states": {"states": False},
    "bidirectional": {"both": True},
    "lengths": {"lengths": (3, T, 0, 5, 1), "both": True},
    "lengths, no states": {"lengths": (3, 2, 0, 4, 1), "states": False, "both": True},
    "reset": {"reset": True, "both": True},
    "lengths and reset": {"lengths": (3, T, 0, 5, 1), "reset": True, "both": True},
    "packed": {"lengths": (T, 5, 3, 3, 1), "packed": True, "both": True},
    "packed, one way, no states": {"lengths": (4, 4, 2, 1, 1), "packed": True, "states": False},
}
MODES = (*oracle.MODES, "LSTM projected")
# What a strategy, to be forced by conftest.py's fixture of that name, can run.
DTYPES_OF = {
    "per_step": DTYPES,
    "one_cta": (torch.float32, torch.bfloat16, torch.float16),
    "persistent": (torch.float32, torch.bfloat16, torch.float16),
}
MODES_OF = {"per_step": MODES, "one_cta": oracle.MODES, "persistent": oracle.MODES}


# One for each way in which values are kept and multiplied.
KINDS = (torch.float32, torch.bfloat16)


def ways(
    *strategies: str, dtypes: tuple[torch.dtype, ...] = KINDS
) -> list[tuple[str, str, torch.dtype]]:
    """A strategy, a mode and a dtype, of those that it can run."""
    return [
        (s, mode, dtype)
        for s in strategies
        for mode in MODES_OF[s]
        for dtype in dtypes
        if dtype in DTYPES_OF[s]
    ]


def each_of(cases: list[tuple[Any, ...]], *names: str) -> pytest.MarkDecorator:
    """Decorates a test to be called for each of the cases, whose first is a strategy."""
    ids = [" ".join(str(part).removeprefix("torch.") for part in case) for case in cases]
    return pytest.mark.parametrize(("strategy", *names), cases, ids=ids, indirect=["strategy"])


each_way = each_of(ways(*DTYPES_OF), "mode", "dtype")  # of KINDS
each_case = each_of(
    [
        (strategy, mode, form, dtype)
        for strategy, dtypes in DTYPES_OF.items()
        for mode in MODES_OF[strategy]
        for form in FORMS
        for dtype in dtypes
    ],
    "mode",
    "form",
    "dtype",
)


class Call:
    """A call's tensors, in float64 but of ``dtype``'s values, and torch.nn's module for it."""

    def __init__(
        self,
        mode: str,
        dtype: torch.dtype,
        *,
        bias: bool = True,
        states: bool = True,
        both: bool = False,
        lengths: tuple[int, ...] | None = None,
        reset: bool = False,
        packed: bool = False,
        steps: int = T,
        batch: int = B,
        input_size: int = INPUT,
        hidden_size: int = HIDDEN,
    ) -> None:
        self.mode, _, projected = mode.partition(" ")
        self.dtype, self.bias, self.both, self.packed = dtype, bias, both, packed
        options: dict[str, Any] = {"bias": bias, "bidirectional": both, "dtype": torch.float64}
        if self.mode.startswith("RNN"):
            options["nonlinearity"] = self.mode[4:].lower()
        if projected:
            options["proj_size"] = PROJ
        self.net = getattr(nn, self.mode.split("_")[0])(input_size, hidden_size, **options)
        directions, outputs = 2 if both else 1, PROJ if projected else hidden_size
        lstm = self.mode == "LSTM"
        with torch.no_grad():
            for param in self.net.parameters():
                param.copy_(self._of_dtype(param))
        self.x = self._random(steps, batch, input_size)
        self.h0 = self._random(directions, batch, outputs) if states else None
        self.c0 = self._random(directions, batch, hidden_size) if states and lstm else None
        self.dy = self._random(steps, batch, directions * outputs)
        self.dh_n = self._random(directions, batch, outputs)
        self.dc_n = self._random(directions, batch, hidden_size) if lstm else None
        self.lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
        self.reset = None
        if reset:
            self.reset = torch.rand(steps, batch) < 0.3
            self.reset[0, ::2] = True  # the first step cuts off the initial state
        ends = torch.full((batch,), steps) if lengths is None else self.lengths
        self.valid = torch.arange(steps).unsqueeze(1) < ends
        self.dy[~self.valid] = 0

    def _of_dtype(self, t: Tensor) -> Tensor:
        return t.to(self.dtype).double()

    def _random(self, *shape: int) -> Tensor:
        return self._of_dtype(torch.randn(shape))

    @property
    def params(self) -> list[Tensor]:
        return [p.detach() for p in self.net.parameters()]

    def arranged(self, dense: Tensor) -> Tensor:
        """(T, B, .), or the rows of a packed call."""
        return dense[self.valid] if self.packed else dense

    def arguments(self, device: str = "cpu", poison: bool = True) -> dict[str, Any]:
        """The forward operator's, in ``dtype``; the padding of x holds NaN where ``poison``."""
        x = self.x.clone()
        if poison:
            x[~self.valid] = float("nan")

        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, self.dtype)

        ragged = self.lengths if not self.packed else None
        return {
            "mode": self.mode,
            "x": cast(self.arranged(x)),
            "lengths": None if ragged is None else ragged.to(device),
            "batch_sizes": self.valid.sum(1) if self.packed else None,
            "reset": None if self.reset is None else self.reset.to(device),
            "h0": cast(self.h0),
            "c0": cast(self.c0),
            "params": [cast(p) for p in self.params],
            "has_biases": self.bias,
            "bidirectional": self.both,
        }

    def cotangents(self, device: str = "cpu", poison: bool = True) -> dict[str, Tensor | None]:
        dy = self.dy.clone()
        if poison:
            dy[~self.valid] = float("nan")
        given = {"dy": self.arranged(dy), "dh_n": self.dh_n, "dc_n": self.dc_n}
        return {n: None if t is None else t.to(device, self.dtype) for n, t in given.items()}

    def mask(self) -> list[bool]:
        return [True, self.h0 is not None, self.c0 is not None, *(True for _ in self.params)]


def named(call: Call, outputs: Any, gradients: Any) -> dict[str, Tensor | None]:
    """What a forward and a backward operator gave that means something here, by name."""
    y, h_n, c_n = outputs[:3]
    dx, dh0, dc0, dparams = gradients
    lstm = call.mode == "LSTM"
    found = {"y": y, "h_n": h_n, "c_n": c_n if lstm else None, "dx": dx}
    found |= {"dh0": dh0 if call.h0 is not None else None}
    found |= {"dc0": dc0 if call.c0 is not None else None}
    names = [n for n, _ in call.net.named_parameters()]
    found |= {f"d{n}": d for n, d in zip(names, dparams, strict=True)}
    return {n: None if t is None else t.cpu() for n, t in found.items()}


def answer(ops: Any, call: Call, device: str = "cpu") -> dict[str, Tensor | None]:
    """By the operators under test; asserts what needs no oracle."""
    arguments, cotangents = call.arguments(device), call.cotangents(device)
    before = [t.clone() for t in oracle.tensors([arguments, cotangents], any_dtype=True)]
    outputs = ops.layer_forward(**arguments, save=True)
    saved = dict(zip(("y", "gates", "cells"), (outputs[i] for i in (0, 3, 4)), strict=True))
    kept = [t.clone() for t in saved.values()]

    def backward() -> Any:
        return ops.layer_backward(**arguments, **cotangents, **saved, output_mask=call.mask())

    gradients = backward()
    after = oracle.tensors([arguments, cotangents], any_dtype=True)
    assert oracle.same_bits(before, after), "an input was written to"
    assert oracle.same_bits(kept, list(saved.values())), "a saved tensor was written to"
    assert oracle.same_bits(gradients, backward()), "a second backward differs"
    unsaved = ops.layer_forward(**arguments, save=False)
    assert oracle.same_bits(list(unsaved[:3]), list(outputs[:3])), "saving changes the result"
    assert unsaved[3].numel() == unsaved[4].numel() == 0
    if not call.packed:
        padding = ~call.valid.to(device)
        assert not outputs[0][padding].any(), "y in padding"
        assert not gradients[0][padding].any(), "dx in padding"
    return named(call, outputs, gradients)


def exact(call: Call) -> dict[str, Tensor | None]:
    """By fusedrnn.reference in float64."""
    arguments = call.arguments(poison=False)
    for name in ("x", "h0", "c0"):
        if arguments[name] is not None:
            arguments[name] = arguments[name].double()
    arguments["params"] = [p.double() for p in arguments["params"]]
    cotangents = {
        n: None if t is None else t.double() for n, t in call.cotangents(poison=False).items()
    }
    outputs = reference.layer_forward(**arguments)
    return named(call, outputs, reference.layer_backward(**arguments, **cotangents))


def torch_nn(call: Call, device: str = "cpu") -> dict[str, Tensor | None]:
    """By torch.nn in the call's dtype."""
    net = oracle.twin(call.net, call.dtype).to(device)
    given = {"x": call.x, "h0": call.h0, "c0": call.c0}
    leaves = {
        n: None if t is None else t.to(device, call.dtype).requires_grad_()
        for n, t in given.items()
    }
    lengths = None if call.lengths is None else call.lengths.to(device)
    reset = None if call.reset is None else call.reset.to(device)
    y, h_n, c_n = oracle.ragged(net, leaves["x"], lengths, reset, leaves["h0"], leaves["c0"])
    outputs = [y, h_n, c_n] if call.mode == "LSTM" else [y, h_n]
    cotangents = call.cotangents(device, poison=False)
    dy = call.dy.to(device, call.dtype)
    pulled = [dy, cotangents["dh_n"], cotangents["dc_n"]][: len(outputs)]
    wanted = [t for t in leaves.values() if t is not None] + list(net.parameters())
    grads = iter(torch.autograd.grad(outputs, wanted, pulled))
    dx, dh0, dc0 = (None if t is None else next(grads) for t in leaves.values())
    results = [call.arranged(t.cpu()) for t in (y, dx)]
    return named(call, (results[0], h_n, c_n), (results[1], dh0, dc0, list(grads)))


def check(ops: Any, call: Call, device: str = "cpu") -> None:
    ours, truth = answer(ops, call, device), exact(call)
    oracle.agree(ours, torch_nn(call, device), truth, what=device)


def check_tf32(
    ops: Any, mode: str, switches: Callable[[str, str], None], device: str = "cpu"
) -> None:
    """With the recurrence's TF32 on, results are off by what rounding to 11 bits costs."""
    call = Call(mode, torch.float32, hidden_size=300, steps=3)
    switches("ieee", "ieee")
    exact = answer(ops, call, device)
    switches("tf32", "ieee")
    rounded = answer(ops, call, device)
    for name in ("y", "dx", "dweight_hh_l0"):
        error = (rounded[name] - exact[name]).abs().max() / exact[name].abs().max()
        assert 2**-17 < error < 2**-9, name


# ---- one step, without its axes -----------------------------------------------------------------


def of_one_step(arguments: dict[str, Any]) -> dict[str, Any]:
    """A forward call's arguments, T = D = 1, in the form without these axes."""
    lowered = {n: arguments[n][0] for n in ("x", "h0", "c0") if arguments[n] is not None}
    return arguments | lowered


def backward_of_one_step(
    call: Call, arguments: dict[str, Any], outputs: Any, device: str = "cpu"
) -> dict[str, Any]:
    """The backward call after a forward one in that form, of the final states' gradients."""
    forward = {n: value for n, value in arguments.items() if n != "save"}
    pulled = {n: None if t is None else t[0] for n, t in call.cotangents(device).items()}
    _, h_n, _, gates, cells = outputs
    saved = {"y": h_n, "gates": gates, "cells": cells, "output_mask": call.mask()}
    return forward | pulled | {"dy": None} | saved


def check_one_step(ops: Any, call: Call, device: str = "cpu") -> None:
    """Both forms of a call with T = D = 1 give the same, bit for bit."""
    arguments = call.arguments(device)
    short = of_one_step(arguments)
    expected = ops.layer_forward(**arguments, save=True)
    found = ops.layer_forward(**short, save=True)
    lstm = call.mode == "LSTM"
    assert found[0].shape == (0,)
    assert oracle.same_bits(list(found[1 : 2 + lstm]), [t[0] for t in expected[1 : 2 + lstm]])
    unsaved = ops.layer_forward(**short, save=False)
    assert oracle.same_bits(list(unsaved[1:3]), list(found[1:3])), "saving changes the result"
    saved = dict(zip(("y", "gates", "cells"), (expected[i] for i in (0, 3, 4)), strict=True))
    pulled = call.cotangents(device) | {"dy": None}
    expected_grads = ops.layer_backward(**arguments, **pulled, **saved, output_mask=call.mask())
    grads = ops.layer_backward(**backward_of_one_step(call, short, found, device))
    wanted = [t for t, mask in zip(expected_grads[:3], call.mask(), strict=False) if mask]
    assert oracle.same_bits(
        [t for t, mask in zip(grads[:3], call.mask(), strict=False) if mask],
        [t[0] for t in wanted],
    )
    assert oracle.same_bits(grads[3], expected_grads[3])


def smooth(strategy: str) -> list[tuple[str, str, torch.dtype]]:
    """In half precision relu's kink turns roundings into errors: any kernel's, and torch.nn's."""
    return [
        way
        for way in ways(strategy, dtypes=DTYPES)
        if way[2] in (torch.float32, torch.float64) or way[1] != "RNN_RELU"
    ]
