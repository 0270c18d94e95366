"""The process group that torchrun asks for: a start finds its own processes, whatever an earlier one left behind."""

from __future__ import annotations

import multiprocessing
import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sdw_fast import ranks


def _rank(environment: dict[str, str], delay: float, answers: Any) -> None:
    """A process as torchrun starts it, with its sum over all ranks; it ends as one that was killed."""
    time.sleep(delay)
    torch.set_num_threads(1)
    os.environ.update(environment)
    with ranks.process_group():
        total = ranks.Ranks().reduce(torch.tensor(float(environment["RANK"]) + 1), "sum")
        answers.put((int(environment["RANK"]), float(total)))
        answers.close()
        answers.join_thread()
        os._exit(0)


def _start(port: int, delays: list[float]) -> list[tuple[int, float]]:
    """What every rank of a start found out, each of which begins after a delay."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(delays))}
    shared |= {"TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = [
        context.Process(target=_rank, args=({**shared, "RANK": str(rank)}, delay, answers))
        for rank, delay in enumerate(delays)
    ]
    for process in started:
        process.start()
    try:
        return sorted(answers.get(timeout=30) for _ in started)
    finally:
        for process in started:
            process.kill()
            process.join()


def test_a_second_start_by_the_same_store_does_not_meet_the_processes_of_the_first() -> None:
    """torchrun keeps its store over restarts: whoever comes before the first rank finds the address of a dead one."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    for delays in ([0.0, 0.0, 0.0], [0.5, 0.0, 0.2], [0.0, 0.5, 0.0]):
        assert _start(store.port, delays) == [(0, 6.0), (1, 6.0), (2, 6.0)]
