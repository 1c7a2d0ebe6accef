"""The CUDA half without a GPU: its driver and its kernels as they stand, run on the host.

tests/cuda_emulated/emulated.cpp compiles them with a plain compiler against torch; what only a GPU
can show (launches, streams, cuBLAS) is left to test_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import cuda_cases
import emulation
import oracle

pytestmark = pytest.mark.usefixtures("one_thread", "without_tf32")

WHOLE = 64 << 20  # bytes of a part of time, as on a GPU
MANY_STEPS = ("one_cta", "persistent")  # strategies whose kernels take many
each_of_many_steps = cuda_cases.each_of(cuda_cases.ways(*MANY_STEPS), "mode", "dtype")


@cuda_cases.each_case
def test_against_torch_nn(
    ops: Any, strategy: str, mode: str, form: str, dtype: torch.dtype
) -> None:
    ops.set_part_bytes(WHOLE)
    cuda_cases.check(ops, cuda_cases.Call(mode, dtype, **cuda_cases.FORMS[form]))


@cuda_cases.each_way
@pytest.mark.parametrize("states", [True, False])
def test_one_step(ops: Any, strategy: str, mode: str, dtype: torch.dtype, states: bool) -> None:
    """The form without axes of steps and directions is the other one's."""
    ops.set_part_bytes(WHOLE)
    cuda_cases.check_one_step(ops, cuda_cases.Call(mode, dtype, steps=1, states=states))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("form", ["bidirectional", "lengths and reset", "packed"])
@cuda_cases.each_way
def test_in_parts_of_time(
    ops: Any, strategy: str, mode: str, dtype: torch.dtype, form: str, steps: int
) -> None:
    """A sequence whose projection is too large for one product, in parts of 1 or about 4 steps."""
    call = cuda_cases.Call(mode, dtype, **cuda_cases.FORMS[form])
    gates = call.params[0].shape[0]
    ops.set_part_bytes(1 if steps == 1 else gates * 4 * cuda_cases.B * steps)
    try:
        cuda_cases.check(ops, call)
    finally:
        ops.set_part_bytes(WHOLE)


@pytest.mark.parametrize("mode", cuda_cases.MODES)
@pytest.mark.parametrize(("batch", "hidden_size"), [(1, 131), (3, 128), (2, 65), (9, 48), (33, 1)])
def test_sizes_beyond_a_block(ops: Any, mode: str, batch: int, hidden_size: int) -> None:
    """Several blocks along rows and units, and a last one that is partly empty."""
    if "projected" in mode and hidden_size <= cuda_cases.PROJ:
        hidden_size = 33
    call = cuda_cases.Call(
        mode, torch.float32, batch=batch, hidden_size=hidden_size, steps=3, input_size=40
    )
    cuda_cases.check(ops, call)


@cuda_cases.each_of(cuda_cases.smooth("one_cta"), "mode", "dtype")
@pytest.mark.parametrize(("batch", "hidden_size"), [(1, 64), (2, 1), (3, 65), (5, 128), (1, 97)])
def test_sizes_of_one_cta(
    ops: Any, strategy: str, mode: str, dtype: torch.dtype, batch: int, hidden_size: int
) -> None:
    """Units that fill the registers' tiles and that do not, rows that fill the CTAs or not."""
    call = cuda_cases.Call(
        mode, dtype, both=True, reset=True, batch=batch, hidden_size=hidden_size, steps=4
    )
    cuda_cases.check(ops, call)


@each_of_many_steps
@pytest.mark.parametrize("packed", [False, True], ids=["lengths", "packed"])
def test_more_steps_than_a_kernel_takes(
    ops: Any, strategy: str, mode: str, dtype: torch.dtype, packed: bool
) -> None:
    """The state goes from one kernel to the next; some rows end in the first one."""
    most = emulation.MOST_STEPS
    call = cuda_cases.Call(
        mode,
        dtype,
        both=True,
        lengths=(2 * most + 8, most + 5, most, 1),
        packed=packed,
        batch=4,
        steps=2 * most + 8,
        input_size=2,
        hidden_size=3,
    )
    cuda_cases.check(ops, call)


