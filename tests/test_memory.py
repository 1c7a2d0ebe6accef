"""The memory kept between calls: its bound, its return, and that nothing leaks through it."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import textwrap
import threading

import torch

import fusedrnn


def train_step(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y, _ = module(x)
    return list(torch.autograd.grad(y.square().sum(), list(module.parameters())))


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def in_a_process_of_its_own(code: str) -> None:
    folder = __file__.rsplit("/", 1)[0]
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=folder, timeout=300
    )


def peak() -> int:
    """The most bytes it ever had there (Linux)."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def peak_from_now_on() -> int:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak()


def test_saved_tensors_of_two_calls_never_share_memory() -> None:
    lstm, x = fusedrnn.LSTM(64, 64), torch.randn(40, 8, 64)
    alone = train_step(lstm, x)
    first, _ = lstm(x)
    second, _ = lstm(-x)  # its saved tensors must not lie where the first one's still live
    fusedrnn.empty_cache()
    third, _ = lstm(2 * x)
    grads = torch.autograd.grad(first.square().sum(), list(lstm.parameters()))
    assert all(a.equal(b) for a, b in zip(grads, alone, strict=True))
    assert not first.equal(second)
    assert not first.equal(third)


def test_used_memory_brings_no_values_along() -> None:
    """Ragged rows leave parts of the scratch unwritten: NaN from before must not show."""
    lstm = fusedrnn.LSTM(48, 80, bidirectional=True)
    x, lengths = torch.randn(30, 8, 48), torch.tensor([30, 0, 7, 29, 1, 30, 15, 2])
    fusedrnn.empty_cache()

    def run() -> list[torch.Tensor]:
        y, _ = lstm(x, lengths=lengths)
        return [y, *torch.autograd.grad(y.square().sum(), list(lstm.parameters()))]

    fresh = run()
    poisoned, _ = lstm(torch.full_like(x, torch.nan))
    poisoned.sum().backward()
    del poisoned
    assert all(a.equal(b) for a, b in zip(run(), fresh, strict=True))


def test_what_is_kept_is_bounded_and_given_back() -> None:
    in_a_process_of_its_own("""
    import torch, fusedrnn, test_memory
    lstm, x = fusedrnn.LSTM(64, 512), torch.randn(400, 64, 64)  # 260 MB of gates and cells
    for steps in (100, 200, 400):
        test_memory.train_step(lstm, x[:steps])
    before = test_memory.resident()
    fusedrnn.empty_cache()
    returned = before - test_memory.resident()
    assert 128 << 20 < returned < 260 << 20, returned
    """)


def test_repeated_steps_do_not_grow() -> None:
    lstm, x = fusedrnn.LSTM(64, 128), torch.randn(100, 32, 64)
    for _ in range(3):
        train_step(lstm, x)
    gc.collect()
    before = resident()
    for _ in range(30):
        train_step(lstm, x)
    assert resident() - before < 8 << 20


def test_a_thousand_shapes_do_not_grow() -> None:
    in_a_process_of_its_own("""
    import gc, itertools, torch, fusedrnn, test_memory
    torch.set_num_threads(2)

    def train(shapes):
        for steps, batch, inputs, hidden in shapes:
            module = fusedrnn.GRU if hidden % 2 else fusedrnn.LSTM
            test_memory.train_step(module(inputs, hidden), torch.randn(steps, batch, inputs))
        gc.collect()
        fusedrnn.empty_cache()
        return test_memory.resident()

    shapes = [*itertools.product(range(1, 11), (1, 2, 3, 8, 33), (1, 17, 40, 64), range(30, 35))]
    assert len(set(shapes)) == 1000
    before = train(shapes[::5])  # the largest among them
    grown = train(shapes) - before
    assert grown < 8 << 20, grown
    """)


def test_training_workspace_of_an_lstm() -> None:
    """Beside inputs, outputs and gradients: 5.5 H floats a row and step at most."""
    in_a_process_of_its_own("""
    import torch, fusedrnn, test_memory
    steps, batch, inputs, hidden = 300, 64, 64, 512
    lstm = fusedrnn.LSTM(inputs, hidden)
    x = torch.randn(steps, batch, inputs, requires_grad=True)
    dy = torch.randn(steps, batch, hidden)
    y, _ = lstm(x[:2])
    y.backward(dy[:2])  # all code is loaded
    before = test_memory.peak_from_now_on()
    y, _ = lstm(x)
    y.backward(dy)
    used = test_memory.peak() - before - y.nbytes
    per_row = used / (steps * batch) / 4
    assert 5.0 * hidden < per_row < 5.5 * hidden, per_row / hidden
    """)


def test_threads_and_empty_cache_at_once() -> None:
    """Blocks go to one user at a time, whoever gives back or empties meanwhile."""
    lstm, x = fusedrnn.LSTM(48, 48), torch.randn(50, 6, 48)
    expected = train_step(lstm, x)
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            got = train_step(lstm, x)
            if not all(a.equal(b) for a, b in zip(got, expected, strict=True)):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        fusedrnn.empty_cache()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_are_ordinary_tensors() -> None:
    """Their memory is the pool's, but they resize, share, pickle and outlive it like any other."""
    lstm, x = fusedrnn.LSTM(64, 256), torch.randn(50, 16, 64)
    with torch.no_grad():
        y, _ = lstm(x)
        assert y.nbytes >= 32 << 10  # from there on it comes from the pool
        kept = y.clone()
        fusedrnn.empty_cache()
        lstm(-x)
        assert y.equal(kept)
        y.resize_(60, 16, 256)
        assert y[:50].equal(kept)
        shared, _ = lstm(x)
        shared.share_memory_()
        assert shared.is_shared()
        assert shared.equal(kept)
        buffer = io.BytesIO()
        torch.save(lstm(x)[0], buffer)
        buffer.seek(0)
        assert torch.load(buffer).equal(kept)
        emptied, _ = lstm(x)
        emptied.untyped_storage().resize_(0)
        assert lstm(x)[0].equal(kept)
