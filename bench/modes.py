"""What is compared with whom, and what it should reach: one Mode for each line of the summary.

A mode's calls are its contestants; every ratio is a contestant's time / fusedrnn's. Where fusedrnn
meets another form of itself (dense rows, float32), that form is a contestant like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from . import cases, derivatives, limits, peers
from .shapes import CELLS, SHAPES, Shape, shapes
from .timing import Call

BEST = "the quickest peer"  # shape by shape


@dataclass(frozen=True)
class Goal:
    """Ratios to reach: the geometric mean over the shapes, and the worst shape."""

    against: str  # a contestant, or BEST
    mean: float | None
    worst: float


@dataclass(frozen=True)
class Mode:
    shapes: tuple[Shape, ...]
    calls: Callable[..., dict[str, Call]]  # (cell, shape), and (peers, threads) where it says so
    goals: dict[str, tuple[Goal, ...]]  # by cell: the cells that take part
    with_peers: bool = False  # other runtimes than torch take part


ONE_STEP = shapes(*(f"{b},1,{h},{h}" for b in (1, 8, 64) for h in (64, 256, 512)), "3,1,100,200")
RAGGED = shapes("32,100,128,128", "64,200,64,256", "32,50,256,256", "128,100,256,256")
STACKED = shapes(
    "1,100,64,64", "1,100,256,256", "8,100,128,128", "32,50,256,256", "32,100,512,512",
    "16,500,128,64",
)  # fmt: skip
HALF = shapes(
    "1,1,64,64", "1,100,64,64", "1,100,256,256", "1,100,512,512", "8,100,128,128",
    "32,50,256,256", "32,100,512,512", "16,500,128,64",
)  # fmt: skip


def same(goal: Goal, cells: tuple[str, ...] = CELLS) -> dict[str, tuple[Goal, ...]]:
    return dict.fromkeys(cells, (goal,))


GATED = ("lstm", "gru")
ONE_STEP_GOALS = same(Goal(peers.TORCH, 2.5, 1.3))
EQUAL_GOALS = same(Goal(cases.DENSE, None, 1 / 1.1), GATED)
UNIFORM_GOALS = dict.fromkeys(
    GATED, (Goal(cases.DENSE, None, 1 / 0.6), Goal(cases.PACKED, None, 1.0))
)
HALF_GOALS = dict.fromkeys(
    GATED, (Goal(cases.FLOAT32, None, 1 / 1.1), Goal(cases.TORCH_HALF, None, 1.0))
)

LARGE = shapes("64,50,1024,1024", "32,100,512,512")
BATCHED = shapes("4,100,256,256", "16,500,128,64", "32,50,256,256", "128,100,256,256")
BATCHED_AND_ONE = (*shapes("1,100,64,64", "1,100,256,256", "1,100,512,512"), *BATCHED)
LARGE_GOALS = same(Goal(limits.SGEMM, None, 0.85))
# No slower than itself: identical code reads 0.95 at times.
BATCH_FIRST_GOALS = same(Goal(limits.TIME_MAJOR, None, 0.95), GATED)
THREADS_GOALS = same(Goal(limits.ONE_THREAD, None, 0.95), GATED)
DENORMAL_GOALS = same(Goal(limits.ORDINARY, None, 1 / 1.5), GATED)

DERIVED = shapes("1,100,64,64", "8,100,128,128", "32,50,256,256", "16,500,128,64")
DERIVED_GOAL = Goal(peers.TORCH, None, 1.0)

# A third more time, as of any network whose forward pass is made twice.
RECOMPUTE_GOALS = same(Goal(cases.KEPT, None, 0.75), GATED)

STREAM = shapes(*(f"1,1,{h},{h}" for h in (64, 128, 256, 512)))
LATENCY = shapes("1,100,256,256", "1,100,512,512", "1,100,1024,1024")

MODES = {
    "forward": Mode(
        SHAPES,
        cases.forward_calls,
        {
            "lstm": (Goal(BEST, 1.6, 0.95),),
            "gru": (Goal(BEST, 2.1, 0.95),),
            "rnn": (Goal(BEST, 1.6, 0.95),),
        },
        with_peers=True,
    ),
    "training": Mode(
        SHAPES,
        cases.training_calls,
        {
            "lstm": (Goal(peers.TORCH, 2.2, 1.15),),
            "gru": (Goal(peers.TORCH, 7.0, 1.4),),
            "rnn": (Goal(peers.TORCH, 4.0, 1.2),),
        },
    ),
    "large": Mode(LARGE, partial(limits.sgemm_calls, train=False), LARGE_GOALS),
    "large-training": Mode(LARGE, partial(limits.sgemm_calls, train=True), LARGE_GOALS),
    "cell-forward": Mode(ONE_STEP, partial(cases.cell_calls, train=False), ONE_STEP_GOALS),
    "cell-training": Mode(ONE_STEP, partial(cases.cell_calls, train=True), ONE_STEP_GOALS),
    "bidirectional-training": Mode(
        STACKED, cases.bidirectional_training, same(Goal(peers.TORCH, 2.0, 1.1), GATED)
    ),
    "equal-lengths": Mode(
        RAGGED, partial(cases.ragged_calls, train=False, uniform=False), EQUAL_GOALS
    ),
    "equal-lengths-training": Mode(
        RAGGED, partial(cases.ragged_calls, train=True, uniform=False), EQUAL_GOALS
    ),
    "uniform-lengths": Mode(
        RAGGED, partial(cases.ragged_calls, train=False, uniform=True), UNIFORM_GOALS
    ),
    "uniform-lengths-training": Mode(
        RAGGED, partial(cases.ragged_calls, train=True, uniform=True), UNIFORM_GOALS
    ),
    "bfloat16": Mode(HALF, partial(cases.half_calls, train=False), HALF_GOALS),
    "bfloat16-training": Mode(HALF, partial(cases.half_calls, train=True), HALF_GOALS),
    "batch-first": Mode(BATCHED, partial(limits.batch_first_calls, train=False), BATCH_FIRST_GOALS),
    "batch-first-training": Mode(
        BATCHED, partial(limits.batch_first_calls, train=True), BATCH_FIRST_GOALS
    ),
    "two-threads": Mode(SHAPES, partial(limits.thread_calls, train=False), THREADS_GOALS),
    "two-threads-training": Mode(SHAPES, partial(limits.thread_calls, train=True), THREADS_GOALS),
    "denormals": Mode(BATCHED, partial(limits.denormal_calls, train=False), DENORMAL_GOALS),
    "denormals-training": Mode(BATCHED, partial(limits.denormal_calls, train=True), DENORMAL_GOALS),
    "gradient-penalty": Mode(DERIVED, derivatives.penalty_calls, same(DERIVED_GOAL)),
    "tangents": Mode(DERIVED, derivatives.tangent_calls, same(DERIVED_GOAL, ("gru", "rnn"))),
    "recompute-training": Mode(BATCHED_AND_ONE, cases.recompute_calls, RECOMPUTE_GOALS),
    "stream": Mode(STREAM, cases.stream_step, same(Goal(BEST, None, 1.0)), with_peers=True),
    "stream-bfloat16": Mode(
        LATENCY,
        partial(cases.stream_narrow, weights=torch.bfloat16),
        same(Goal(cases.FLOAT32, None, 1.6), GATED),
    ),
    "stream-int8": Mode(
        LATENCY,
        partial(cases.stream_narrow, weights=torch.int8),
        same(Goal(cases.FLOAT32, None, 2.5), GATED),
    ),
}
