"""Forks under load, many threads in every op at once, and two processes that write to one place."""

from __future__ import annotations

import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from calls import WORK
from campaign import Attack, Trial
from commands import DISTILL, copy, difference, expected_files, files, fill, make_ready, start

import sdw_fast as sdw

# Two commands that write to one place; with other settings only one of them can have it.
PAIRS = [
    (f"{DISTILL} --checkpoint-every 1 --seed 0 --out run", f"{DISTILL} --checkpoint-every 1 --seed 1 --out run"),
    (f"{DISTILL} --checkpoint-every 1 --out run", f"{DISTILL} --checkpoint-every 1 --out run"),
    ("collect hopper/medium --steps 40 --seed 0", "collect hopper/medium --steps 40 --seed 1"),
    ("collect hopper/medium --steps 40", "collect hopper/medium --steps 40"),
    ("density data.npz --k 3 --out logd.npy --json", "density data.npz --k 4 --out logd.npy --json"),
    ("train-teacher data.npz --steps 2 --out t.safetensors", "train-teacher data.npz --steps 3 --out t.safetensors"),
]


def forks(folder: Path, seed: int) -> Trial:
    """A fork while three threads compute; the child calls every op."""
    torch.set_num_threads(1)
    sdw.set_num_threads(2)
    expected = [work() for work in WORK]

    def compute(stop: threading.Event) -> None:
        while not stop.is_set():
            for work in WORK[1:4]:
                work()

    def trial(number: int) -> str | None:
        stop = threading.Event()
        others = [threading.Thread(target=compute, args=[stop]) for _ in range(3)]
        for other in others:
            other.start()
        try:
            child = os.fork()
            if child == 0:
                status = 2
                try:
                    status = int(not all(torch.equal(work(), x) for work, x in zip(WORK, expected, strict=True)))
                finally:
                    os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finally:
            stop.set()
            for other in others:
                other.join()
        assert status in (0, 1), status
        return "another answer in the child" if status else None

    return trial


def eight_threads(folder: Path, seed: int) -> Trial:
    """Every op in eight threads at once, each in an order of its own."""
    torch.set_num_threads(1)
    sdw.set_num_threads(2)
    expected = {work: work() for work in WORK}

    def all_right(order: int) -> bool:
        works = random.Random(order).sample(WORK, len(WORK))
        return all(torch.equal(work(), expected[work]) for work in works)

    def trial(number: int) -> str | None:
        with ThreadPoolExecutor(8) as pool:
            orders = range(1000 * seed + 8 * number, 1000 * seed + 8 * number + 8)
            return None if all(pool.map(all_right, orders)) else "another answer in a thread"

    return trial


def two_processes(folder: Path, seed: int) -> Trial:
    """Two commands that write to one place: what is there in the end is of one of them, whole."""
    make_ready()
    before = fill(folder / "before")
    expected = {command: expected_files(before, command) for pair in PAIRS for command in pair}

    def trial(number: int) -> str | None:
        pair = PAIRS[number % len(PAIRS)]
        at = copy(before, folder / "shared")
        try:
            ends = [running.finish() for running in [start(at, command) for command in pair]]
            for command, end in zip(pair, ends, strict=True):
                assert end.fault() is None, (command, end)
            assert any(end.status == 0 for end in ends), ends
            found = {name: content for name, content in files(at).items() if ".sdw_cache" not in name}
            done = [command for command, end in zip(pair, ends, strict=True) if end.status == 0]
            for command in done:
                whole = {name: content for name, content in expected[command].items() if ".sdw_cache" not in name}
                # the pictures of a density are files of their own
                if all(difference({n: found.get(n)}, {n: x}) is None for n, x in whole.items() if n[-4:] != ".png"):
                    return None if found.keys() == whole.keys() else f"left over: {found.keys() ^ whole.keys()}"
            return f"the files of {done} are not there"
        finally:
            shutil.rmtree(at)

    return trial


ATTACKS = [
    Attack("fork while three threads compute", forks, trials=200),
    Attack("eight threads, every op at once", eight_threads, trials=60),
    Attack("two processes, one place", two_processes, trials=60),
]
