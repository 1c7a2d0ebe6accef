"""What every test starts from, and is put back to: seed, threads, instruction set, dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import emulation
import fusedrnn
from fusedrnn import _C

EMULATED = pytest.StashKey[emulation.Library]()


def pytest_configure(config: pytest.Config) -> None:
    # torch.nn's own remarks; everything else should be seen.
    for message in (
        "LSTM with projections",
        "dropout option adds dropout",
        "`torch.jit.script",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the emulated CUDA half come last: it is compiled beside the others, in a minute."""
    items.sort(key=is_emulated)


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(map(is_emulated, session.items)) and not session.config.option.collectonly:
        session.config.stash[EMULATED] = emulation.Library()


def pytest_unconfigure(config: pytest.Config) -> None:
    if EMULATED in config.stash:
        config.stash[EMULATED].stop()


def is_emulated(item: pytest.Item) -> bool:
    return "ops" in getattr(item, "fixturenames", ())


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Seed before each test; after it, what it changed for the whole process is changed back."""
    threads, isa = torch.get_num_threads(), _C.get_cpu_isa()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    _C.set_cpu_isa(isa)
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(params=fusedrnn.cpu_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Run the test once with each instruction set of this machine."""
    _C.set_cpu_isa(request.param)
    return request.param


@pytest.fixture
def one_thread() -> None:
    """Small work, which torch.nn would spread over threads: alone it is several times faster."""
    torch.set_num_threads(1)


@pytest.fixture
def strategy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force the CUDA half's way of running the recurrence, given as an indirect parameter."""
    monkeypatch.setenv("FUSEDRNN_CUDA_STRATEGY", request.param)
    return request.param


@pytest.fixture(scope="session")
def ops(request: pytest.FixtureRequest) -> Any:
    """The CUDA half's operators, emulated on the host."""
    return request.config.stash[EMULATED].load()


@pytest.fixture
def device(ops: Any) -> Iterator[Callable[..., None]]:
    """Says how many blocks the emulated device holds at a time, and what else is odd about it."""
    yield ops.set_device
    ops.set_device(8)


@pytest.fixture
def switches() -> Iterator[Callable[[str, str], None]]:
    """Sets the TF32 switches of recurrent layers and of products; puts both back."""

    def switch(recurrent: str, products: str) -> None:
        torch.backends.cudnn.rnn.fp32_precision = recurrent
        torch.backends.cuda.matmul.fp32_precision = products

    yield switch
    switch("tf32", "none")  # as torch starts


@pytest.fixture
def without_tf32() -> Iterator[None]:
    """TF32 is off, as torch.nn knows none on a CPU."""
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # as torch starts
