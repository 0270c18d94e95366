"""Kills at every file event of a command: run once more, it ends in the files of a run that was left alone."""

from __future__ import annotations

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


def kill_at(event: int, folder: Path) -> None:
    """Has this process killed just before the n-th change of the folder that Python makes, or flush to the disk.

    What lies between two of them is the writing of one open file; a flush comes when it ends.
    """
    passed = 0

    def count() -> None:
        nonlocal passed
        if passed == event:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        if name not in _EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if name == "open" and not (arguments[2] or 0) & _WRITING:
            return
        if os.path.abspath(os.fsdecode(arguments[0])).startswith(str(folder)):
            count()

    fsync = os.fsync

    def counted(descriptor: int) -> None:
        fsync(descriptor)
        count()

    os.fsync = counted
    sys.addaudithook(audit)


def killing(name: str) -> Callable[[Path, int], Trial]:
    """A kill of a command at the event of the trial's number."""

    def prepare(folder: Path, seed: int) -> Trial:
        make_ready()
        before = fill(folder / "before")
        expected = expected_files(before, COMMANDS[name])

        def trial(number: int) -> str | None:
            at = copy(before, folder / "killed")
            try:
                ended = run(at, COMMANDS[name], lambda: kill_at(number, at))
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


ATTACKS = [Attack(f"kill at a file event of {name}", killing(name), trials=2000) for name in COMMANDS]
