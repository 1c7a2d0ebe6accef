"""Threads and processes: the same numbers however many there are, and no call that hangs.

What could hang runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedrnn
import oracle
from fusedrnn import _C

ROOT = Path(fusedrnn.__file__).resolve().parents[1]
# T, B, I, H of work that is split by rows, by rows with weights' gradients of their own, by hidden
# units, by directions, and not at all.
SHAPES = {
    "rows": (20, 48, 32, 320),
    "apart": (60, 24, 24, 40),
    "units": (20, 2, 64, 320),
    "small": (3, 2, 4, 5),
}


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Sums may be split elsewhere for another number of threads; nothing else may differ."""
    for mine, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().item()
        assert (mine - theirs).abs().max().item() <= 64 * scale * torch.finfo(mine.dtype).eps


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
# Not RNN_RELU: its slope jumps where a sum is zero, which another order of summation may move.
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_any_number_of_threads(mode: str, shape: str, bidirectional: bool, ragged: bool) -> None:
    steps, batch, *_ = sizes = SHAPES[shape]
    net = oracle.fused(mode, sizes[2:], bidirectional=bidirectional)
    x = torch.randn(steps, batch, sizes[2])
    extras = {}
    if ragged:
        extras["lengths"] = torch.randint(0, steps + 1, (batch,))
        extras["reset"] = torch.rand(steps, batch) < 0.1
    with oracle.num_threads(1):
        expected = oracle.trained(net, x, **extras)
    for count in (2, 3, 4):
        with oracle.num_threads(count):
            first = oracle.trained(net, x, **extras)
            same(first, expected)
            assert oracle.same_bits(first, oracle.trained(net, x, **extras)), "not reproducible"


# Of each chunk, two threads have an odd number of rows, and a word holds two of bfloat16.
@pytest.mark.parametrize("shape", [(70, 70, 8, 16), (46, 46, 16, 32)])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_no_word_holds_rows_of_two_threads(isa: str, mode: str, shape: tuple[int, ...]) -> None:
    net = oracle.fused(mode, shape[2:], dtype=torch.bfloat16)
    x = torch.randn(shape[:3]).bfloat16()
    with oracle.num_threads(1):
        expected = oracle.trained(net, x)
    with oracle.num_threads(2):
        for _ in range(10):
            for mine, theirs in zip(oracle.trained(net, x), expected, strict=True):
                # The sums differ by far less than a rounding, which then goes another way at most.
                torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=2**-8)


@pytest.fixture
def assume_threads() -> Iterator[Callable[[str], None]]:
    yield _C.assume_threads
    _C.assume_threads("measured")


# T, B, I, H of calls short enough to use a second thread only where it runs near the first.
@pytest.mark.parametrize(
    "shape",
    [(100, 1, 64, 64), (13, 1, 100, 128), (60, 2, 40, 100), (1, 64, 64, 64), (1, 3, 100, 200)],
)
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_distance_of_threads_changes_no_bit(
    isa: str,
    assume_threads: Callable[[str], None],
    mode: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    net = oracle.fused(mode, shape[2:], dtype=dtype)
    x = torch.randn(shape[:3]).to(dtype).requires_grad_()
    with oracle.num_threads(2):
        found = []
        for distance in ("near", "far", "measured"):
            assume_threads(distance)
            found.append(oracle.trained(net, x))
    assert oracle.same_bits(found[0], found[1])
    assert oracle.same_bits(found[0], found[2])


# Of the whole call seven rows would share the units; of those that a chunk has, two threads take
# a row and three.
@pytest.mark.parametrize(
    "lengths", [(200, 40, 30, 20, 0, 0, 0), (173, 79, 79, 79, 73, 73, 73)], ids=["empty", "chunks"]
)
def test_the_distance_of_threads_changes_no_bit_of_ragged_rows(
    isa: str, assume_threads: Callable[[str], None], lengths: tuple[int, ...]
) -> None:
    net = fusedrnn.LSTM(1, 32)
    x, rows = torch.randn(max(lengths), 7, 1), torch.tensor(lengths)
    with oracle.num_threads(2):
        found = []
        for distance in ("near", "far", "measured"):
            assume_threads(distance)
            y, state = net(x, lengths=rows)
            with torch.no_grad():
                alone = net(x, lengths=rows)[0]
            grads = torch.autograd.grad(y.square().sum(), list(net.parameters()))
            found.append([y.detach(), state[1].detach(), alone, *grads])
    assert oracle.same_bits(found[0], found[1])
    assert oracle.same_bits(found[0], found[2])


def test_the_distance_is_one_that_there_is() -> None:
    with pytest.raises(ValueError, match="distance: expected 'near', 'far' or 'measured', got 'x'"):
        _C.assume_threads("x")


def test_threads_are_measured_where_calls_follow_each_other(isa: str) -> None:
    """Many short calls, some after a pause in which the other thread falls asleep."""
    shape = (100, 1, 64, 64)
    net = oracle.fused("LSTM", shape[2:])
    x = torch.randn(shape[:3])
    with oracle.num_threads(2):
        expected = oracle.trained(net, x)
        for pause in (0.0,) * 50 + (0.02,) * 3 + (0.0,) * 50:
            time.sleep(pause)
            assert oracle.same_bits(oracle.trained(net, x), expected)


def test_projection_with_any_number_of_threads() -> None:
    net = fusedrnn.LSTM(40, 200, proj_size=90, bidirectional=True)
    x = torch.randn(12, 6, 40)
    with oracle.num_threads(1):
        expected = oracle.trained(net, x)
    for count in (2, 3, 4):
        with oracle.num_threads(count):
            same(oracle.trained(net, x), expected)


def test_calls_at_once() -> None:
    """Several Python threads, each with nets of its own and one that they share."""
    shared = oracle.fused("LSTM", SHAPES["rows"][2:])
    inputs = [torch.randn(20, 48, 32) for _ in range(4)]
    own = [oracle.fused("GRU", SHAPES["rows"][2:]) for _ in inputs]
    expected = [
        (oracle.trained(shared, x), oracle.trained(net, x))
        for x, net in zip(inputs, own, strict=True)
    ]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(5):
                with torch.no_grad():
                    y, _ = shared(inputs[index])
                torch.testing.assert_close(y, expected[index][0][0].detach(), rtol=1e-5, atol=1e-6)
                found = own[index](inputs[index])[0]
                torch.testing.assert_close(found, expected[index][1][0], rtol=1e-5, atol=1e-6)
                found.sum().backward()
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive(), "hangs"
    if failures:
        raise failures[0]


def twice_differentiated(net: torch.nn.Module, x: Tensor) -> list[Tensor]:
    weights = list(net.parameters())
    grads = torch.autograd.grad(net(x)[0].square().sum(), weights, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in grads), weights))


