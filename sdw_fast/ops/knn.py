"""Exact k nearest neighbors: queries against references, or a dataset against itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

Array = TypeVar("Array", np.ndarray, torch.Tensor)
Progress = Callable[[int, int], Any]

_CHECK_ROWS = 1 << 18  # rows read at a time where a memory map is only scanned


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

            - "auto": "faiss" where it is installed (for CUDA data: where it has a GPU), else "torch";
            - "torch": blocked brute force in float64 on the data's device; slow, simple and right;
            - "faiss": FAISS's flat index, on the GPU if the data lie there and FAISS has GPU support;
            - "faiss:<factory>[;<parameters>]": any other FAISS index by its `index_factory` name and `ParameterSpace`
              settings, as "faiss:IVF4096,Flat;nprobe=16". Approximate: what it does not find is missing (where it finds
              fewer than k, index −1 at distance inf).

            The FAISS backends search centered float32 copies and rank what they find in float64; neighbors closer to
            each other than float32 resolves may be exchanged at the k-th place.
        progress: Called as progress(queries done, M) after every block. An exception that it raises cancels the search.
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
    _check_points("queries", queries)
    self_join = references is None
    points = queries if references is None else references
    if not self_join:
        _check_points("references", points)
        _check_alike(queries, points)
    available = points.shape[0] - self_join
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"knn: k must be an integer, got {type(k).__name__}")
    if not 1 <= k <= available:
        reason = f"{points.shape[0]} rows without the query itself" if self_join else f"{available} references"
        raise ValueError(f"knn: k must be between 1 and {available} ({reason}), got {k}")
    search = _resolve(backend, _device(queries).type)
    distances, indices = _outputs(queries, int(k), out)
    rows = queries.shape[0]
    for start, block_distances, block_indices in search(queries, points, int(k), self_join):
        stop = start + block_distances.shape[0]
        distances[start:stop] = _like(block_distances, distances)
        indices[start:stop] = _like(block_indices, indices)
        if progress is not None:
            progress(stop, rows)
    return distances, indices


# A search yields (first row, distances, indices) for consecutive blocks of queries, as float32 and int64 tensors.
Blocks = Iterator[tuple[int, torch.Tensor, torch.Tensor]]
Search = Callable[[Any, Any, int, bool], Blocks]


def _resolve(backend: str, device: str) -> Search:
    """Returns the search that `backend` names for data on `device`; refuses with what is available."""
    name, _, factory = backend.partition(":")
    faiss = importlib.util.find_spec("faiss") is not None
    if name == "faiss" and not faiss:
        raise ImportError('knn: backend "faiss" needs FAISS: pip install "sdw_fast[faiss]"')
    if device in ("cpu", "cuda"):
        if name == "auto" and not factory:
            name = "faiss" if faiss and (device == "cpu" or _faiss_has_gpu()) else "torch"
        if name == "torch" and not factory:
            return _torch_search
        if name == "faiss":
            return lambda q, r, k, self_join: _faiss_search(q, r, k, self_join, factory or "Flat")
    choices = (
        ["auto", "torch"] + ["faiss", "faiss:<factory>[;<parameters>]"] * faiss if device in ("cpu", "cuda") else []
    )
    raise ValueError(f"knn: backend {backend!r} is not available for data on {device}; choose one of {choices}")


def _torch_search(queries: Any, references: Any, k: int, self_join: bool) -> Blocks:
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
        yield q, best.float(), best_index


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


def _faiss_search(queries: Any, references: Any, k: int, self_join: bool, factory: str) -> Blocks:
    """A FAISS index over float32 copies centered on the references' mean; its finds are ranked in float64."""
    import faiss

    name, _, parameters = factory.partition(";")
    on_gpu = _device(queries).type == "cuda" and _faiss_has_gpu()
    rows, dimension = references.shape
    center = sum(_rows(references, r, r + _CHECK_ROWS).sum(0) for r in range(0, rows, _CHECK_ROWS)) / rows
    try:
        index = faiss.index_factory(dimension, name)
        if on_gpu:
            index = faiss.index_cpu_to_all_gpus(index)
        space = faiss.GpuParameterSpace() if on_gpu else faiss.ParameterSpace()
        if parameters:
            space.set_index_parameters(index, parameters)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise ValueError(f"knn: FAISS does not know the index {factory!r}: {error}") from error

    def centered(x: Any, start: int, stop: int) -> np.ndarray:
        return (_rows(x, start, stop) - center).float().cpu().numpy()

    if not index.is_trained:
        index.train(centered(references, 0, rows))
    for r in range(0, rows, _CHECK_ROWS):
        index.add(centered(references, r, r + _CHECK_ROWS))

    # One more than asked: the query itself is usually among them. Duplicates can push it out; then the last one goes.
    wanted = min(k + self_join, rows)
    for q in range(0, queries.shape[0], 4096):
        x = _rows(queries, q, q + 4096)  # [B, D]
        _, found_array = index.search(centered(queries, q, q + 4096), wanted)
        found = torch.from_numpy(found_array).to(x.device)  # [B, k + 1]
        found = found.sort(1).values
        neighbors = _take(references, found.clamp(min=0))  # [B, k + 1, D]
        distance = (x[:, None] - neighbors).square().sum(-1).sqrt()
        missing = found < 0
        if self_join:
            missing |= found == torch.arange(q, q + x.shape[0], device=x.device)[:, None]
        distance.masked_fill_(missing, torch.inf)
        found = found.masked_fill(missing, -1)
        order = distance.argsort(dim=1, stable=True)[:, :k]
        yield q, distance.gather(1, order).float(), found.gather(1, order)


def _faiss_has_gpu() -> bool:
    import faiss

    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def _check_points(name: str, x: Any) -> None:
    if not isinstance(x, np.ndarray | torch.Tensor):
        raise TypeError(f"knn: {name} must be a NumPy array or a torch tensor, got {type(x).__name__}")
    floating = x.is_floating_point() if isinstance(x, torch.Tensor) else np.issubdtype(x.dtype, np.floating)
    if not floating or x.dtype == np.longdouble:
        raise TypeError(f"knn: {name} must be float16, float32 or float64, got {x.dtype}")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"knn: {name} must have shape (rows, dimensions), neither of them 0, got {tuple(x.shape)}")
    if _device(x).type == "meta":
        raise ValueError(f"knn: {name} is a meta tensor, without data")
    for start in range(0, x.shape[0], _CHECK_ROWS):
        block = x[start : start + _CHECK_ROWS]
        finite = torch.isfinite(block) if isinstance(block, torch.Tensor) else np.isfinite(block)
        if not finite.all():
            row = start + int(
                (~finite).any(1).argmax() if isinstance(finite, np.ndarray) else (~finite).any(1).int().argmax()
            )
            raise ValueError(
                f"knn: {name} must be finite; row {row} is the first with NaN or Inf. Drop or repair such rows"
            )


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
    return block if isinstance(target, torch.Tensor) else block.numpy()
