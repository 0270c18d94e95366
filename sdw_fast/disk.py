"""The disk: files and folders replaced whole, leftovers of killed processes, locks that end with theirs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import filecmp
import itertools
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

PathLike = str | os.PathLike[str]

_numbers = itertools.count()  # two threads may write one file at once
_unfinished: set[Path] = set()  # temporary names that this process writes under


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, of the same suffix, that takes its place when the block ends well.

    A reader sees the old file or the whole new one; an error or a kill leaves the old one, a power failure too. A file
    that would stay the same is left alone. The folder is made, and what a killed process left under such names is
    removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in leftovers(path):
        left.unlink(missing_ok=True)
    with temporary_beside(path) as temporary:
        try:
            with naming(path):
                yield temporary
                if path.is_file() and filecmp.cmp(temporary, path, shallow=False):
                    return
                _to_disk(temporary)
                temporary.replace(path)
                _to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Has an error of the system name the file, which a write to a full disk does not, or does by a hidden name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
            del error.filename2  # None would be shown
        raise


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A hidden name beside `path`, by which `leftovers` knows whether its writer still lives."""
    name = f".{path.stem}~{socket.gethostname()}~{os.getpid()}~{next(_numbers)}{path.suffix}"
    temporary = path.with_name(name).absolute()
    _unfinished.add(temporary)
    try:
        yield temporary
    finally:
        _unfinished.discard(temporary)


def leftovers(path: Path) -> list[Path]:
    """What killed processes of this machine left beside `path` under temporary names."""
    own = re.compile(rf"\.{re.escape(f'{path.stem}~{socket.gethostname()}')}~(\d+)~\d+{re.escape(path.suffix)}")
    names = [(own.fullmatch(other.name), other.absolute()) for other in path.parent.iterdir()]
    return [other for match, other in names if match and other not in _unfinished and not _lives(int(match[1]))]


def _lives(process: int) -> bool:
    """Whether another process of this number runs; what this one writes is in `_unfinished`."""
    if sys.platform == "win32":  # where os.kill ends any process
        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, process)  # PROCESS_QUERY_LIMITED_INFORMATION
        if handle:
            ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle) and process != os.getpid()
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return process != os.getpid()


def _to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power failure."""
    if sys.platform == "win32" and path.is_dir():  # not to be opened there
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing_folder(target: Path, overwrite: bool = True) -> Iterator[Path]:
    """As `replacing`, of a folder: the old one is kept aside until the new one is in its place.

    Raises:
        FileExistsError: it is not to be overwritten, and there is one by the time that the block ends.
    """
    with temporary_beside(target) as temporary:
        try:
            new = temporary / "new"
            new.mkdir(parents=True)
            yield new
            for path in new.rglob("*"):
                _to_disk(path)
            if overwrite and target.exists():
                target.rename(temporary / "replaced")
            try:
                new.rename(target)
            except OSError as error:
                if target.exists():  # the system says that it is not empty
                    raise FileExistsError(error.errno, "is there already", str(target)) from error
                raise
            _to_disk(target.parent)
        finally:
            _put_back(target, temporary)


def recover_folder(target: Path) -> None:
    """Clears what killed processes left beside a folder, and puts it back where one was cut off between two renames."""
    for left in leftovers(target) if target.parent.is_dir() else ():
        _put_back(target, left)


def _put_back(target: Path, temporary: Path) -> None:
    if (temporary / "replaced").exists() and not target.exists():
        (temporary / "replaced").rename(target)
    shutil.rmtree(temporary, ignore_errors=True)


def reserve(folder: Path, size: int) -> None:
    """Raises OSError where `folder` has no room for `size` bytes; HDF5 brings the process down when a disk is full."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with temporary_beside(folder / "room") as temporary:
        try:
            with temporary.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(error.errno, f"no room for {size / 2**20:.0f} MiB: {error.strerror}", str(folder)) from error
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: PathLike) -> None:
    """Raises OSError now where a file could not be written hours later; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is in the way of the file", str(path))
    with naming(path), temporary_beside(path) as temporary:
        temporary.touch(exist_ok=False)
        temporary.unlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a folder, or the name of a file, for this process. The lock ends with the process, however it ends.

    Raises:
        BlockingIOError: another one holds it; the sentence names it.
    """
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    with lock.open("a+", encoding="utf-8") as file:
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise BlockingIOError(
                f"{path} is in use by {holder}: wait for it or stop it, or write somewhere else"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            if lock.parent != path:  # a folder keeps its lock
                lock.unlink(missing_ok=True)


def _lock(file: IO[str]) -> None:
    """Raises BlockingIOError where another process holds the file."""
    if sys.platform == "win32":  # locks bytes, which no one can read then: one far behind what is written
        file.seek(1 << 30)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from None
        file.seek(0)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
