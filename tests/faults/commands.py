"""The commands, on tiny data: each run in a forked child, which may be limited, killed or alone."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sdw_fast as sdw
from sdw_fast.cli import app

DISTILL = "distill data.npz --objective dbc --size 4 --hidden 4 --inner-steps 2 --batch-size 4 --steps 3"
COMMANDS = {
    "collect": "collect hopper/medium --steps 40",
    "density": "density data.npz --k 3 --out logd.npy --json",
    "train-teacher": "train-teacher data.npz --steps 2 --out teacher.safetensors",
    "distill": f"{DISTILL} --checkpoint-every 1 --out run",
    "plot": "plot done",
    "report": "report done",
    "evaluate": "evaluate done/best.npz --env Pendulum-v1 --clones 1 --episodes 2 > returns.txt",
}


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status, negative where a signal ended it, and what it said on standard error."""

    status: int
    said: str

    def fault(self) -> str | None:
        """What a user should not see: another end than well or with one sentence."""
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        if self.status == 0 or (self.status == 1 and len(lines) == 1 and "Traceback" not in self.said):
            return None
        return f"status {self.status}: {self.said[-500:]}"


def make_ready() -> None:
    """Imports what the commands import, so that children find it, and leaves one thread to fork from."""
    ours = ("sdw_fast.plots", "sdw_fast.report")
    for module in ("minari", "torchrl.objectives", "gymnasium.envs.classic_control", *ours):
        importlib.import_module(module)
    torch.set_num_threads(1)
    sdw.set_num_threads(1)


def fill(folder: Path) -> Path:
    """Makes a folder that holds a dataset and a finished run."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(60, 3))
    arrays = {"observations": observations, "actions": np.tanh(observations[:, :1]), "rewards": rng.normal(size=60)}
    folder.mkdir(parents=True)
    np.savez(folder / "data.npz", **arrays, terminals=np.zeros(60, bool), timeouts=np.arange(60) % 10 == 9)
    assert run(folder, f"{DISTILL} --out done").status == 0
    return folder


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@dataclass(frozen=True)
class Running:
    """A command under way: its process, and the end of the pipe that it writes to."""

    process: int
    said: int

    def finish(self) -> Ended:
        with open(self.said, encoding="utf-8", errors="replace") as said:
            text = said.read()
        return Ended(os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1]), text)


def start(folder: Path, command: str, before: Callable[[], Any] = lambda: None) -> Running:
    """Starts a command in a folder, after `before`. What it prints goes into the file after ">", as in a shell."""
    command, _, printed = command.partition(" > ")
    reading, writing = os.pipe()  # not a file, as that could be limited too
    process = os.fork()
    if process:
        os.close(writing)
        return Running(process, reading)
    status = 70  # of a child that fails here
    try:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        os.environ["MINARI_DATASETS_PATH"] = str(folder)
        before()
        try:
            if printed:
                os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        except OSError as error:  # a shell says so, and runs nothing
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from error
        app(command.split())
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            status = 120  # the interpreter's, where it could not print
        sys.stderr.flush()
        os._exit(status)


def run(folder: Path, command: str, before: Callable[[], Any] = lambda: None) -> Ended:
    """Runs a command in a folder, after `before`, in a child of this process."""
    return start(folder, command, before).finish()


def expected_files(before: Path, command: str) -> dict[str, Any]:
    """What a command that is left alone makes of a folder."""
    whole = copy(before, before.with_name("whole"))
    ended = run(whole, command)
    assert ended.status == 0, ended
    found = files(whole)
    shutil.rmtree(whole)
    return found


def files(folder: Path) -> dict[str, Any]:
    """What is in a folder, by name: the bytes of what is a result, and of the rest that it is there."""
    results = (".npz", ".npy", ".safetensors", ".hdf5", ".png", ".html", ".txt")
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.suffix in results else None
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The names under which two folders differ."""
    names = [name for name in one.keys() | other.keys() if one.get(name, 0) != other.get(name, 0)]
    return f"{', '.join(sorted(names))} differ from those of a run left alone" if names else None
