"""The dispatcher operators: torch's own check of them, and what their callers may rely on."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
import oracle
from fusedrnn import autograd

T, B, INPUT, HIDDEN, PROJ = 4, 3, 5, 18, 7
forward_op = torch.ops.fusedrnn.layer_forward.default
backward_op = torch.ops.fusedrnn.layer_backward.default
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Sample:
    """One call of the forward operator, and one of the backward that follows it."""

    def __init__(
        self,
        mode: str,
        form: str = "dense",
        dtype: torch.dtype = torch.float32,
        both: bool = True,
        bias: bool = True,
        states: bool = True,
        projected: bool = False,
        hidden: int = HIDDEN,
    ) -> None:
        extra = {"proj_size": PROJ} if projected else {}
        params = oracle.module_params(mode, INPUT, hidden, bidirectional=both, bias=bias, **extra)
        directions, outputs = 2 if both else 1, PROJ if projected else hidden
        sizes = torch.tensor([3, 3, 2, 1]) if form == "packed" else None
        rows = (9,) if form == "packed" else (T, B)
        lstm = mode == "LSTM"
        self.mode, self.bias, self.both = mode, bias, both
        self.x = torch.randn(*rows, INPUT).to(dtype)
        self.h0 = torch.randn(directions, B, outputs).to(dtype) if states else None
        self.c0 = torch.randn(directions, B, hidden).to(dtype) if states and lstm else None
        self.params = [p.to(dtype) for p in params]
        self.lengths = torch.tensor([2, 0, 4]) if "lengths" in form else None
        self.reset = torch.rand(T, B) < 0.4 if "reset" in form else None
        self.sizes = sizes
        self.dy = torch.randn(*rows, directions * outputs).to(dtype)
        self.dh_n = torch.randn(directions, B, outputs).to(dtype)
        self.dc_n = torch.randn(directions, B, hidden).to(dtype) if lstm else None

    def forward_args(self, save: bool = True) -> tuple[Any, ...]:
        return (
            self.mode, self.x, self.lengths, self.sizes, self.reset, self.h0, self.c0, self.params,
            self.bias, self.both, save,
        )  # fmt: skip

    def backward_args(self, mask: list[bool] | None = None) -> tuple[Any, ...]:
        y, _, _, gates, cells = forward_op(*self.forward_args())
        if mask is None:
            given = [t is not None for t in (self.x, self.h0, self.c0)]
            mask = [*given, *(True for _ in self.params)]
        return (
            self.mode, self.dy, self.dh_n, self.dc_n, self.x, self.lengths, self.sizes, self.reset,
            self.h0, self.c0, self.params, y, gates, cells, self.bias, self.both, mask,
        )  # fmt: skip


SAMPLES: dict[str, dict[str, Any]] = {
    "dense": {},
    "one way": {"both": False},
    "no biases": {"bias": False},
    "no states": {"states": False},
    "lengths": {"form": "lengths"},
    "reset": {"form": "reset"},
    "lengths and reset": {"form": "lengths reset"},
    "packed": {"form": "packed"},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16, "form": "lengths"},
    # Rows of gates of whole multiples of 2 KiB, which are laid further apart.
    "float32, H = 128": {"hidden": 128},
    "float64, H = 64": {"hidden": 64, "dtype": torch.float64},
    "bfloat16, H = 256": {"hidden": 256, "dtype": torch.bfloat16, "form": "lengths"},
}
CASES = [(mode, name, options) for mode in oracle.MODES for name, options in SAMPLES.items()]
CASES += [("LSTM", f"projected, {n}", {"projected": True, **o}) for n, o in SAMPLES.items()]
with_cases = pytest.mark.parametrize(
    ("mode", "options"), [(m, o) for m, _, o in CASES], ids=[f"{m}-{n}" for m, n, _ in CASES]
)


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small, but for what asks for threads."""


# opcheck compiles each sample: all of them for one cell, those that differ for the others.
OPCHECKS = [("LSTM", {"projected": True, **o}) for o in SAMPLES.values() if "hidden" not in o]
OPCHECKS += [
    (mode, SAMPLES[name])
    for mode in ("LSTM", "GRU", "RNN_TANH")
    for name in ("dense", "lengths and reset", "packed", "bfloat16")
]


@pytest.mark.parametrize(("mode", "options"), OPCHECKS, ids=str)
def test_opcheck_forward(mode: str, options: dict[str, Any]) -> None:
    sample = Sample(mode, **options)
    for save in (False, True):
        torch.library.opcheck(forward_op, sample.forward_args(save))


@pytest.mark.parametrize(("mode", "options"), OPCHECKS, ids=str)
def test_opcheck_backward(mode: str, options: dict[str, Any]) -> None:
    torch.library.opcheck(backward_op, Sample(mode, **options).backward_args())