@pytest.mark.parametrize(
    ("call", "mode", "dtype"),
    [
        (lambda net, x: [net(x)[0].detach()], "GRU", torch.float32),
        (oracle.trained, "LSTM", torch.bfloat16),
        (oracle.trained, "GRU", torch.float16),
        (twice_differentiated, "GRU", torch.float32),
    ],
    ids=["forward", "bfloat16", "float16", "second"],
)
def test_the_instruction_set_may_change_meanwhile(call: Any, mode: str, dtype: torch.dtype) -> None:
    """A call that has begun goes on with the one that it began with."""
    net = oracle.fused(mode, (33, 17)).to(dtype)
    x = torch.randn(20, 12, 33).to(dtype)
    expected = call(net, x)
    done = threading.Event()

    def switch() -> None:
        while not done.is_set():
            for name in fusedrnn.cpu_isas():
                _C.set_cpu_isa(name)
                time.sleep(1e-5)

    worker = threading.Thread(target=switch, daemon=True)
    worker.start()
    try:
        for _ in range(200):
            same(call(net, x), expected)
    finally:
        done.set()
        worker.join(timeout=10)


# --- in a process of its own --------------------------------------------------------------------

PRELUDE = """
import os, sys, threading, time
import torch
import fusedrnn
torch.manual_seed(0)
net = fusedrnn.LSTM(64, 192, bidirectional=True)
x = torch.randn(20, 16, 64)
def train():
    y, (h, c) = net(x)
    grads = torch.autograd.grad(y.pow(2).sum() + c.sum(), list(net.parameters()))
    return [y.detach(), h.detach(), c.detach(), *grads]
def expect(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().item()
        assert (mine - theirs).abs().max().item() <= 1e-5 * scale
"""


def run(code: str, timeout: float = 90, **environment: str) -> str:
    """Run PRELUDE and ``code`` in a fresh interpreter; its output."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "FUSEDRNN_"))}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        env=env, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


AGREES_WITH_ONE_THREAD = """
found = [train() for _ in range(3)][-1]
torch.set_num_threads(1)
expect(found, train())
print("agrees")
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_THREAD_LIMIT": "1", "OMP_NUM_THREADS": "4"},
        {"OMP_THREAD_LIMIT": "3", "OMP_NUM_THREADS": "4"},
        {"OMP_NUM_THREADS": "8"},  # more than there are cores, on small machines
        {"OMP_NUM_THREADS": "8", "OMP_WAIT_POLICY": "active"},
        {"OMP_DYNAMIC": "true", "OMP_NUM_THREADS": "4"},
        {"OMP_NUM_THREADS": "1"},
    ],
    ids=lambda e: " ".join(f"{k}={v}" for k, v in e.items()),
)
def test_openmp_settings(environment: dict[str, str]) -> None:
    """A team may be smaller than asked for: nobody may wait for who never came."""
    assert "agrees" in run(AGREES_WITH_ONE_THREAD, **environment)


