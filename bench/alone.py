"""Each measurement in a process of its own, so that no row depends on those before it.

What ran before decides what malloc keeps. In a fresh process torch.nn's LSTM faults its workspace
in at every training step of 16,500,128,64, which takes 36 ms; once larger blocks have been freed,
malloc keeps that memory and the same step takes 28 ms. A user's process has its one model.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


# By process id: the processor's seconds of a server's children, as they were seen last.
_seen: dict[int, float] = {}


def _with_parent(f: Callable[..., T], *args: object) -> tuple[T, int]:
    return f(*args), os.getppid()


def _new_seconds_of_children(pid: int) -> float:
    """Of those that have ended since the last question, up to their very end."""
    # Behind the command's name: user and system seconds of waited-for children, in ticks.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds = sum(int(ticks) for ticks in fields[13:15]) / os.sysconf("SC_CLK_TCK")
    before, _seen[pid] = _seen.get(pid, 0.0), seconds
    return seconds - before


def alone(f: Callable[..., T], *args: object) -> tuple[T, float]:
    """f(*args), and the processor's seconds it took; f and its arguments are pickled.

    The process is forked from one that has imported f's module and done nothing else: torch is
    loaded once, and nobody inherits another's threads. Raises what f raises, or
    concurrent.futures.process.BrokenProcessPool if it dies.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f.__module__])
    with ProcessPoolExecutor(1, context) as executor:
        result, server = executor.submit(_with_parent, f, *args).result()
    return result, _new_seconds_of_children(server)
