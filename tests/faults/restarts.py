"""SIGKILL of a rank under `torchrun --max-restarts`: the run goes on by itself, to the files of one left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from campaign import Attack, Trial
from commands import DISTILL, copy, difference, files, fill, make_ready

import sdw_fast as sdw

SIZES = (2, 3)  # ranks, by turns
_STEPS = f"{DISTILL.replace('--steps 3', '--steps 200')} --checkpoint-every 20 --out run"


def torchrun(folder: Path, size: int, restarts: int) -> subprocess.Popen[str]:
    """Starts the command on `size` ranks of this machine."""
    options = f"--standalone --nproc-per-node {size} --max-restarts {restarts} --monitor-interval 0.1"
    command = [sys.executable, "-m", "torch.distributed.run", *options.split(), "-m", "sdw_fast", *_STEPS.split()]
    package = str(Path(sdw.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def finished(running: subprocess.Popen[str]) -> None:
    said = running.communicate()[1]
    assert running.returncode == 0, (running.returncode, said[-2000:])


def children(process: int) -> list[int]:
    """The processes that a process has started and that still run."""
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def kill_one(running: subprocess.Popen[str], size: int, delay: float, choose: Callable[[list[int]], int]) -> bool:
    """Kills one of the ranks so many seconds after they were started; whether they were still there."""
    while len(children(running.pid)) < size and running.poll() is None:
        time.sleep(0.01)
    time.sleep(delay)
    ranks = children(running.pid)
    if not ranks:
        return False
    os.kill(choose(ranks), signal.SIGKILL)
    return True


def killing_a_rank(folder: Path, seed: int) -> Trial:
    make_ready()
    before = fill(folder / "before")
    expected, seconds = {}, {}
    for size in SIZES:
        whole = copy(before, folder / f"whole-{size}")
        began = time.monotonic()
        finished(torchrun(whole, size, 0))
        expected[size], seconds[size] = files(whole), time.monotonic() - began

    def trial(number: int) -> str | None:
        chance, size = random.Random(1000 * seed + number), SIZES[number % len(SIZES)]
        at, killed = folder / "killed", False
        while not killed:  # a run that ended before its time is none
            copy(before, at)
            try:
                running = torchrun(at, size, 3)
                killed = kill_one(running, size, chance.uniform(0, seconds[size]), chance.choice)
                finished(running)
                different = difference(files(at), expected[size])
            finally:
                shutil.rmtree(at)
        return different

    return trial


ATTACKS = [Attack("SIGKILL of a rank under torchrun", killing_a_rank, trials=20, patience=600.0)]