def test_teams_beside_teams() -> None:
    """Four threads at once with a team each, several times as many threads as cores."""
    code = """
    torch.set_num_threads(1)
    expected = train()
    torch.set_num_threads(4)
    failures = []
    def work():
        try:
            torch.set_num_threads(4)
            for _ in range(3):
                expect(train(), expected)
        except BaseException as error:
            failures.append(error)
    workers = [threading.Thread(target=work) for _ in range(4)]
    [w.start() for w in workers]
    [w.join() for w in workers]
    assert not failures, failures
    print("agrees")
    """
    assert "agrees" in run(code)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc")
def test_torchs_threads_live_on() -> None:
    """A team of fewer threads than torch's would have libgomp end the others."""
    code = """
    def tasks():
        return set(os.listdir("/proc/self/task"))
    torch.set_num_threads(4)
    small = fusedrnn.GRU(100, 100)  # of whose hidden units two threads have enough to do
    x, data = torch.randn(60, 1, 100), torch.randn(1 << 20)
    for _ in range(3):
        data.sigmoid()
    before = tasks()
    for _ in range(20):
        with torch.no_grad():
            small(x)
        data.sigmoid()
    assert tasks() == before, (tasks(), before)
    print("agrees")
    """
    assert "agrees" in run(code)


def test_nested_in_a_parallel_region() -> None:
    """Called by each thread of an OpenMP team: a nested region is a team of one."""
    code = """
    import ctypes
    with torch.no_grad():
        expected = net(x)[0]
    with open("/proc/self/maps") as maps:
        runtimes = sorted({line.split()[-1] for line in maps if "libgomp" in line})
    found = []
    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_):
        torch.set_num_threads(3)
        with torch.no_grad():
            found.append(net(x)[0])
    for runtime in runtimes:
        ctypes.CDLL(runtime).GOMP_parallel(body, None, 3, 0)
    assert len(found) == 3 * len(runtimes), found
    for y in found:
        expect([y], [expected])
    print("agrees" if runtimes else "no libgomp")
    """
    if not Path("/proc/self/maps").exists():
        pytest.skip("the OpenMP runtime is found through /proc")
    said = run(code)
    if "no libgomp" in said:
        pytest.skip("the OpenMP runtime is not GNU's")
    assert "agrees" in said


def test_inactive_regions() -> None:
    """As inside another parallel region: whatever is asked for, teams of one."""
    assert "agrees" in run(AGREES_WITH_ONE_THREAD, OMP_MAX_ACTIVE_LEVELS="0", OMP_NUM_THREADS="4")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use() -> None:
    """As DataLoader's workers do: the child sets one thread, and must not wait for the parent's."""
    code = """
    expected = train()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            expect(train(), expected)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    deadline = time.time() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.time() > deadline:
            os.kill(child, 9)
            raise SystemExit("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status) == 0
    expect(train(), expected)  # and the parent's threads are still there
    print("agrees")
    """
    assert "agrees" in run(code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_in_a_data_loader() -> None:
    code = """
    from torch.utils.data import DataLoader, Dataset
    expected = train()
    class Encoded(Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            with torch.no_grad():
                return net(x + index)[0]
    if __name__ == "__main__":
        items = list(DataLoader(Encoded(), batch_size=None, num_workers=2, timeout=60,
                                multiprocessing_context="fork"))
        with torch.no_grad():
            expect(items, [net(x + i)[0] for i in range(4)])
        print("agrees")
    """
    assert "agrees" in run(code)


def test_forced_instruction_set() -> None:
    code = "from fusedrnn import _C\nprint(_C.get_cpu_isa())"
    for name in fusedrnn.cpu_isas():
        assert run(code, FUSEDRNN_CPU_ISA=name).split() == [name]
    assert run(code, FUSEDRNN_CPU_ISA="").split() == [fusedrnn.cpu_isas()[-1]]


def test_an_unknown_forced_instruction_set_is_an_error() -> None:
    code = """
    try:
        train()
    except (ValueError, RuntimeError) as error:
        print(error)
    """
    said = run(code, FUSEDRNN_CPU_ISA="mmx")
    assert "instruction set 'mmx' is not available: expected one of" in said


@pytest.mark.alone
def test_threads_do_not_hurt_small_work() -> None:
    """Work too small to share stays on one thread, whatever the number allowed."""
    net = oracle.fused("GRU", SHAPES["small"][2:])
    x = torch.randn(3, 2, 4)
    best: dict[int, float] = {}
    with torch.no_grad():
        for count in (1, 2) * 3:
            with oracle.num_threads(count):
                net(x)
                times = []
                for _ in range(50):
                    begin = time.perf_counter()
                    net(x)
                    times.append(time.perf_counter() - begin)
                best[count] = min(best.get(count, 1.0), min(times))
    assert best[2] < 2 * best[1]
