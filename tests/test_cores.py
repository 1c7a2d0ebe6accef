"""A team's threads run on cores of their own, also where the system has put two on one."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Both threads begin each call on one core and may leave it; OpenMP's thread is asleep then. While
# they share it, the caller gives it up to the other at every second step's barrier.
PROGRAM = """
import os, resource, time
import torch, fusedrnn

cores = os.sched_getaffinity(0)
first = min(cores)
torch.set_num_threads(2)
net = fusedrnn.LSTM(128, 128)
x = torch.randn(100, 1, 128)
before = set(os.listdir("/proc/self/task"))
with torch.no_grad():
    net(x)
(worker,) = set(os.listdir("/proc/self/task")) - before
threads = [os.getpid(), int(worker)]
for _ in range(15):
    for allowed in ({first}, cores):
        for thread in threads:
            os.sched_setaffinity(thread, allowed)
        time.sleep(0.02)
    turns = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
    with torch.no_grad():
        net(x)
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw - turns)
    for thread in threads:
        assert os.sched_getaffinity(thread) == cores
"""


@pytest.mark.alone
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
def test_a_thread_leaves_its_callers_core() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert statistics.median(map(int, done.stdout.split())) < 20
