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
from typing import TypeVar

T = TypeVar("T")


def _with_seconds(f: Callable[..., T], *args: object) -> tuple[T, float]:
    result = f(*args)
    return result, sum(os.times()[:2])


def alone(f: Callable[..., T], *args: object) -> tuple[T, float]:
    """f(*args), and the processor's seconds it took; f and its arguments are pickled.

    The process is forked from one that has imported f's module and done nothing else: torch is
    loaded once, and nobody inherits another's threads. Raises what f raises, or
    concurrent.futures.process.BrokenProcessPool if it dies.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f.__module__])
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(_with_seconds, f, *args).result()
