"""The compiled search of knn, on the CPU and on CUDA devices. What does not fit there passes through in slabs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch

from sdw_fast.ops._backend import _C, follow_torch, obstacle
from sdw_fast.ops._knn_cuda import CudaKnnIndex
from sdw_fast.ops._knn_frame import Frame
from sdw_fast.ops._knn_search import NO_SELF, Rows, Search

SLAB_BYTES = 1 << 30  # of a memory map, as floats, brought into memory at a time


def native_search(search: Search) -> None:
    """The kernel of the device on which the points lie."""
    device = search.queries.device
    kernel = CpuKernel() if device.type == "cpu" else CudaKernel(device)
    _search(search, Frame(search.references, search.magnitude), kernel)


def cuda_search(search: Search) -> None:
    """The CUDA kernel on all visible devices."""
    frame, kernels = Frame(search.references, search.magnitude), [CudaKernel(device) for device in cuda_devices()]
    if len(kernels) == 1:
        _search(search, frame, kernels[0])
    else:
        _search_on_all(search, frame, kernels)


class CpuKernel:
    """The join on the CPU, in portions of about a quarter of a second, so that it can be watched and interrupted."""

    device = torch.device("cpu")

    def capacity(self, search: Search) -> tuple[int, int]:
        """Rows of the references, and of the queries, that are brought into memory at a time."""
        slab = max(SLAB_BYTES // (4 * search.queries.dims), search.k + 1)
        references, queries = (slab if x.is_mapped else len(x) for x in (search.references, search.queries))
        return references, queries

    def index(self, points: torch.Tensor, frame: Frame) -> Any:
        follow_torch()
        return _C.KnnIndex(points, frame.coordinates(points), frame.scale)

    def portion(self, join: Any, previous: int, seconds: float) -> int:
        """Groups of the join to search next, after `previous` groups in so many seconds."""
        return max(1, int(previous * min(8.0, 0.25 / max(seconds, 1e-9)))) if previous else 16


class CudaKernel:
    """The join on a CUDA device, in portions of as many queries as the workspace is meant to hold."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def capacity(self, search: Search) -> tuple[int, int]:
        """Rows of the references, and of the queries, that are brought to the device at a time."""
        # Half of the free memory for references: points in double, coordinates, the packed and widened copies of these
        # with a transient of each, those in half precision, sort keys. A quarter for queries and their results, before
        # and after merging.
        dims, k = search.queries.dims, search.k
        free, width = free_bytes(self.device), _C.knn_cuda_width(dims)
        slab = max(free // 2 // (12 * dims + 16 * width + 8 * _C.knn_cuda_filter_width(dims) + 96), k + 1)
        return slab, max(free // 4 // (12 * dims + 8 * width + 64 * k + 64), 1)

    def index(self, points: torch.Tensor, frame: Frame) -> Any:
        return CudaKnnIndex(points, frame.coordinates(points))

    def portion(self, join: Any, previous: int, seconds: float) -> int:
        return join.portion


def cuda_devices() -> list[torch.device]:
    """All visible ones that the kernel supports."""
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return [device for device in devices if not obstacle(device)]


def free_bytes(device: torch.device) -> int:
    """Memory that PyTorch can still hand out: free on the device, or kept and unused."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


class NeighborIndex:
    """References ready to be searched several times, for those who merge answers of several indices.

    Args:
        references: (N, D) float32 or float64, contiguous, all of them in memory.
        magnitude: Of the largest coordinate of all points.
    """

    def __init__(self, references: torch.Tensor, magnitude: float) -> None:
        follow_torch()
        self._kernel = CpuKernel() if references.device.type == "cpu" else CudaKernel(references.device)
        self._frame = Frame(Rows(references), magnitude)
        self._index = self._kernel.index(references, self._frame)
        self.rows = len(references)

    def self_join(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared distances (N, k) float64 and indices of the k nearest other rows, by distance, then index."""
        return self._collect(self.self_join_portions(k), k, self.rows)

    def self_join_portions(self, k: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The same portion by portion, for who has no room for all: rows (n,), squared distances and indices (n, k)."""
        return _answers(self._index.self_join(k), k, self._kernel)

    def within(self, queries: torch.Tensor, k: int, reach: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of queries (M, D), among the rows whose squared distance is at most reach (M,) float64.

        Where fewer than k are, the row ends with infinities at index -1. On a CUDA device nothing is gained by a reach.
        """
        arguments = (queries, self._frame.coordinates(queries), k, NO_SELF)
        on_cpu = isinstance(self._kernel, CpuKernel)
        join = self._index.join(*arguments, reach) if on_cpu else self._index.join(*arguments)
        squared, found = self._collect(_answers(join, k, self._kernel), k, len(queries))
        beyond = squared > reach[:, None]
        return squared.masked_fill(beyond, torch.inf), found.masked_fill(beyond, -1)

    def _collect(self, answers: Iterator[Any], k: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        squared = torch.empty((rows, k), dtype=torch.float64, device=self._kernel.device)
        found = torch.empty((rows, k), dtype=torch.int64, device=self._kernel.device)
        for row, distance, index in answers:
            squared[row], found[row] = distance, index
        return squared, found


def _search(search: Search, frame: Frame, kernel: CpuKernel | CudaKernel) -> None:
    slab, step = kernel.capacity(search)
    index = None
    if len(search.references) <= slab:
        index = kernel.index(search.references.to(kernel.device, search.is_double), frame)
        if search.is_self_join:
            _write(search, index.self_join(search.k), kernel)
            return
    for start in range(0, len(search.queries), step):
        part = search.part(start, start + step)
        queries = part.queries.to(kernel.device, search.is_double)
        coordinates = frame.coordinates(queries)
        if index is None:
            _search_slabs(part, queries, coordinates, frame, kernel, slab)
        else:
            _write(part, index.join(queries, coordinates, part.k, part.self_offset), kernel)


def _write(search: Search, join: Any, kernel: CpuKernel | CudaKernel) -> None:
    done = 0
    for row, squared, found in _answers(join, search.k, kernel):
        search.write(row, squared.sqrt(), found)
        done += row.shape[0]
        search.report(done)


def _answers(
    join: Any, k: int, kernel: CpuKernel | CudaKernel
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Runs a join portion by portion: rows of the queries, squared distances (rows, k), indices (rows, k)."""
    first, last, seconds = 0, 0, 0.0
    while last < join.groups:
        first, last = last, min(last + kernel.portion(join, last - first, seconds), join.groups)
        rows = join.rows(first, last)
        row = torch.empty(rows, dtype=torch.int64, device=kernel.device)
        squared = torch.empty((rows, k), dtype=torch.float64, device=kernel.device)
        found = torch.empty((rows, k), dtype=torch.int64, device=kernel.device)
        began = time.perf_counter()
        join.search(first, last, row, squared, found)
        seconds = time.perf_counter() - began
        yield row, squared, found


def _search_slabs(
    search: Search,
    queries: torch.Tensor,
    coordinates: torch.Tensor,
    frame: Frame,
    kernel: CpuKernel | CudaKernel,
    slab: int,
) -> None:
    """Joins the queries with one slab of the references after the other and keeps the best of all."""
    rows, k = queries.shape[0], search.k
    best = torch.full((rows, k), torch.inf, dtype=torch.float64, device=kernel.device)
    best_index = torch.full((rows, k), -1, dtype=torch.int64, device=kernel.device)
    slabs = len(search.references) // slab  # the remainder is spread over them: each has more than k rows
    bounds = [len(search.references) * i // slabs for i in range(slabs + 1)]
    for number, first in enumerate(bounds[:-1]):
        index = kernel.index(
            search.references.part(first, bounds[number + 1]).to(kernel.device, search.is_double), frame
        )
        done = 0
        for row, squared, found in _answers(index.join(queries, coordinates, k, search.self_offset - first), k, kernel):
            # Slabs come in the order of their rows, so a stable sort leaves ties in the order of their index.
            both, both_index = torch.cat([best[row], squared], 1), torch.cat([best_index[row], found + first], 1)
            order = both.argsort(dim=1, stable=True)[:, :k]
            best[row], best_index[row] = both.gather(1, order), both_index.gather(1, order)
            done += row.shape[0]
            search.report((number * rows + done) // slabs)
    search.write(slice(0, rows), best.sqrt(), best_index)


def _search_on_all(search: Search, frame: Frame, kernels: list[CudaKernel]) -> None:
    """Every device searches all references for an equal share of the queries, in a thread of its own."""
    rows = len(search.queries)
    bounds = [rows * i // len(kernels) for i in range(len(kernels) + 1)]
    done, lock, stop = [0] * len(kernels), threading.Lock(), threading.Event()

    def search_share(number: int) -> None:
        def report(rows: int) -> None:
            with lock:
                if stop.is_set():
                    raise CancelledError
                done[number] = rows
                search.report(sum(done))

        share = replace(search.part(bounds[number], bounds[number + 1]), report=report)
        if len(share.queries):
            _search(share, frame, kernels[number])

    devices = [search.queries.device, *(kernel.device for kernel in kernels)]
    _synchronize(devices[:1])  # the threads have streams of their own
    with ThreadPoolExecutor(len(kernels)) as pool:
        shares = [pool.submit(search_share, number) for number in range(len(kernels))]
        try:
            wait(shares, return_when="FIRST_EXCEPTION")
        finally:
            stop.set()
    _synchronize(devices)
    for error in [share.exception() for share in shares]:
        if error is not None and not isinstance(error, CancelledError):
            raise error


def _synchronize(devices: list[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