@each_of_many_steps
@pytest.mark.parametrize("hidden_size", [20, 128])
def test_any_order_of_threads(
    ops: Any, strategy: str, mode: str, dtype: torch.dtype, hidden_size: int
) -> None:
    """Between barriers, threads of a block may run in any order."""
    call = cuda_cases.Call(
        mode, dtype, hidden_size=hidden_size, **cuda_cases.FORMS["lengths and reset"]
    )
    ascending, descending, random = range(3)
    right = cuda_cases.answer(ops, call)
    try:
        for turns in (descending, random):
            ops.set_turns(turns)
            assert oracle.same_bits(cuda_cases.answer(ops, call), right)
    finally:
        ops.set_turns(ascending)


@each_of_many_steps
def test_a_weight_that_is_not_aligned(
    ops: Any, strategy: str, mode: str, dtype: torch.dtype
) -> None:
    """The kernel loads 16 bytes at a time, a parameter may begin anywhere."""
    call = cuda_cases.Call(mode, dtype, hidden_size=64)
    right = cuda_cases.answer(ops, call)
    arguments = call.arguments()

    def shifted(t: torch.Tensor) -> torch.Tensor:
        room = torch.empty(t.numel() + 1, dtype=t.dtype)
        return room[1:].view(t.shape).copy_(t)

    arguments["params"] = [shifted(p) for p in arguments["params"]]
    outputs = ops.layer_forward(**arguments, save=True)
    saved = dict(zip(("y", "gates", "cells"), (outputs[i] for i in (0, 3, 4)), strict=True))
    gradients = ops.layer_backward(
        **arguments, **call.cotangents(), **saved, output_mask=call.mask()
    )
    assert oracle.same_bits(cuda_cases.named(call, outputs, gradients), right)


@pytest.mark.parametrize("strategy", MANY_STEPS, indirect=True)
def test_what_a_strategy_cannot_run(ops: Any, strategy: str) -> None:
    dtype, most = torch.float32, {"one_cta": 128, "persistent": 1024}[strategy]
    for call in (
        cuda_cases.Call("LSTM projected", dtype),
        cuda_cases.Call("GRU", torch.float64),
        cuda_cases.Call("GRU", dtype, hidden_size=most + 1, steps=1, batch=1),
    ):
        with pytest.raises(ValueError, match=f"STRATEGY: {strategy} needs hidden_size <= {most}"):
            ops.layer_forward(**call.arguments(), save=True)


@pytest.mark.parametrize("what", ["a barrier missed", "two reasons", "no barrier"])
def test_the_emulation_finds(ops: Any, what: str) -> None:
    """What a GPU would hang on, or answer wrongly at times."""
    right = torch.arange(63, -1, -1).float()
    assert torch.equal(ops.reversed_in_block(""), right)
    if what == "no barrier":
        assert not torch.equal(ops.reversed_in_block(what), right)
    else:
        with pytest.raises(RuntimeError, match="threads of a block"):
            ops.reversed_in_block(what)


@pytest.mark.parametrize("hidden_size", [cuda_cases.HIDDEN, 256], ids="H={}".format)
@pytest.mark.parametrize("form", cuda_cases.FORMS)
@pytest.mark.parametrize("mode", cuda_cases.MODES)
def test_shapes_are_the_cpus(ops: Any, mode: str, form: str, hidden_size: int) -> None:
    """So fake kernels, which know no device, are true for both."""
    for dtype in (torch.bfloat16, torch.float64):
        call = cuda_cases.Call(mode, dtype, hidden_size=hidden_size, **cuda_cases.FORMS[form])
        for save in (False, True):
            arguments = call.arguments()
            ours = ops.layer_forward(**arguments, save=save)
            cpu = torch.ops.fusedrnn.layer_forward(**arguments, save=save)
            assert like(ours) == like(cpu)
        rest = dict(zip(("y", "gates", "cells"), (ours[i] for i in (0, 3, 4)), strict=True))
        rest |= call.cotangents() | {"output_mask": call.mask()}
        gradients = ops.layer_backward(**arguments, **rest)
        assert like(gradients) == like(torch.ops.fusedrnn.layer_backward(**arguments, **rest))


def like(outputs: Any) -> list[tuple[Any, ...]]:
    return [(t.shape, t.stride(), t.dtype) for t in oracle.tensors(outputs)]


