"""Paired, interleaved timing.

Two programs are compared inside one process, in turns, and by the ratio of each round: whatever
slows the machine for a while slows both. Before each timed block the thread sleeps and makes one
untimed call, as another runtime's threads, which still spin after their last call, otherwise slow
whoever comes next by up to 2.5 times; those that spin for long are given a longer rest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SETTLE_SECONDS = 0.02
MIN_ROUNDS = 9
# Of calls in a block: after a rest the first ones find cold caches and sleeping threads.
MIN_BLOCK_SECONDS = 0.02

Call = Callable[[], object]


@dataclass(frozen=True)
class Plan:
    rounds: int
    repeats: dict[str, int]  # timed calls in a block of each contestant


def time_block(call: Call, repeats: int, rest: float = SETTLE_SECONDS) -> float:
    """Seconds per call, after a rest."""
    time.sleep(rest)
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def plan(
    call_seconds: Mapping[str, float], rounds: int, bound: float, rests: Mapping[str, float] = {}
) -> Plan:
    """Fit `rounds` rounds of all contestants into about `bound` seconds.

    Each gets an equal share of a round, so a quick one makes more calls. Where even the shortest
    blocks do not fit, rounds are given up, down to MIN_ROUNDS; below that the bound gives way.
    """
    resting = sum(rests.get(name, SETTLE_SECONDS) for name in call_seconds)
    least = resting + sum(max(2 * s, MIN_BLOCK_SECONDS) for s in call_seconds.values())
    rounds = max(min(rounds, MIN_ROUNDS), min(rounds, int(bound / least)))
    share = max((bound / rounds - resting) / len(call_seconds), MIN_BLOCK_SECONDS)
    # minus one: the untimed call costs as much as a timed one
    repeats = {name: max(1, int(share / s) - 1) for name, s in call_seconds.items()}
    return Plan(rounds, repeats)


def paired(
    calls: Mapping[str, Call], rounds: int, bound: float, rests: Mapping[str, float] = {}
) -> dict[str, list[float]]:
    """Seconds per call of each contestant in each round; round i is comparable across them.

    `rests`: the seconds to wait after a contestant, where SETTLE_SECONDS are not enough.
    """
    guess = {}
    for name, call in calls.items():
        call()  # the first call of all may build things
        guess[name] = time_block(call, 1)
        if guess[name] < SETTLE_SECONDS:  # short calls vary more
            again = max(3, int(MIN_BLOCK_SECONDS / guess[name]))
            guess[name] = min(guess[name], time_block(call, again))
        time.sleep(rests.get(name, 0.0))
    how = plan(guess, rounds, bound, rests)
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    # The guess was made in an instant: on a machine that has got busy since, the clock decides.
    deadline = time.perf_counter() + 1.5 * bound
    rest = SETTLE_SECONDS
    for number in range(how.rounds):
        if number >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        # Who goes first changes, so that nobody always follows the same neighbour.
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(time_block(calls[name], how.repeats[name], rest))
            rest = rests.get(name, SETTLE_SECONDS)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of time(name) / time(base): above 1, base is the faster one."""
    pairs = zip(seconds[name], seconds[base], strict=True)
    return statistics.median(a / b for a, b in pairs)
