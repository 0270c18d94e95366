"""Files: whole or not at all when written, checked when read, and what was computed once kept beside its dataset."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, of the same suffix, that takes its place when the block ends well.

    A reader sees the old file or the whole new one; an error or a kill leaves the old one. The folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a whole text file, UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_npz(path: str | os.PathLike[str], **arrays: np.ndarray) -> None:
    """Writes a whole `.npz` file."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads every array of a `.npz` file, unpickling nothing; raises whatever a damaged file makes its readers raise:
    zipfile, zlib, json and NumPy each have their own, so that callers catch Exception and say which file it was."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def computed_once(
    beside: Path | None,
    key: str,
    compute: Callable[[], dict[str, np.ndarray]],
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, Any]:
    """The arrays that `compute` returns, read from a cache if they were computed before.

    Args:
        beside: The dataset's folder or file, whose folder holds the cache `.sdw_cache`. None: nothing is cached.
        key: What is computed, from which content and with which options; its first word names the file.
        compute: Makes the arrays. A folder that cannot be written to only costs the next run its time.
        shapes: Those that a valid file has; any other file is computed again.
    """
    if beside is None:
        return compute()
    folder = beside if beside.is_dir() else beside.parent
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    file = folder / ".sdw_cache" / f"{key.split()[0]}-{digest}.npz"
    with contextlib.suppress(Exception):  # absent, truncated, not numbers, …: computing again is right in every case
        arrays = read_npz(file)
        if all(arrays[name].shape == shape and np.isfinite(arrays[name]).all() for name, shape in shapes.items()):
            return arrays
    arrays = compute()
    with contextlib.suppress(OSError):
        write_npz(file, **arrays)
    return arrays
