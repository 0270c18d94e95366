"""The process group that torchrun asks for: a start finds its own processes, whatever an earlier one left behind."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sdw_fast import heartbeat, ranks


def _torchrun(port: int, size: int) -> dict[str, str]:
    """What torchrun tells a process, but for its rank."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    started = {"TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {**address, **started}


def _store() -> dist.TCPStore:
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


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
    shared = _torchrun(port, len(delays))
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
    store = _store()
    for delays in ([0.0, 0.0, 0.0], [0.5, 0.0, 0.2], [0.0, 0.5, 0.0]):
        assert _start(store.port, delays) == [(0, 6.0), (1, 6.0), (2, 6.0)]


def _quiet_rank(environment: dict[str, str], words: Path) -> None:
    """A process that opens the group, writes what is said on standard error, and stays in it."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    heartbeat.BEAT_SECONDS, heartbeat.SILENT_SECONDS = 0.1, 0.6
    ranks.REPORT_SECONDS = 0.5
    ranks.MEETING_SECONDS = float(environment.get("MEETING", 30))
    with words.open("w", buffering=1) as sys.stderr:
        try:
            with ranks.process_group():
                time.sleep(30)
        except TimeoutError as error:
            print("TimeoutError:", error, file=sys.stderr)


def _heard(words: Path, expected: str, tenths: int = 300) -> bool:
    """Whether a process says it within half a minute."""
    for _ in range(tenths):
        if words.exists() and re.search(expected, words.read_text()):
            return True
        time.sleep(0.1)
    return False


def test_a_frozen_rank_is_named_and_one_that_goes_on_too(tmp_path: Path) -> None:
    store, context = _store(), multiprocessing.get_context("fork")
    started = [
        context.Process(target=_quiet_rank, args=({**_torchrun(store.port, 3), "RANK": rank}, tmp_path / rank))
        for rank in "012"
    ]
    try:
        for process in started:
            process.start()
        time.sleep(1)
        os.kill(started[2].pid, signal.SIGSTOP)
        assert _heard(tmp_path / "0", r"rank 2 of 3 has not been heard of for \d s"), (tmp_path / "0").read_text()
        os.kill(started[2].pid, signal.SIGCONT)
        assert _heard(tmp_path / "0", "rank 2 is heard of again")
        os.kill(started[0].pid, signal.SIGSTOP)
        assert _heard(tmp_path / "1", "rank 0 of 3 has not been heard of")
        assert "rank 1" not in (tmp_path / "0").read_text()
    finally:
        for process in started:
            process.kill()
            process.join()


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    store, context = _store(), multiprocessing.get_context("fork")
    environment = {**_torchrun(store.port, 3), "MEETING": "2"}
    started = [
        context.Process(target=_quiet_rank, args=({**environment, "RANK": rank}, tmp_path / rank)) for rank in "02"
    ]
    for process in started:
        process.start()
    try:
        assert _heard(tmp_path / "0", r"sdw_fast: rank 1 of 3 has not opened the process group after \d s")
        assert _heard(tmp_path / "0", "TimeoutError: rank 1 of 3 has not opened the process group after 2 s")
        assert not _heard(tmp_path / "2", "rank 0", tenths=1)
    finally:
        for process in started:
            process.kill()
            process.join()
