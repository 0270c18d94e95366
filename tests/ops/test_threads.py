"""Many threads in the kernels at a time, with Python's global lock and, on a free-threaded Python, without it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from calls import WORK
from oracle import random_problem

from sdw_fast.ops import unrolled_bc, weighted_bc_loss

THREADS = 6


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a global lock")
def test_an_import_does_not_switch_the_global_lock_on() -> None:
    program = "import sys; from sdw_fast import _C; sys.exit(sys._is_gil_enabled())"
    same_packages = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=same_packages)


def test_calls_of_all_ops_side_by_side_are_those_of_one_thread() -> None:
    alone = [work() for work in WORK]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda work: work(), WORK * 4))
    assert all(torch.equal(x, y) for x, y in zip(together, alone * 4, strict=True))


@pytest.mark.parametrize("op", ["unrolled_bc", "weighted_bc_loss"])
def test_threads_that_go_back_through_one_result_get_the_same_gradient(op: str) -> None:
    observations, actions, params = random_problem((5, 8, 2), 20, seed=0, dtype=torch.float32)
    actions.requires_grad_()
    if op == "unrolled_bc":
        loss = unrolled_bc(observations, actions, params, steps=5, lr=0.1)[0].square().sum()
    else:
        loss = weighted_bc_loss(actions, torch.zeros(20, 2), torch.ones(20))
    at_once = Barrier(THREADS)

    def gradient(_: int) -> torch.Tensor:
        at_once.wait()
        return torch.autograd.grad(loss, actions, retain_graph=True)[0]

    with ThreadPoolExecutor(THREADS) as pool:
        first, *others = pool.map(gradient, range(THREADS))
    assert first.abs().sum() > 0
    assert all(torch.equal(first, other) for other in others)