@cuda_cases.each_way
def test_what_is_not_wanted(ops: Any, strategy: str, mode: str, dtype: torch.dtype) -> None:
    """Any one gradient alone is the same as among all; absent cotangents are zeros."""
    call = cuda_cases.Call(mode, dtype, **cuda_cases.FORMS["lengths and reset"])
    arguments, cotangents = call.arguments(), call.cotangents()
    outputs = ops.layer_forward(**arguments, save=True)
    saved = dict(zip(("y", "gates", "cells"), (outputs[i] for i in (0, 3, 4)), strict=True))

    def gradients(mask: list[bool], given: Any = cotangents) -> list[torch.Tensor]:
        dx, dh0, dc0, dparams = ops.layer_backward(**arguments, **given, **saved, output_mask=mask)
        return [dx, dh0, dc0, *dparams]

    whole = gradients(call.mask())
    for index, wanted in enumerate(call.mask()):
        if not wanted:
            continue
        mask = [i == index for i in range(len(whole))]
        alone = gradients(mask)
        assert oracle.same_bits(alone[index], whole[index])
        assert all(t.numel() == 0 for i, t in enumerate(alone) if i != index)
    for name, cotangent in cotangents.items():
        if cotangent is not None:
            absent = gradients(call.mask(), {**cotangents, name: None})
            zero = gradients(call.mask(), {**cotangents, name: torch.zeros_like(cotangent)})
            assert all(torch.equal(a, z) for a, z in zip(absent, zero, strict=True))


@cuda_cases.each_way
def test_lengths_out_of_range_stand_for_the_nearest(
    ops: Any, strategy: str, mode: str, dtype: torch.dtype
) -> None:
    steps = cuda_cases.T
    wild, tame = (-3, steps + 1, 2**40, 2, -(2**40)), (0, steps, steps, 2, 0)
    call = cuda_cases.Call(mode, dtype, both=True, reset=True, lengths=tame)
    right = cuda_cases.answer(ops, call)
    call.lengths = torch.tensor(wild)
    assert oracle.same_bits(cuda_cases.answer(ops, call), right)


@cuda_cases.each_way
def test_any_layout(ops: Any, strategy: str, mode: str, dtype: torch.dtype) -> None:
    """Inputs that are not contiguous, and gradients that are one value seen many times."""
    call = cuda_cases.Call(mode, dtype, **cuda_cases.FORMS["lengths and reset"])
    call.dy[:] = torch.where(call.valid.unsqueeze(-1), 0.25, 0.0)
    right = cuda_cases.answer(ops, call)

    def strided(t: Any) -> Any:
        if isinstance(t, list):
            return [strided(one) for one in t]
        if not isinstance(t, torch.Tensor):
            return t
        return torch.stack([t, t], -1)[..., 0]

    arguments = {n: strided(t) for n, t in call.arguments().items()}
    rest = {n: strided(t) for n, t in call.cotangents().items()}
    rest["dy"] = torch.tensor(0.25, dtype=dtype).expand(call.dy.shape)
    outputs = ops.layer_forward(**arguments, save=True)
    rest |= zip(("y", "gates", "cells"), (strided(outputs[i]) for i in (0, 3, 4)), strict=True)
    gradients = ops.layer_backward(**arguments, **rest, output_mask=call.mask())
    assert oracle.same_bits(cuda_cases.named(call, outputs, gradients), right)


@cuda_cases.each_way
def test_nothing_to_do(ops: Any, strategy: str, mode: str, dtype: torch.dtype) -> None:
    """No rows at all, no inputs, and rows without a step, which hand everything through."""
    empty = cuda_cases.Call(mode, dtype, both=True, batch=0, lengths=())
    results = cuda_cases.answer(ops, empty)
    assert all(t is None or not t.any() for t in results.values())
    cuda_cases.check(ops, cuda_cases.Call(mode, dtype, both=True, input_size=1, steps=1))
    idle = cuda_cases.Call(mode, dtype, both=True, reset=True, lengths=(0,) * cuda_cases.B)
    results = cuda_cases.answer(ops, idle)
    for name, state, cotangent in (("h", idle.h0, idle.dh_n), ("c", idle.c0, idle.dc_n)):
        if state is not None:
            assert torch.equal(results[f"{name}_n"], state.to(dtype))
            assert torch.equal(results[f"d{name}0"], cotangent.to(dtype))
    assert all(not results[n].any() for n in results if n.startswith(("y", "dx", "dweight")))


