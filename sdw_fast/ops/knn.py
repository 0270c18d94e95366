"""Exact k nearest neighbors: queries against references, or a dataset against itself."""

from __future__ import annotations

import importlib.util
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
import torch

from sdw_fast import _C
from sdw_fast.ops._backend import cuda_stream
from sdw_fast.ops.knn_cuda import CudaKnnIndex

Array = TypeVar("Array", np.ndarray, torch.Tensor)
Progress = Callable[[int, int], Any]

_READ_ROWS = 1 << 17  # rows read at a time where an array or memory map is only passed over
_SLAB_BYTES = 1 << 30  # of a memory map, as floats, brought into memory at a time by the native backend


def knn(
    queries: Array,
    references: Array | None = None,
    *,
    k: int,
    backend: str = "auto",
    progress: Progress | None = None,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Finds the k nearest references of every query, in Euclidean distance.

    Neighbors are ordered by their float64 distance, equal distances by index. Near-duplicates far from the origin keep
    their digits: no backend subtracts squared norms of uncentered data to rank them.

    Args:
        queries: (M, D) array or tensor, float16, float32 or float64, any strides; a NumPy memory map is read in blocks.
        references: (N, D) of the same kind, D and device. None: the self-join, where `queries` are the references and
            every row leaves itself out, by index: an equal row elsewhere is a neighbor at distance 0.
        k: Neighbors a query, from 1 to N (to M − 1 in the self-join).
        backend: One of

            - "auto": "native" wherever it applies; else, for CUDA data, "faiss" where it has a GPU, else "torch";
            - "native": the compiled kernel for the device on which the data lie: a join of blocks pruned by proof, on
              the CPU in the threads of `set_num_threads`. The CUDA kernel takes up to 64 dimensions and k up to 256;
            - "cuda": the CUDA kernel on all visible GPUs, wherever the data lie: every GPU gets all references, in
              slabs if need be, and its share of the queries, so that neither has to fit on one of them;
            - "torch": blocked brute force in float64 on the data's device; slow, simple and right;
            - "faiss": FAISS's flat search, on the GPU (`faiss.knn_gpu`) if the data lie there and FAISS has GPU
              support (extra `gpu` for CUDA 12, `gpu-cu13` for CUDA 13);
            - "faiss:<factory>[;<parameters>]": any other FAISS index by its `index_factory` name and `ParameterSpace`
              settings, as "faiss:IVF4096,Flat;nprobe=16". Approximate: what it does not find is missing (where it finds
              fewer than k, index −1 at distance inf).

            The FAISS backends search centered float32 copies and rank what they find in float64; neighbors closer to
            each other than float32 resolves may be exchanged at the k-th place.
        progress: Called as progress(queries done, M) after every block, one call at a time. An exception that it raises
            cancels the search. Without it a search of CUDA tensors returns before the GPU has finished.
        out: (distances, indices) to write to, block by block, instead of new arrays: (M, k) float32 and (M, k) int64 of
            the kind and device of `queries`, for example memory maps.

    Returns:
        distances (M, k) float32, ascending, not squared; indices (M, k) int64. Of the kind and device of `queries`.

    Raises:
        TypeError: not arrays or tensors, different kinds, or a dtype that is not floating point.
        ValueError: wrong shapes, no rows, NaN or Inf, k out of range, `out` of wrong shape or dtype, or a backend that
            is unknown or does not take this data; the message says what is available.
        ImportError: backend "faiss" without FAISS.
    """
    magnitude = _check_points("queries", queries)
    self_join = references is None
    points = queries if references is None else references
    if not self_join:
        magnitude = max(magnitude, _check_points("references", points))
        _check_alike(queries, points)
    available = points.shape[0] - self_join
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"knn: k must be an integer, got {type(k).__name__}")
    if not 1 <= k <= available:
        reason = f"{points.shape[0]} rows without the query itself" if self_join else f"{available} references"
        raise ValueError(f"knn: k must be between 1 and {available} ({reason}), got {k}")
    name, factory = _resolve(backend, _device(queries).type, queries.shape[1], int(k))
    distances, indices = _outputs(queries, int(k), out)

    def write(rows: Any, block_distances: torch.Tensor, block_indices: torch.Tensor) -> None:
        rows = rows.to(_device(queries)) if isinstance(rows, torch.Tensor) else rows
        distances[rows] = _like(block_distances.float(), distances)
        indices[rows] = _like(block_indices, indices)

    def report(done: int) -> None:
        if progress is not None:
            if _device(queries).type == "cuda":
                torch.cuda.current_stream(_device(queries)).synchronize()
            progress(done, queries.shape[0])

    if name in ("native", "cuda"):
        frame = _Frame(points, magnitude)
        self_offset = 0 if self_join else _NO_SELF
        own = None if _device(queries).type == "cpu" else _device(queries)
        devices = _cuda_devices() if name == "cuda" else [own]
        if len(devices) == 1:
            _native_search(queries, points, int(k), self_offset, write, report, frame, devices[0])
        else:
            _deal_out(queries, points, int(k), self_offset, write, report, frame, devices)
    elif name == "faiss":
        _faiss_search(queries, points, int(k), self_join, write, report, factory)
    else:
        _torch_search(queries, points, int(k), self_join, write, report)
    return distances, indices


# A search hands over blocks of its result, (rows of the queries, distances, indices), and says how many rows are done.
Write = Callable[[Any, torch.Tensor, torch.Tensor], None]
Report = Callable[[int], None]


def _resolve(backend: str, device: str, dims: int, k: int) -> tuple[str, str]:
    """Returns the search that `backend` names for such data on `device`, and its FAISS factory string."""
    name, _, factory = backend.partition(":")
    faiss = importlib.util.find_spec("faiss") is not None
    if name == "faiss" and not faiss:
        raise ImportError('knn: backend "faiss" needs FAISS: pip install "sdw_fast[faiss]"')
    cuda = hasattr(_C, "knn_cuda") and dims <= _C.knn_cuda_max_dims and k <= _C.knn_cuda_max_k
    available: list[str] = {
        "cpu": ["native", "torch", *["cuda"] * (cuda and bool(_cuda_devices()))],
        "cuda": [*["native", "cuda"] * cuda, "torch"],
    }.get(device, [])
    if faiss and available:
        available.append("faiss")
    if backend == "auto" and available:
        name = "faiss" if available[0] == "torch" and faiss and _faiss_has_gpu() else available[0]
    if name not in available or (factory and name != "faiss"):
        choices = ["auto", *available] + ["faiss:<factory>[;<parameters>]"] * ("faiss" in available)
        reason = f" of {dims} dimensions with k = {k}" if hasattr(_C, "knn_cuda") and not cuda else ""
        raise ValueError(
            f"knn: backend {backend!r} is not available for data on {device}{reason}; choose one of {choices}"
        )
    return name, factory or "Flat"


def _cuda_devices() -> list[torch.device | None]:
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


_NO_SELF = -(1 << 62)  # an offset that meets no row


def _deal_out(
    queries: Any,
    references: Any,
    k: int,
    self_offset: int,
    write: Write,
    report: Report,
    frame: _Frame,
    devices: list[torch.device | None],
) -> None:
    """The CUDA kernel on several devices at once: each searches all references for an equal share of the queries."""
    bounds = [queries.shape[0] * i // len(devices) for i in range(len(devices) + 1)]
    done, lock, stop = [0] * len(devices), threading.Lock(), threading.Event()

    def search(number: int) -> None:
        first, last = bounds[number], bounds[number + 1]

        def report_share(rows: int) -> None:
            with lock:
                if stop.is_set():
                    raise CancelledError
                done[number] = rows
                report(sum(done))

        def write_share(rows: Any, squared: torch.Tensor, found: torch.Tensor) -> None:
            write(_shifted(rows, first), squared, found)

        if first < last:
            share, offset = queries[first:last], self_offset + first
            _native_search(share, references, k, offset, write_share, report_share, frame, devices[number])

    _synchronize([_device(queries)])  # the threads have streams of their own
    with ThreadPoolExecutor(len(devices)) as pool:
        shares = [pool.submit(search, number) for number in range(len(devices))]
        try:
            wait(shares, return_when="FIRST_EXCEPTION")
        finally:
            stop.set()
    _synchronize([_device(queries), *devices])
    errors = [error for error in (share.exception() for share in shares) if error is not None]
    for error in errors:
        if not isinstance(error, CancelledError):
            raise error


def _synchronize(devices: list[torch.device | None]) -> None:
    for device in devices:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)


def _shifted(rows: Any, by: int) -> Any:
    return slice(rows.start + by, rows.stop + by) if isinstance(rows, slice) else rows + by


def _native_search(
    queries: Any,
    references: Any,
    k: int,
    self_offset: int,
    write: Write,
    report: Report,
    frame: _Frame,
    device: torch.device | None,
) -> None:
    """The compiled join on the CPU (device None) or a CUDA device. What does not fit there passes through in slabs.

    Query i leaves out reference i + self_offset; where both are one and the offset is 0, the self-join.
    """
    rows, double = queries.shape[0], _is_double(queries) or _is_double(references)
    slab, step = _slab_rows(queries, references, k, device)
    if references.shape[0] > slab:
        for start in range(0, rows, step):
            block = _resident(queries[start : start + step], double, device)
            squared, found = _search_slabs(
                block, references, k, slab, self_offset + start, frame, device, _from(start, report)
            )
            write(slice(start, start + block.shape[0]), squared.sqrt(), found)
        return
    points = _resident(references, double, device)
    index = _index(points, frame, device)
    if queries is references and self_offset == 0:
        _run(index.self_join(k), k, device, lambda row, squared, found: write(row, squared.sqrt(), found), report)
        return
    for start in range(0, rows, step):
        block = _resident(queries[start : start + step], double, device)
        join = index.join(block, frame.coordinates(block), k, self_offset + start)
        _run(join, k, device, _written_from(start, write), _from(start, report))


def _index(points: Any, frame: _Frame, device: torch.device | None) -> Any:
    if device is None:
        return _C.KnnIndex(points, frame.coordinates(points), frame.scale)
    return CudaKnnIndex(points, frame.coordinates(points))


def _slab_rows(queries: Any, references: Any, k: int, device: torch.device | None) -> tuple[int, int]:
    """Rows of the references, and of the queries, that are brought to where they are searched at a time."""
    dims = queries.shape[1]
    if device is None:
        slab = max(_SLAB_BYTES // (4 * dims), k + 1)
        slab, step = (slab if isinstance(x, np.memmap) else x.shape[0] for x in (references, queries))
        return slab, step
    # Half of the free memory for references: points in double, coordinates, the packed and widened copies of these
    # with a transient of each, sort keys. A quarter for queries and their results, before and after merging.
    free, width = _free_bytes(device), _C.knn_cuda_width(dims)
    slab = max(free // 2 // (12 * dims + 16 * width + 96), k + 1)
    return slab, max(free // 4 // (12 * dims + 8 * width + 64 * k + 64), 1)


def _free_bytes(device: torch.device) -> int:
    """Memory that PyTorch can still hand out: free on the device, or kept and unused."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _search_slabs(
    block: Any,
    references: Any,
    k: int,
    slab: int,
    self_offset: int,
    frame: _Frame,
    device: torch.device | None,
    report: Report,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins queries with one slab of the references after the other; returns their squared distances and indices."""
    coordinates = frame.coordinates(block)
    rows, double = block.shape[0], _is_double(block)
    best = torch.full((rows, k), torch.inf, dtype=torch.float64, device=device)
    best_index = torch.full((rows, k), -1, dtype=torch.int64, device=device)
    slabs = references.shape[0] // slab  # the remainder is spread over them: each has more than k rows
    bounds = [references.shape[0] * i // slabs for i in range(slabs + 1)]
    for number, first in enumerate(bounds[:-1]):
        points = _resident(references[first : bounds[number + 1]], double, device)

        def merge(row: torch.Tensor, squared: torch.Tensor, found: torch.Tensor, first: int = first) -> None:
            # Slabs come in the order of their rows, so a stable sort leaves ties in the order of their index.
            both, both_index = torch.cat([best[row], squared], 1), torch.cat([best_index[row], found + first], 1)
            order = both.argsort(dim=1, stable=True)[:, :k]
            best[row], best_index[row] = both.gather(1, order), both_index.gather(1, order)

        def report_share(done: int, number: int = number) -> None:
            report((number * rows + done) // slabs)

        join = _index(points, frame, device).join(block, coordinates, k, self_offset - first)
        _run(join, k, device, merge, report_share)
    return best, best_index


def _from(start: int, report: Report) -> Report:
    return lambda done: report(start + done)


def _written_from(start: int, write: Write) -> Write:
    return lambda row, squared, found: write(row + start, squared.sqrt(), found)


def _run(join: Any, k: int, device: torch.device | None, write: Write, report: Report) -> None:
    """Runs a join in portions, so that it can be watched and interrupted: of about a quarter of a second on the CPU, of
    as many queries as the workspace is meant to hold on a CUDA device."""
    first, portion, done = 0, 16 if device is None else join.portion, 0
    while first < join.groups:
        last = min(first + portion, join.groups)
        rows = join.rows(first, last)
        row = torch.empty(rows, dtype=torch.int64, device=device)
        squared = torch.empty((rows, k), dtype=torch.float64, device=device)
        found = torch.empty((rows, k), dtype=torch.int64, device=device)
        began = time.perf_counter()
        join.search(first, last, row, squared, found)
        seconds = time.perf_counter() - began
        write(row, squared, found)
        first, done = last, done + rows
        report(done)
        if device is None:
            portion = max(1, int(portion * min(8.0, 0.25 / max(seconds, 1e-9))))


class _Frame:
    """Coordinates fit for pruning: centered, along the principal axes, widest first, scaled by a power of two.

    Any center and any orthonormal axes give right answers; these, from a sample, give fast ones. The scale puts all
    distances below 2^62, so that no square overflows. Coordinates lie on the device of the points.
    """

    def __init__(self, references: Any, magnitude: float) -> None:
        rows, dimension = references.shape
        sample = _rows(references[:: max(1, rows // 65536)], 0, rows)
        self.center = sample.mean(0)
        self.scale = 2.0 ** (50 - math.frexp(2 * math.sqrt(dimension) * max(magnitude, 1e-30))[1])
        self.axes = None
        if rows >= max(1024, 2 * dimension):  # else too little to prune to be worth it
            sample = (sample - self.center) * self.scale
            covariance = (sample.T @ sample).cpu()  # a small matrix: LAPACK is quick and repeats its bits
            self.axes = torch.linalg.eigh(covariance).eigenvectors.flip(1) * self.scale

    def coordinates(self, points: Any) -> torch.Tensor:
        device = _device(points)
        center, axes = self.center.to(device), None if self.axes is None else self.axes.to(device)
        result = torch.empty(tuple(points.shape), dtype=torch.float32, device=device)
        for start in range(0, points.shape[0], _READ_ROWS):
            centered = _rows(points, start, start + _READ_ROWS) - center
            result[start : start + _READ_ROWS] = centered @ axes if axes is not None else centered * self.scale
        return result


def _resident(x: Any, double: bool, device: torch.device | None) -> Any:
    """Rows where they are searched, contiguous, writable (which DLPack asks for), float64 or float32."""
    kind = torch.float64 if double else torch.float32
    if isinstance(x, torch.Tensor):
        return x.detach().to(device, kind).contiguous()
    dtype = np.float64 if double else np.float32
    if device is None:
        if isinstance(x, np.memmap):
            return np.array(x, dtype=dtype, order="C", subok=False)
        return np.require(x, dtype, ["C", "A", "W", "E"])
    result = torch.empty(x.shape, dtype=kind, device=device)
    for start in range(0, x.shape[0], _READ_ROWS):
        block = np.array(x[start : start + _READ_ROWS], dtype=dtype, order="C", subok=False)
        result[start : start + _READ_ROWS] = torch.from_numpy(block)
    return result


def _is_double(x: Any) -> bool:
    return x.dtype in (torch.float64, np.float64)


def _torch_search(queries: Any, references: Any, k: int, self_join: bool, write: Write, report: Report) -> None:
    """The twin that defines the answer: all differences in float64, no expansion of the square."""
    device = _device(queries)
    query_rows, reference_rows = 256, max(8192, k)
    for q in range(0, queries.shape[0], query_rows):
        x = _rows(queries, q, q + query_rows)  # [B, D]
        best = torch.full((x.shape[0], 0), torch.inf, dtype=torch.float64, device=device)  # [B, ≤ k]
        best_index = torch.zeros((x.shape[0], 0), dtype=torch.int64, device=device)
        for r in range(0, references.shape[0], reference_rows):
            y = _rows(references, r, r + reference_rows)  # [R, D]
            distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")  # [B, R]
            index = torch.arange(r, r + y.shape[0], device=device).expand_as(distance)
            if self_join:
                distance.masked_fill_(index == torch.arange(q, q + x.shape[0], device=device)[:, None], torch.inf)
            best, best_index = _smallest(torch.cat([best, distance], 1), torch.cat([best_index, index], 1), k)
        write(slice(q, q + x.shape[0]), best, best_index)
        report(q + x.shape[0])


def _smallest(distance: torch.Tensor, index: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest of each row, ascending, equal distances in the order of the columns."""
    if distance.shape[1] <= k:
        order = distance.argsort(dim=1, stable=True)
        return distance.gather(1, order), index.gather(1, order)
    # topk says nothing of ties, which matters only where some value left out equals the k-th; those rows are sorted.
    top, column = distance.topk(k, 1, largest=False)
    tied = (distance <= top[:, -1:]).sum(1) > k
    if tied.any():
        column[tied] = distance[tied].argsort(dim=1, stable=True)[:, :k]
    column = column.sort(1).values
    top = distance.gather(1, column)
    order = top.argsort(dim=1, stable=True)
    return top.gather(1, order), index.gather(1, column.gather(1, order))


def _faiss_search(
    queries: Any, references: Any, k: int, self_join: bool, write: Write, report: Report, factory: str
) -> None:
    """A FAISS index over float32 copies centered on the references' mean; its finds are ranked in float64."""
    rows = references.shape[0]
    center = sum(_rows(references, r, r + _READ_ROWS).sum(0) for r in range(0, rows, _READ_ROWS)) / rows

    def centered(x: Any, start: int, stop: int) -> torch.Tensor:
        return (_rows(x, start, stop) - center).float()

    # One more than asked: the query itself is usually among them. Duplicates can push it out; then the last one goes.
    wanted = min(k + self_join, rows)
    on_gpu = _device(queries).type == "cuda" and _faiss_has_gpu()
    flat = on_gpu and factory == "Flat" and wanted <= _FAISS_GPU_MAX_K
    find = (_faiss_gpu if flat else _faiss_index)(references, centered, wanted, factory, on_gpu)
    step = 32768 if on_gpu else 4096
    for q in range(0, queries.shape[0], step):
        x = _rows(queries, q, q + step)  # [B, D]
        found = find(centered(queries, q, q + step)).to(x.device).sort(1).values  # [B, k + 1]
        neighbors = _take(references, found.clamp(min=0))  # [B, k + 1, D]
        distance = (x[:, None] - neighbors).square().sum(-1).sqrt()
        missing = found < 0
        if self_join:
            missing |= found == torch.arange(q, q + x.shape[0], device=x.device)[:, None]
        distance.masked_fill_(missing, torch.inf)
        found = found.masked_fill(missing, -1)
        order = distance.argsort(dim=1, stable=True)[:, :k]
        write(slice(q, q + x.shape[0]), distance.gather(1, order), found.gather(1, order))
        report(q + x.shape[0])


_FAISS_GPU_MAX_K = 2048
Centered = Callable[[Any, int, int], torch.Tensor]  # rows [start, stop) of an array, as FAISS gets them
Find = Callable[[torch.Tensor], torch.Tensor]  # (B, D) queries -> (B, wanted) rows of the references


def _faiss_gpu(references: Any, centered: Centered, wanted: int, factory: str, on_gpu: bool) -> Find:
    """Brute force on the GPU where the tensors lie, without an index and without a copy through the host."""
    import faiss
    import faiss.contrib.torch_utils  # teaches knn_gpu tensors

    resources = faiss.StandardGpuResources()
    y = torch.empty(references.shape, dtype=torch.float32, device=references.device)
    for r in range(0, y.shape[0], _READ_ROWS):
        y[r : r + _READ_ROWS] = centered(references, r, r + _READ_ROWS)

    def find(block: torch.Tensor) -> torch.Tensor:
        with cuda_stream(block):
            return faiss.knn_gpu(resources, block, y, wanted)[1]

    return find


def _faiss_index(references: Any, centered: Centered, wanted: int, factory: str, on_gpu: bool) -> Find:
    import faiss

    name, _, parameters = factory.partition(";")
    rows, dimension = references.shape
    try:
        index = faiss.index_factory(dimension, name)
        if on_gpu:
            index = faiss.index_cpu_to_all_gpus(index)
        space = faiss.GpuParameterSpace() if on_gpu else faiss.ParameterSpace()
        if parameters:
            space.set_index_parameters(index, parameters)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise ValueError(f"knn: FAISS does not know the index {factory!r}: {error}") from error
    if not index.is_trained:
        index.train(centered(references, 0, rows).cpu().numpy())
    for r in range(0, rows, _READ_ROWS):
        index.add(centered(references, r, r + _READ_ROWS).cpu().numpy())
    return lambda block: torch.from_numpy(index.search(block.cpu().numpy(), wanted)[1])


def _faiss_has_gpu() -> bool:
    import faiss

    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def _check_points(name: str, x: Any) -> float:
    """Refuses what is not a matrix of finite floats; returns its largest magnitude."""
    if not isinstance(x, np.ndarray | torch.Tensor):
        raise TypeError(f"knn: {name} must be a NumPy array or a torch tensor, got {type(x).__name__}")
    floating = x.is_floating_point() if isinstance(x, torch.Tensor) else np.issubdtype(x.dtype, np.floating)
    if not floating or x.dtype == np.longdouble:
        raise TypeError(f"knn: {name} must be float16, float32 or float64, got {x.dtype}")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"knn: {name} must have shape (rows, dimensions), neither of them 0, got {tuple(x.shape)}")
    if _device(x).type == "meta":
        raise ValueError(f"knn: {name} is a meta tensor, without data")
    x = x.detach() if isinstance(x, torch.Tensor) else x
    magnitude = 0.0
    for start in range(0, x.shape[0], _READ_ROWS):
        block = x[start : start + _READ_ROWS]
        largest = max(float(block.max()), -float(block.min()))
        if not math.isfinite(largest):
            finite = np.isfinite(block) if isinstance(block, np.ndarray) else block.isfinite().cpu().numpy()
            row = start + int((~finite).any(1).argmax())
            raise ValueError(f"knn: {name} must be finite; row {row} is the first with NaN or Inf. Drop such rows")
        magnitude = max(magnitude, largest)
    if magnitude > 1e37:
        raise ValueError(f"knn: {name} reach {magnitude:.3g}; distances would leave float32's range. Scale them down")
    return magnitude