@pytest.mark.parametrize("wanted", ["some", "none"])
def test_opcheck_backward_with_unwanted_gradients(wanted: str) -> None:
    sample = Sample("LSTM")
    mask = [wanted == "some" and i % 2 == 0 for i in range(3 + len(sample.params))]
    torch.library.opcheck(backward_op, sample.backward_args(mask))


@with_cases
def test_fakes_have_the_real_shapes(mode: str, options: dict[str, Any]) -> None:
    sample = Sample(mode, **options)
    if sample.sizes is not None and sample.h0 is None:
        pytest.skip("the fake batch is a symbol there")
    masks = [None, [False] * (3 + len(sample.params))]
    calls = [(forward_op, sample.forward_args(save)) for save in (True, False)]
    calls += [(backward_op, sample.backward_args(mask)) for mask in masks]
    for op, args in calls:
        real = oracle.tensors(op(*args))
        with torch._subclasses.FakeTensorMode() as mode_:
            fake = oracle.tensors(op(*to_fake(mode_, args)))
        for mine, theirs in zip(fake, real, strict=True):
            assert mine.shape == theirs.shape
            assert mine.dtype == theirs.dtype
            assert mine.stride() == theirs.stride()


def to_fake(mode: Any, value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(to_fake(mode, v) for v in value)
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


@with_cases
def test_nothing_aliases_and_nothing_is_modified(mode: str, options: dict[str, Any]) -> None:
    sample = Sample(mode, **options)
    for op, args in ((forward_op, sample.forward_args()), (backward_op, sample.backward_args())):
        given = oracle.tensors(args, any_dtype=True)
        kept = [t.clone() for t in given]
        results = oracle.tensors(op(*args))
        assert oracle.same_bits(given, kept)
        storages = [t.untyped_storage() for t in results if t.numel()]
        pointers = [s.data_ptr() for s in storages]
        assert len(set(pointers)) == len(pointers), "two outputs share memory"
        assert not set(pointers) & {t.untyped_storage().data_ptr() for t in given}


@with_cases
def test_a_second_backward_gives_the_same_bits(mode: str, options: dict[str, Any]) -> None:
    """What forward saved is never overwritten."""
    sample = Sample(mode, **options)
    args = sample.backward_args()
    assert oracle.same_bits(backward_op(*args), backward_op(*args))


def test_retained_graph_gives_the_same_bits() -> None:
    for mode in oracle.MODES:
        sample = Sample(mode, "lengths reset")
        leaves = [t.requires_grad_() for t in (sample.x, *sample.params)]
        y, *_ = autograd.layer(*sample.forward_args()[:-1])
        first, second, third = (
            torch.autograd.grad(y, leaves, sample.dy, retain_graph=True) for _ in range(3)
        )
        assert oracle.same_bits(first, second)
        assert oracle.same_bits(first, third)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_wanted_gradients_do_not_depend_on_the_others(mode: str) -> None:
    sample = Sample(mode, "lengths reset", projected=mode == "LSTM")
    args = sample.backward_args()
    full = oracle.tensors(backward_op(*args))
    places = len(full)
    for index in range(places):
        mask = [i == index and args[-1][i] for i in range(places)]
        found = oracle.tensors(backward_op(*args[:-1], mask))
        for i, (mine, whole) in enumerate(zip(found, full, strict=True)):
            assert oracle.same_bits(mine, whole) if mask[i] else mine.shape == (0,)


@pytest.mark.parametrize("which", range(1, 8))
def test_absent_incoming_gradients_are_zeros(which: int) -> None:
    sample = Sample("LSTM", "lengths reset")
    args = list(sample.backward_args())
    zeroed = list(args)
    for bit, place in enumerate((1, 2, 3)):
        if which >> bit & 1:
            args[place], zeroed[place] = None, torch.zeros_like(args[place])
    for mine, theirs in zip(
        oracle.tensors(backward_op(*args)), oracle.tensors(backward_op(*zeroed)), strict=True
    ):
        assert mine.equal(theirs)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_every_layout_of_the_arguments(mode: str) -> None:
    """Strided, expanded and offset arguments give the bits of contiguous ones."""
    sample = Sample(mode, "lengths reset")
    expected = forward_op(*sample.forward_args()), backward_op(*sample.backward_args())
    for name in ("x", "h0", "c0", "dy", "dh_n", "dc_n", "lengths", "reset"):
        value = getattr(sample, name)
        if value is not None:
            setattr(sample, name, scattered(value))
    sample.params = [scattered(p) for p in sample.params]
    found = forward_op(*sample.forward_args()), backward_op(*sample.backward_args())
    assert oracle.same_bits(found, expected)


def scattered(tensor: Tensor) -> Tensor:
    """The same values with gaps, at an offset, the dimensions in reverse order in memory."""
    order = list(reversed(range(tensor.dim())))
    memory = torch.zeros(*(2 * tensor.shape[d] for d in order), dtype=tensor.dtype)
    view = memory[tuple(slice(1, None, 2) for _ in order)].permute(order)
    view.copy_(tensor)
    assert view.storage_offset() > 0
    return view


@pytest.mark.parametrize("mode", oracle.MODES)
def test_bare_operator_with_grad_raises_in_backward(mode: str) -> None:
    """Never a silently missing gradient."""
    sample = Sample(mode)
    sample.x.requires_grad_()
    for op, args in ((forward_op, sample.forward_args()), (backward_op, sample.backward_args())):
        first = oracle.tensors(op(*args))[0]
        assert first.requires_grad
        with pytest.raises(RuntimeError, match="not implemented"):
            first.sum().backward()


def test_bare_operator_in_inference_mode_needs_no_grad() -> None:
    sample = Sample("GRU")
    sample.x.requires_grad_()
    with torch.inference_mode():
        assert not forward_op(*sample.forward_args())[0].requires_grad


def test_save_only_saves() -> None:
    for mode, dtype in itertools.product(oracle.MODES, DTYPES):
        sample = Sample(mode, "lengths reset", dtype)
        saved, plain = (forward_op(*sample.forward_args(save)) for save in (True, False))
        assert oracle.same_bits(saved[:3], plain[:3])
        assert plain[3].numel() == plain[4].numel() == 0


@pytest.mark.alone
def test_other_threads_run_meanwhile() -> None:
    """The GIL is released: this thread counts on while another one is in the kernel."""
    x, params = torch.randn(400, 32, 64), [p.float() for p in oracle.module_params("LSTM", 64, 256)]
    args = ("LSTM", x, None, None, None, None, None, params, True, False, False)
    busy = threading.Event()
    done = threading.Event()
    spans: list[tuple[float, float]] = []

    def work() -> None:
        busy.set()
        for _ in range(3):
            begin = time.perf_counter()
            forward_op(*args)
            spans.append((begin, time.perf_counter()))
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    busy.wait()
    ticks = []
    while not done.is_set():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    worker.join()
    begin, end = max(spans, key=lambda span: span[1] - span[0])
    inside = sum(begin < tick < end for tick in ticks)
    assert end - begin > 0.01, "the call was too short to show anything"
    assert inside >= 3, f"{inside} turns in a call of {end - begin:.3f} s"


class Log(TorchDispatchMode):
    """The names of the operators that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_eager_calls_pass_through_the_dispatcher() -> None:
    """Modules call the operators past ``torch.ops``, but modes must see them as they do others."""
    gru, x = fusedrnn.GRU(INPUT, HIDDEN), torch.randn(T, B, INPUT)
    with Log() as log:
        y, _ = gru(x)
        y.sum().backward()
        with torch.no_grad():
            gru(x)
    ours = [name for name in log.names if name.startswith("fusedrnn")]
    forward, backward = (f"fusedrnn.layer_{way}.default" for way in ("forward", "backward"))
    assert ours == [forward, backward, forward]
    with FakeTensorMode():
        fake = fusedrnn.GRU(INPUT, HIDDEN)
        y, _ = fake(torch.randn(T, B, INPUT))
        y.sum().backward()
        assert isinstance(y, FakeTensor)
        assert isinstance(fake.weight_hh_l0.grad, FakeTensor)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["GRU", "RNN", "GRUCell", "RNNCell", "LSTMCell"])
def test_flops_are_counted_as_torchs(name: str, train: bool) -> None:
    """Where torch.nn's are counted: oneDNN's LSTM is not."""
    cell = name.endswith("Cell")
    options = {} if cell else {"num_layers": 2, "bidirectional": True}
    counts = []
    for library in (torch.nn, fusedrnn):
        net = getattr(library, name)(3, 4, **options)
        x = torch.randn(2, 3) if cell else torch.randn(5, 2, 3)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
            output = oracle.tensors(net(x))[0]
            if train:
                output.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_flops_of_second_derivatives_are_counted() -> None:
    params = list(fusedrnn.LSTM(3, 4, proj_size=2).parameters())
    x = torch.randn(5, 2, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y, _ = fusedrnn.functional.lstm(x, None, params)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        first = counter.get_total_flops()
        torch.autograd.grad(dx.square().sum(), x)
    assert first > 0
    assert counter.get_total_flops() > 2 * first