def test_a_packed_batch_without_rows(ops: Any) -> None:
    call = cuda_cases.Call("GRU", torch.float32, lengths=(1,) * cuda_cases.B, packed=True)
    arguments = call.arguments()
    arguments |= {"x": torch.empty(0, cuda_cases.INPUT), "batch_sizes": torch.tensor([0, 0])}
    arguments["h0"] = torch.empty(1, 0, cuda_cases.HIDDEN)
    y, h_n, _, _, _ = ops.layer_forward(**arguments, save=True)
    assert y.shape == (0, cuda_cases.HIDDEN)
    assert h_n.shape == (1, 0, cuda_cases.HIDDEN)
    # Steps that no row has come last, and are passed over.
    given = call.arguments()
    longer = {**given, "batch_sizes": torch.cat([call.valid.sum(1), torch.tensor([0, 0])])}
    assert oracle.same_bits(
        ops.layer_forward(**longer, save=True), ops.layer_forward(**given, save=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_of_half_precision(ops: Any, dtype: torch.dtype) -> None:
    """A host's conversions are torch's: every value, what lies just beside it, and any bits."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    between = (every[:-1] + every[1:]) / 2
    close = [torch.nextafter(t, end) for t in (every, between) for end in (up, down)]
    random = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504, 65519.9, 65520])
    x = torch.cat([every, between, *close, random, special])
    ours, torchs = ops.round_trip(x, dtype), x.to(dtype).float()
    assert torch.equal(ours.isnan(), torchs.isnan())
    known = ~torchs.isnan()
    assert oracle.same_bits(ours[known], torchs[known])


SWITCHES = [
    (recurrent, products) for recurrent in ("tf32", "ieee") for products in ("tf32", "ieee", "none")
]


@pytest.mark.parametrize(("recurrent", "products"), SWITCHES)
def test_precision_of_products(
    ops: Any, recurrent: str, products: str, switches: Callable[[str, str], None]
) -> None:
    """A float32 recurrence follows cuDNN's switch, all other products cuBLAS's; both stay set."""
    switches(recurrent, products)
    for dtype in (torch.float32, torch.bfloat16):
        call = cuda_cases.Call("LSTM projected", dtype)
        inside = recurrent if dtype == torch.float32 else products
        ops.take_products()
        arguments = call.arguments()
        outputs = ops.layer_forward(**arguments, save=True)
        steps = 2 * cuda_cases.T  # W_hh h and W_hr h_tilde
        assert ops.take_products() == [products == "tf32", *[inside == "tf32"] * steps]
        saved = dict(zip(("y", "gates", "cells"), (outputs[i] for i in (0, 3, 4)), strict=True))
        ops.layer_backward(**arguments, **call.cotangents(), **saved, output_mask=call.mask())
        large = [products == "tf32"] * 4  # dx, dW_ih, dW_hh, dW_hr
        assert ops.take_products() == [*[inside == "tf32"] * steps, *large]
        assert torch.backends.cudnn.rnn.fp32_precision == recurrent
        assert torch.backends.cuda.matmul.fp32_precision == products
        if products != "tf32":  # else the older switch does not know of the newer one
            assert torch.get_float32_matmul_precision() == "highest"


def test_products_go_on_following_torchs_general_precision(
    ops: Any, switches: Callable[[str, str], None]
) -> None:
    switches("tf32", "none")
    # Not torch.backends.fp32_precision: torch's own tests, once imported, forbid to assign it.
    general = partial(torch._C._set_fp32_precision_setter, "generic", "all")
    general("ieee")
    try:
        arguments = cuda_cases.Call("GRU", torch.float32).arguments()
        ops.layer_forward(**arguments, save=False)
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        general("tf32")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        general("none")


def test_precision_is_restored_after_an_error(
    ops: Any, switches: Callable[[str, str], None]
) -> None:
    switches("tf32", "ieee")
    arguments = cuda_cases.Call("GRU", torch.float32).arguments()
    ops.take_products()
    ops.fail_after(3)
    with pytest.raises(RuntimeError, match="a product failed"):
        ops.layer_forward(**arguments, save=False)
    assert ops.take_products() == [False, True, True]
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("name", ["dy", "y", "gates", "cells"])
def test_backward_refuses_what_does_not_fit(ops: Any, name: str) -> None:
    call = cuda_cases.Call("LSTM", torch.float32)
    arguments = call.arguments()
    outputs = ops.layer_forward(**arguments, save=True)
    rest = dict(zip(("y", "gates", "cells"), (outputs[i] for i in (0, 3, 4)), strict=True))
    rest |= call.cotangents() | {"output_mask": call.mask()}
    with pytest.raises(ValueError, match=rf"{name}: expected shape"):
        ops.layer_backward(**arguments, **{**rest, name: rest[name][:2]})
    with pytest.raises(TypeError, match=rf"{name}: expected dtype"):
        ops.layer_backward(**arguments, **{**rest, name: rest[name].double()})
