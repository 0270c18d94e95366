"""Files: whole or not at all when written, checked when read, and what was computed once kept beside its dataset.

Every binary file of ours ends in 64 hexadecimal digits, the BLAKE2b checksum of all bytes before them: the comment of a
zip archive (`.npz`, checkpoints), the last tensor of a `.safetensors` file. A JSON object of ours holds its checksum
under that name, of its values and not of how they are spaced. Other programs read the files as ever.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from sdw_fast.disk import PathLike, naming, replacing

_DIGITS = 64  # of a checksum, the last bytes of a file of ours
_END = 22  # bytes of the record that ends a zip archive, before its comment
_FOLDER = 0x10  # an attribute of a part of a zip archive
_LONGEST = 500  # characters of an error's sentence
_FOR_USERS = (ValueError, TypeError, OSError, FloatingPointError, ImportError)
_BLOCK = 1 << 20  # bytes hashed at a time
_CHECKSUM = "checksum"  # the tensor that ends a .safetensors file: of the smallest type, so that it lies last
_CHANGED = "its checksum does not fit: it was changed, or this version of sdw_fast did not write it"


# --- writing: whole or not at all -------------------------------------------------------------------------------------


def to_json(values: Any, *, indent: int | None = None) -> str:
    """JSON of plain values; what JSON has no number for (NaN, infinities) becomes null."""
    return json.dumps(_representable(values), indent=indent, allow_nan=False)


def _representable(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _representable(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_representable(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def sealed(values: Mapping[str, Any], beside: Path | None = None) -> dict[str, Any]:
    """The values of a JSON object, and under "checksum" theirs and, where one is named, that of a file's bytes."""
    return {**values, _CHECKSUM: _json_digest(values, beside)}


def unsealed(values: Mapping[str, Any], beside: Path | None = None) -> dict[str, Any]:
    """The values without their checksum. Raises ValueError where they are not what `sealed` was given."""
    plain = {name: value for name, value in values.items() if name != _CHECKSUM}
    if values.get(_CHECKSUM) != _json_digest(plain, beside):
        raise ValueError(_CHANGED)
    return plain


def _json_digest(values: Mapping[str, Any], beside: Path | None) -> str:
    digest = hashlib.blake2b(to_json(values).encode(), digest_size=_DIGITS // 2)
    if beside is not None:
        with beside.open("rb") as file:
            digest.update(_digest(file, file.seek(0, os.SEEK_END)))
    return digest.hexdigest()


def write_text(path: PathLike, text: str) -> None:
    """Writes a whole text file, UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_npz(path: PathLike, **arrays: np.ndarray) -> None:
    """Writes a whole `.npz` file with its checksum."""
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        _seal(temporary, is_zip=True)


def write_torch(path: PathLike, content: Any) -> None:
    """Writes what `torch.save` makes of tensors and plain containers, with its checksum."""
    buffer = io.BytesIO()  # PyTorch's own writing to a full disk raises RuntimeError("unexpected pos 64 vs 0")
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        _seal(temporary, is_zip=True)


def write_safetensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a whole `.safetensors` file with its checksum."""
    from safetensors.torch import save

    room = torch.zeros(_DIGITS, dtype=torch.uint8)
    with replacing(path) as temporary:  # save_file would make a file that only its owner can read
        temporary.write_bytes(save({**tensors, _CHECKSUM: room}, metadata))
        _seal(temporary, is_zip=False)


# --- reading: checked, and one kind of error --------------------------------------------------------------------------


def one_sentence(error: BaseException) -> str:
    """What an error says, on one line; with its kind, where that is not one of those made to be read by users."""
    said = " ".join(str(error).split())
    said = said if len(said) <= _LONGEST else said[:_LONGEST] + " …"
    if isinstance(error, MemoryError):
        return f"out of memory: {said}" if said else "out of memory"
    return said if said and isinstance(error, _FOR_USERS) else f"{type(error).__name__}: {said}".removesuffix(": ")


@contextlib.contextmanager
def damage_named(source: object, what: str, *passed: type[Exception], hint: str = "") -> Iterator[None]:
    """Turns whatever damage makes a source's readers raise into a ValueError that names it.

    A missing package or permission, a full disk and the kinds `passed` stay what they are.
    """
    kept: tuple[type[Exception], ...] = (PermissionError, ImportError, *passed)
    try:
        yield
    except kept:
        raise
    except Exception as error:  # zipfile, zlib, json, pickle, struct, NumPy, h5py and PyTorch each raise their own
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of a temporary file
            raise
        reason = one_sentence(error)
        raise ValueError(f"{source} is not a readable {what} (damaged or truncated?{hint}): {reason}") from error


@contextlib.contextmanager
def reading(path: Path, what: str, *, hint: str = "") -> Iterator[None]:
    """As `damage_named`, of a file. Raises FileNotFoundError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}")
    with damage_named(path, what, hint=hint):
        yield


def check_sum(path: Path) -> None:
    """Raises ValueError where a file does not end in the checksum of what it holds."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        checksum = _digest(file, size - _DIGITS)
        if size < _DIGITS or file.read() != checksum:
            raise ValueError(_CHANGED)


def _seal(path: Path, *, is_zip: bool) -> None:
    """Ends a file in its checksum: in a zip archive's comment, else in place of its last bytes."""
    with path.open("r+b") as file:
        if is_zip:  # the last two bytes say how long the comment is
            file.seek(-2, os.SEEK_END)
            file.write(_DIGITS.to_bytes(2, "little") + bytes(_DIGITS))
        checksum = _digest(file, file.seek(0, os.SEEK_END) - _DIGITS)
        file.write(checksum)


def _digest(file: IO[bytes], size: int) -> bytes:
    """The checksum of a file's first `size` bytes, where it is left standing."""
    digest = hashlib.blake2b(digest_size=_DIGITS // 2)
    file.seek(0)
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()


def check_zip(path: Path) -> None:
    """Raises where a part of a zip archive is not what its checksum (CRC) says, or all are more than memory holds."""
    with zipfile.ZipFile(path) as archive:
        _parts(archive)
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"its part {damaged} is damaged")


def _parts(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The parts of an archive, after what its directory says of them: no CRC covers that."""
    parts = archive.infolist()
    check_memory(sum(part.file_size for part in parts))
    assert archive.fp is not None  # it is open
    archive.fp.seek(-_END - len(archive.comment), os.SEEK_END)
    count = int.from_bytes(archive.fp.read(_END)[10:12], "little")
    if len(parts) & 0xFFFF != count and count != 0xFFFF:  # larger ones say it elsewhere
        raise ValueError(f"its directory is damaged: it lists {len(parts)} of {count} parts")
    if any(part.external_attr & _FOLDER for part in parts):  # PyTorch's reader would leave its numbers undefined
        raise ValueError("one of its parts is a folder")
    return parts


def check_memory(size: int) -> None:
    """Raises ValueError where a file says that it holds more bytes than are free."""
    free = _free_memory()
    if size > free:
        raise ValueError(f"it says that it holds {size / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB of memory are free")


def _free_memory() -> int:
    try:
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def room(shape: tuple[int, ...], dtype: Any, folder: Path | None) -> np.ndarray:
    """An array to be filled: in memory, or, given a folder, mapped from a temporary file there that ends with it.

    Raises:
        OSError: the folder cannot be written to, or the disk has no room.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if folder is None or size == 0:
        return np.empty(shape, dtype)
    with naming(folder), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # else a full disk would end the process, when it writes to the map
            os.posix_fallocate(file.fileno(), 0, size)
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))


