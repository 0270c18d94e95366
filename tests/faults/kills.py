"""Kills at every file event of a command: run again, it ends in the files of one that was left alone. And its folder
deleted there: it says so in one sentence.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaign import Attack, NoMoreTrials, Trial
from commands import COMMANDS, copy, difference, expected_files, files, fill, make_ready, run

_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def at_event(event: int, folder: Path, mishap: Callable[[], Any]) -> None:
    """Has a mishap befall this process just before the n-th change of a folder that Python makes, or flush to the disk.

    What lies between two of them is the writing of one open file; a flush comes when it ends.
    """
    passed = 0

    def count() -> None:
        nonlocal passed
        passed += 1
        if passed == event + 1:
            mishap()

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        if name not in _EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if name == "open" and not (arguments[2] or 0) & _WRITING:
            return
        path = os.fsdecode(arguments[0])
        if path.startswith(str(folder)) or not os.path.isabs(path):  # commands are run inside the folder
            count()

    fsync = os.fsync

    def counted(descriptor: int) -> None:
        fsync(descriptor)
        count()

    os.fsync = counted
    sys.addaudithook(audit)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killing(name: str) -> Callable[[Path, int], Trial]:
    """A kill of a command at the event of the trial's number."""

    def prepare(folder: Path, seed: int) -> Trial:
        make_ready()
        before = fill(folder / "before")
        expected = expected_files(before, COMMANDS[name])

        def trial(number: int) -> str | None:
            at = copy(before, folder / "killed")
            try:
                ended = run(at, COMMANDS[name], lambda: at_event(number, at, kill))
                if ended.status == 0:
                    raise NoMoreTrials
                assert ended.status == -signal.SIGKILL, ended
                again = run(at, COMMANDS[name])
                assert again.status == 0, again
                return difference(files(at), expected)
            finally:
                shutil.rmtree(at)

        return trial

    return prepare


def deleting(folder: Path, seed: int) -> Trial:
    """The folder of a command deleted at an event: commands by turns, events from the first on."""
    make_ready()
    before = fill(folder / "before")
    at = folder / "deleted"

    def trial(number: int) -> str | None:
        name = list(COMMANDS)[number % len(COMMANDS)]
        copy(before, at)
        try:
            ended = run(at, COMMANDS[name], lambda: at_event(number // len(COMMANDS), at, lambda: shutil.rmtree(at)))
        finally:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(at)
        assert ended.fault() is None, (name, number, ended)
        return None

    return trial


ATTACKS = [
    *(Attack(f"kill at a file event of {name}", killing(name), trials=2000) for name in COMMANDS),
    Attack("folder deleted at a file event", deleting, trials=200),
]
