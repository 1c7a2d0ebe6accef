"""Times by marks on a device's own time line, which the host does not wait for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

ROUND_SECONDS = 0.004  # a mark's resolution and its gap in the device's work then count little
MIN_ROUNDS = 5
MAX_ROUNDS = 25


class Clock(Protocol):
    def mark(self) -> Any:
        """Where all work given to the device so far ends."""

    def seconds(self, start: Any, stop: Any) -> float:
        """Between two marks, once the device has reached the second."""


class Events:
    """CUDA events on the current stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


class HostClock:
    """For work that is done when its call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, stop: float) -> float:
        return stop - start


@dataclass(frozen=True)
class Timing:
    seconds: float  # a call, the median over the rounds
    rounds: int
    repeats: int  # calls in a round


def plan(call_seconds: float, bound: float) -> tuple[int, int]:
    """Rounds, and calls in each, that fit `bound` seconds; MIN_ROUNDS single calls at least."""
    repeats = max(1, round(ROUND_SECONDS / max(call_seconds, 1e-9)))
    repeats = max(1, min(repeats, int(bound / MIN_ROUNDS / max(call_seconds, 1e-9))))
    rounds = int(bound / (repeats * max(call_seconds, 1e-9)))
    return min(MAX_ROUNDS, max(MIN_ROUNDS, rounds)), repeats


def measure(call: Callable[[], object], clock: Clock, bound: float) -> Timing:
    """`call`, many times, in about `bound` seconds; its first calls are not counted."""

    def run(repeats: int) -> float:
        start = clock.mark()
        for _ in range(repeats):
            call()
        return clock.seconds(start, clock.mark())

    run(1)  # builds what is built once
    rounds, repeats = plan(min(run(1), run(1)), bound)
    run(repeats)  # a round to get the clocks of an idle device up
    found = [run(repeats) / repeats for _ in range(rounds)]
    return Timing(statistics.median(found), rounds, repeats)


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    clock: Clock,
    bound: float,
    around: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
) -> dict[str, list[float]]:
    """Seconds a call of each contestant in each round, in about `bound` seconds; whose turn comes
    first changes. First calls are not counted, nor is entering the context of a contestant's turn,
    around(name)."""

    def timed(name: str, repeats: int) -> float:
        with around(name):
            start = clock.mark()
            for _ in range(repeats):
                calls[name]()
            return clock.seconds(start, clock.mark()) / repeats

    plans = {}
    for name in calls:
        timed(name, 1)
        plans[name] = plan(min(timed(name, 1), timed(name, 1)), bound / len(calls))
        timed(name, plans[name][1])
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(min(rounds for rounds, _ in plans.values())):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(timed(name, plans[name][1]))
    return found
