"""Cells of a study shared out among processes on any number of machines, by files in a folder that all of them see.

A claim is a file that only one process can make. Its holder renews it every minute while it works, and takes it away
when it is done. One that was not renewed for ten minutes is that of a dead process, or of a machine that is cut off: it
has lapsed, and the next process claims the cell by the file of the next number. The clocks of the machines must agree
to some minutes.

What is done is not said by the claims: look for a cell's result after it was claimed, for another process may have
finished it just before.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

RENEWED = 60.0  # seconds between two renewals
LAPSED = 600.0  # seconds after the last one when a claim is nobody's


@contextlib.contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Claims a cell for the time of the block, and gives whether it could be had.

    Args:
        folder: for the claims, on a disk that all processes share; made if it is not there.
        name: of the cell; slashes are allowed.
    """
    file = _claim(folder, name.replace("/", "~"))
    if file is None:
        yield False
        return
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEWED):
            with contextlib.suppress(OSError):  # a server that is away for a while
                os.utime(file)

    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield True
    finally:
        done.set()
        renewing.join()
        for older in _files(folder, file.stem):
            if _number(older) <= _number(file):  # a higher one is of a process that took us for dead
                older.unlink(missing_ok=True)


def _claim(folder: Path, stem: str) -> Path | None:
    """The file by which a cell is claimed now; None where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = _files(folder, stem)
    if not all(map(_has_lapsed, held)):
        return None
    file = folder / f"{stem}.{max(map(_number, held), default=-1) + 1}"
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return None
    with os.fdopen(descriptor, "w") as claim:
        json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": time.ctime()}, claim)
    # What was seen before may have been given back since, and claimed again from the first number on.
    if all(_has_lapsed(other) for other in _files(folder, stem) if _number(other) < _number(file)):
        return file
    file.unlink()
    return None


def _files(folder: Path, stem: str) -> list[Path]:
    return [path for path in folder.iterdir() if path.stem == stem and path.suffix[1:].isdigit()]


def _number(file: Path) -> int:
    return int(file.suffix[1:])


def _has_lapsed(file: Path) -> bool:
    try:
        return time.time() - file.stat().st_mtime > LAPSED
    except FileNotFoundError:  # given back just now
        return True
