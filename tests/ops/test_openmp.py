"""The kernels in the threads of PyTorch's OpenMP runtime: no threads beside them, and the same bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sdw_fast.ops import knn

THREADS = 4

CALL = """
import os, torch
import sdw_fast as sdw
from sdw_fast.ops import behavior_matching

def threads():
    return len(os.listdir("/proc/self/task"))

def call():
    params = [torch.full((n, m), 0.01) if m else torch.zeros(n) for n, m in ((64, 8), (64, 0), (2, 64), (2, 0))]
    return behavior_matching(params, torch.ones(20_000, 8), torch.zeros(20_000, 2), torch.ones(20_000))

torch.set_num_threads(4)
"""
COUNT = (
    CALL
    + """
(torch.ones(1000, 1000) @ torch.ones(1000, 1000)).exp()  # PyTorch starts its threads
before = threads()
first = call()
shared = threads() - before
sdw.set_num_threads(3)
second = call()
assert torch.equal(first, second)
print(shared, threads() - before - shared)
"""
)


def run(program: str, **environment: str) -> str:
    others = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment = {**others, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernels have threads of their own")
def test_threads_are_pytorchs_unless_another_number_was_chosen() -> None:
    assert run(COUNT).split() == ["0", "2"]


def test_a_runtime_that_gives_fewer_threads() -> None:
    program = CALL + "print(call().item().hex())"
    limits = ({}, {"OMP_THREAD_LIMIT": "2"}, {"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true"})
    assert len({run(program, **limit) for limit in limits}) == 1


def test_calls_within_calls() -> None:
    """Halves of a tree are sorted in parallel by members of a team, in which the runtime gives no more threads."""
    points = torch.randn(150_000, 3, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, THREADS):
            torch.set_num_threads(threads)
            answers.append(knn(points, k=2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