def _check_alike(queries: Any, references: Any) -> None:
    if isinstance(queries, torch.Tensor) != isinstance(references, torch.Tensor):
        raise TypeError(
            f"knn: queries and references must both be arrays or both tensors, "
            f"got {type(queries).__name__} and {type(references).__name__}"
        )
    if _device(queries) != _device(references):
        raise ValueError(f"knn: queries are on {_device(queries)}, references on {_device(references)}")
    if queries.shape[1] != references.shape[1]:
        raise ValueError(
            f"knn: queries have {queries.shape[1]} dimensions, references {references.shape[1]}; they must agree"
        )


def _outputs(queries: Array, k: int, out: tuple[Array, Array] | None) -> tuple[Array, Array]:
    shape = (queries.shape[0], k)
    if out is None:
        if isinstance(queries, torch.Tensor):
            return (
                torch.empty(shape, dtype=torch.float32, device=queries.device),
                torch.empty(shape, dtype=torch.int64, device=queries.device),
            )
        return np.empty(shape, np.float32), np.empty(shape, np.int64)
    for name, array, dtype in zip(("distances", "indices"), out, ("float32", "int64"), strict=True):
        if isinstance(array, torch.Tensor) != isinstance(queries, torch.Tensor) or not isinstance(
            array, np.ndarray | torch.Tensor
        ):
            raise TypeError(f"knn: out {name} must be of the kind of queries, got {type(array).__name__}")
        if tuple(array.shape) != shape or str(array.dtype).removeprefix("torch.") != dtype:
            raise ValueError(
                f"knn: out {name} must be {dtype} of shape {shape}, got {array.dtype} of shape {tuple(array.shape)}"
            )
        if _device(array) != _device(queries):
            raise ValueError(f"knn: out {name} is on {_device(array)}, queries on {_device(queries)}")
    return out


def _device(x: Any) -> torch.device:
    return x.device if isinstance(x, torch.Tensor) else torch.device("cpu")


def _rows(x: Any, start: int, stop: int) -> torch.Tensor:
    """Rows of an array, memory map or tensor as a float64 tensor on its device."""
    block = x[start:stop]
    if isinstance(block, torch.Tensor):
        return block.detach().to(torch.float64)
    return torch.from_numpy(np.array(block, dtype=np.float64, order="C"))


def _take(x: Any, index: torch.Tensor) -> torch.Tensor:
    """Rows by index, as a float64 tensor of shape (*index.shape, D)."""
    if isinstance(x, torch.Tensor):
        return x.detach()[index].to(torch.float64)
    return torch.from_numpy(x[index.numpy()].astype(np.float64))


def _like(block: torch.Tensor, target: Any) -> Any:
    return block.to(target.device) if isinstance(target, torch.Tensor) else block.cpu().numpy()
