"""Disks that are full: a command ends well or in one sentence, and once there is room in the files that it should."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from campaign import Attack, Trial
from commands import COMMANDS, copy, difference, expected_files, files, fill, make_ready, run

# In the folder that it is given makes room for so many bytes; gives a folder to work in, what a child does first, and
# what makes more room.
Scarce = Callable[[Path, int], AbstractContextManager[tuple[Path, Callable[[], None], Callable[[], None]]]]


@contextlib.contextmanager
def limited_files(folder: Path, room: int) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """Every file of the child ends at a size: a write beyond it fails."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    folder.mkdir()
    try:
        yield folder / "work", limit, lambda: None
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def full_disk(folder: Path, room: int) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A small file system of its own (where this process may mount one), which another file fills."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)

    def fill_up() -> None:
        (folder / "other").write_bytes(bytes(max(0, shutil.disk_usage(folder).free - room)))

    try:
        yield folder / "work", fill_up, (folder / "other").unlink
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


@contextlib.contextmanager
def read_only_disk(folder: Path, room: int) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A file system of its own that cannot be written to while the command runs, whatever the room."""
    with full_disk(folder, room) as (work, _, _):
        (folder / "other").touch()
        remount = ["mount", "-o", "remount"]
        yield (
            work,
            lambda: subprocess.run([*remount, "-r", str(folder)], check=True),
            lambda: subprocess.run([*remount, "-w", str(folder)], check=True),
        )


def filling(scarce: Scarce) -> Callable[[Path, int], Trial]:
    """A command of the trial's number, with room for a drawn number of bytes."""

    def prepare(folder: Path, seed: int) -> Trial:
        make_ready()
        before = fill(folder / "before")
        expected = {name: expected_files(before, command) for name, command in COMMANDS.items()}

        def trial(number: int) -> str | None:
            name = list(COMMANDS)[number % len(COMMANDS)]
            room = int(np.exp(np.random.default_rng([seed, number]).uniform(np.log(64), np.log(1e6))))
            with scarce(folder / "disk", room) as (work, take_room, give_room):
                copy(before, work)
                ended = run(work, COMMANDS[name], take_room)
                assert ended.fault() is None, (name, room, ended)
                whole = {path: x for path, x in expected[name].items() if ".sdw_cache" not in path}  # may be left out
                left = files(work)
                give_room()
                again = run(work, COMMANDS[name])
                assert again.status == 0, (name, room, again)
                if ended.status == 0 and whole.items() - left.items():
                    return f"{name} with {room} bytes of room ended well without all of its files"
                return difference(files(work), expected[name])

        return trial

    return prepare


ATTACKS = [
    Attack(f"no room: {what.__name__.replace('_', ' ')}", filling(what), trials=rooms * len(COMMANDS))
    for what, rooms in ((limited_files, 16), (full_disk, 16), (read_only_disk, 1))
]
