"""One search of knn: what is searched, for what, and where the answer goes. Tensors, made and checked at the door."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sdw_fast.arrays import real_numbers, tensor_of

READ_ROWS = 1 << 17  # rows read at a time where points are only passed over
NO_SELF = -(1 << 62)  # a self_offset that meets no row


class Rows:
    """The (rows, D) points of a tensor, or of a NumPy memory map, of which only what is asked for is read."""

    def __init__(self, data: torch.Tensor | np.ndarray) -> None:
        self._data = data
        self.dims = int(data.shape[1])
        self.device = data.device if isinstance(data, torch.Tensor) else torch.device("cpu")
        self.is_mapped = not isinstance(data, torch.Tensor)
        self.is_double = data.dtype.itemsize == 8

    def __len__(self) -> int:
        return self._data.shape[0]

    def part(self, first: int, last: int) -> Rows:
        return Rows(self._data[first:last])

    def read(self, first: int = 0, last: int | None = None, step: int = 1) -> torch.Tensor:
        """Rows as they are."""
        block = self._data[first:last:step]
        return block if isinstance(block, torch.Tensor) else torch.from_numpy(_in_memory(block))

    def double(self, first: int = 0, last: int | None = None, step: int = 1) -> torch.Tensor:
        """Rows in float64, contiguous."""
        return self.read(first, last, step).to(torch.float64).contiguous()

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Rows by index, in float64, of shape (*index.shape, D)."""
        found = self._data[index] if isinstance(self._data, torch.Tensor) else tensor_of(self._data[index.numpy()])
        return found.to(torch.float64)

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows a block at a time, each with the number of its first row."""
        for first in range(0, len(self), READ_ROWS):
            yield first, self.read(first, first + READ_ROWS)

    def to(self, device: torch.device, double: bool) -> torch.Tensor:
        """All rows on a device, in float64 or float32, contiguous; a memory map passes through memory in blocks."""
        kind = torch.float64 if double else torch.float32
        if not self.is_mapped or device.type == "cpu":
            return self.read().to(device, kind).contiguous()
        result = torch.empty((len(self), self.dims), dtype=kind, device=device)
        for first, block in self.blocks():
            result[first : first + READ_ROWS] = block.to(kind)
        return result


@dataclass(frozen=True)
class Search:
    """The k nearest references of every query; query i leaves out reference i + self_offset, if there is one."""

    queries: Rows  # (M, D)
    references: Rows  # (N, D); in a self-join the same object
    k: int
    self_offset: int
    magnitude: float  # of the largest coordinate of all points
    distances: torch.Tensor  # (M, k) float32: the answer
    indices: torch.Tensor  # (M, k) int64
    report: Callable[[int], None]  # is told how many queries are done

    @property
    def is_self_join(self) -> bool:
        return self.queries is self.references

    @property
    def is_double(self) -> bool:
        return self.queries.is_double or self.references.is_double

    def write(self, rows: slice | torch.Tensor, distances: torch.Tensor, indices: torch.Tensor) -> None:
        """Writes the answer for some rows of the queries, from wherever it was found."""
        rows = rows.to(self.distances.device) if isinstance(rows, torch.Tensor) else rows
        self.distances[rows] = distances.float().to(self.distances.device)
        self.indices[rows] = indices.to(self.indices.device)

    def part(self, first: int, last: int) -> Search:
        """The same search for queries [first, last), which come after those before them."""
        return replace(
            self,
            queries=self.queries.part(first, last),
            self_offset=self.self_offset + first,
            distances=self.distances[first:last],
            indices=self.indices[first:last],
            report=lambda done: self.report(first + done),
        )


def checked_rows(name: str, x: Any) -> tuple[Rows, float]:
    """The points of an argument and their largest magnitude; refuses what is not a matrix of finite floats."""
    if not isinstance(x, np.ndarray | torch.Tensor):
        raise TypeError(f"knn: {name} must be a NumPy array or a torch tensor, got {type(x).__name__}")
    if not (x.is_floating_point() if isinstance(x, torch.Tensor) else x.dtype.kind == "f"):
        raise TypeError(f"knn: {name} must be float16, float32 or float64, got {x.dtype}")
    points = real_numbers(f"knn: {name}", x)
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(
            f"knn: {name} must have shape (rows, dimensions), neither of them 0, got {tuple(points.shape)}"
        )
    rows = Rows(points)
    magnitude = 0.0
    for first, block in rows.blocks():
        largest = max(float(block.max()), -float(block.min()))
        if not math.isfinite(largest):
            row = first + int((~block.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"knn: {name} must be finite; row {row} is the first with NaN or Inf. Drop such rows")
        magnitude = max(magnitude, largest)
    if magnitude > 1e37:
        raise ValueError(f"knn: {name} reach {magnitude:.3g}; distances would leave float32's range. Scale them down")
    return rows, magnitude


def check_alike(queries: Any, references: Any) -> None:
    """Refuses queries and references of different kinds, devices or dimensions."""
    if isinstance(queries, torch.Tensor) != isinstance(references, torch.Tensor):
        raise TypeError(
            f"knn: queries and references must both be arrays or both tensors, "
            f"got {type(queries).__name__} and {type(references).__name__}"
        )
    if isinstance(queries, torch.Tensor) and queries.device != references.device:
        raise ValueError(f"knn: queries are on {queries.device}, references on {references.device}")
    if queries.shape[1] != references.shape[1]:
        raise ValueError(
            f"knn: queries have {queries.shape[1]} dimensions, references {references.shape[1]}; they must agree"
        )


def checked_out(out: Any, queries: Any, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The arrays to write to as tensors; refuses what does not fit the queries."""
    shape, device = (queries.shape[0], k), getattr(queries, "device", "cpu")
    for name, array, dtype in zip(("distances", "indices"), out, ("float32", "int64"), strict=True):
        kind = torch.Tensor if isinstance(queries, torch.Tensor) else np.ndarray
        if not isinstance(array, kind) or isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"knn: out {name} must be of the kind of queries, got {type(array).__name__}")
        if tuple(array.shape) != shape or str(array.dtype).removeprefix("torch.") != dtype:
            raise ValueError(
                f"knn: out {name} must be {dtype} of shape {shape}, got {array.dtype} of shape {tuple(array.shape)}"
            )
        if isinstance(array, torch.Tensor) and array.device != device:
            raise ValueError(f"knn: out {name} is on {array.device}, queries on {device}")
        if not _can_be_written(array):
            raise ValueError(
                f"knn: out {name} must be writable, with no negative strides, a place for every number, and no gradient"
            )
    distances, indices = (x if isinstance(x, torch.Tensor) else torch.from_numpy(x) for x in out)
    return distances, indices


def _can_be_written(array: np.ndarray | torch.Tensor) -> bool:
    """Whether what is written to the array, as a tensor over its memory, can be read from it again."""
    if isinstance(array, torch.Tensor):
        if array.layout != torch.strided or array.requires_grad or array.is_neg():
            return False
        strides, size = array.stride(), 1
    else:
        if not (array.flags.writeable and array.flags.aligned):
            return False
        strides, size = array.strides, array.itemsize
    return all(n == 1 or (stride > 0 and stride % size == 0) for n, stride in zip(array.shape, strides, strict=True))


def _in_memory(x: np.ndarray) -> np.ndarray:
    return np.array(x, dtype=x.dtype.newbyteorder("="), order="C", subok=False)