def read_folder(folder: Path, wanted: Collection[str]) -> dict[str, Any]:
    """The wanted arrays of a folder of `.npy` files, by the names of these, and None for the others.

    They are memory maps, each page a copy of its own once it is written to: the files stay as they are.
    """
    return {
        file.stem: np.lib.format.open_memmap(file, mode="c") if file.stem in wanted else None
        for file in sorted(folder.glob("*.npy"))
    }


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads every array of an `.npz` file, ours or another's, unpickling nothing.

    Sizes are compared before memory is asked for. Raises whatever a damaged file makes its readers raise: see
    `reading`.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for part in _parts(archive):
            with archive.open(part) as file:  # compares the names in the archive's directory with those of its parts
                if not part.filename.endswith(".npy"):
                    continue
                _check_array(file, part.file_size)
            with archive.open(part) as file:  # read to its end, so that zipfile compares the CRC
                arrays[part.filename.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def _check_array(file: IO[bytes], size: int) -> None:
    """Raises ValueError where the header of a `.npy` file says another size than the file has."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    magic = np.lib.format.read_magic(file)
    if magic not in headers:
        raise ValueError(f"arrays of numbers have headers of version 1 or 2, not {magic}")
    shape, _, dtype = headers[magic](file)
    if dtype.hasobject:
        raise ValueError("save arrays of numbers, not of objects, which would be a pickle and are never loaded")
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"an array of shape {shape} and type {dtype} does not have {size - file.tell()} bytes")


def read_torch(path: Path) -> Any:
    """Reads what `torch.save` wrote, ours or another's: tensors and plain containers, nothing else is unpickled.

    The CRCs of a zip archive, which PyTorch itself ignores, are compared. Raises whatever damage makes its readers
    raise: see `reading`.
    """
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # pages of text, which advise to load the file all the same
        found = re.search(r"WeightsUnpickler error: *(.*)", str(error))
        raise ValueError(found[1] if found else "its pickle is none of tensors and plain containers") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a `.safetensors` file of ours. Raises what damage does: see `reading`."""
    from safetensors import safe_open

    check_sum(path)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys()) - {_CHECKSUM}
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def description_in(metadata: Mapping[str, str], what: str, writer: str, version: str) -> dict[str, Any]:
    """What a `.safetensors` file of ours says of itself under `what`, by the method that writes such files.

    Raises:
        ValueError: it holds something else, or is of another version.
    """
    if what not in metadata:
        raise ValueError(f"it holds no {what} as {writer} writes it ({version})")
    description: dict[str, Any] = json.loads(metadata[what])
    if description["format"] != version:
        raise ValueError(f"its format is {description['format']!r}")
    return description


# --- what was computed once -------------------------------------------------------------------------------------------


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
        check_sum(file)
        arrays = read_npz(file)
        if all(arrays[name].shape == shape and np.isfinite(arrays[name]).all() for name, shape in shapes.items()):
            return arrays
    arrays = compute()
    with contextlib.suppress(OSError):
        write_npz(file, **arrays)
    return arrays
