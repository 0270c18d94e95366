"""Forked children compute: nothing that the parent has computed, or computes meanwhile, makes them wait for ever."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from calls import STATES, WORK, matching, neighbors, unrolled, weighted
from torch.utils.data import DataLoader, Dataset

from sdw_fast import get_num_threads, ops, set_num_threads

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork"),
    pytest.mark.skipif(
        "thread" in os.environ.get("SDW_SANITIZE", ""),
        reason="the thread sanitizer ends children of a process with threads that start threads of their own",
    ),
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]
SECONDS = 60  # for what takes a tenth of one


def flat_search() -> torch.Tensor:
    pytest.importorskip("faiss")
    return ops.knn(STATES[:2_000], k=3, backend="faiss")[0]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Two for PyTorch and two for the kernels, whatever the machine has."""
    before = torch.get_num_threads(), get_num_threads()
    torch.set_num_threads(2)
    set_num_threads(2)
    STATES.double().sort(0).values @ STATES.double().T[:, :500]  # PyTorch's threads are there now
    yield
    torch.set_num_threads(before[0])
    set_num_threads(before[1])


def is_true_in_a_child(check: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = int(not check())
        finally:
            os._exit(status)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"a forked child has not come to an end in {SECONDS} seconds")


@pytest.mark.parametrize("work", [*WORK, flat_search], ids=lambda work: work.__name__)
def test_the_same_again_in_a_child(work: Callable[[], torch.Tensor]) -> None:
    expected = work()
    assert is_true_in_a_child(lambda: torch.allclose(work(), expected, rtol=1e-5))
    assert is_true_in_a_child(lambda: is_true_in_a_child(lambda: torch.allclose(work(), expected, rtol=1e-5)))
    assert torch.allclose(work(), expected, rtol=1e-5)
    assert torch.get_num_threads() == 2  # of the parent


def test_forks_while_other_threads_compute() -> None:
    expected = [work() for work in WORK]
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            for work in (unrolled, matching, weighted):
                work()

    def check() -> bool:
        return all(torch.allclose(work(), x, rtol=1e-5) for work, x in zip(WORK[1:4], expected[1:4], strict=True))

    others = [threading.Thread(target=compute) for _ in range(3)]
    for other in others:
        other.start()
    try:
        for _ in range(50):
            assert is_true_in_a_child(check)
    finally:
        done.set()
        for other in others:
            other.join()
    assert is_true_in_a_child(lambda: torch.equal(neighbors(), expected[0]))


class Neighborhoods(Dataset):
    """Distances within a part of the states, found when the part is asked for."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, part: int) -> torch.Tensor:
        return ops.knn(STATES[part * 5_000 : part * 5_000 + 5_000], k=3)[0]


def test_workers_of_a_data_loader() -> None:
    here = list(DataLoader(Neighborhoods(), batch_size=None))
    loader = DataLoader(
        Neighborhoods(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SECONDS
    )
    for found, expected in zip(loader, here, strict=True):
        torch.testing.assert_close(found, expected)
