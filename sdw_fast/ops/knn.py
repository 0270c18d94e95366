"""Exact k nearest neighbors: queries against references, or a dataset against itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from sdw_fast.ops import _knn_faiss, _knn_native
from sdw_fast.ops._backend import _C, obstacle, warn_once
from sdw_fast.ops._knn_search import NO_SELF, Search, check_alike, checked_out, checked_rows
from sdw_fast.ops._registration import library

Array = TypeVar("Array", np.ndarray, torch.Tensor)
Progress = Callable[[int, int], Any]


def torch_search(search: Search) -> None:
    """The twin that defines the answer: all differences in float64, no expansion of the square."""
    queries, references, k, device = search.queries, search.references, search.k, search.queries.device
    query_rows, reference_rows = 256, max(8192, k)
    for q in range(0, len(queries), query_rows):
        x = queries.double(q, q + query_rows)  # [B, D]
        left_out = torch.arange(q, q + x.shape[0], device=device)[:, None] + search.self_offset  # [B, 1]
        best = torch.full((x.shape[0], 0), torch.inf, dtype=torch.float64, device=device)  # [B, ≤ k]
        best_index = torch.zeros((x.shape[0], 0), dtype=torch.int64, device=device)
        for r in range(0, len(references), reference_rows):
            y = references.double(r, r + reference_rows)  # [R, D]
            distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")  # [B, R]
            index = torch.arange(r, r + y.shape[0], device=device).expand_as(distance)
            distance.masked_fill_(index == left_out, torch.inf)
            best, best_index = _smallest(torch.cat([best, distance], 1), torch.cat([best_index, index], 1), k)
        search.write(slice(q, q + x.shape[0]), best, best_index)
        search.report(q + x.shape[0])


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
        queries: (M, D) array or tensor, float16, bfloat16, float32 or float64, in any byte order and any strides, taken
            without its graph; a NumPy memory map is read in blocks.
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
        TypeError: not arrays or dense tensors, different kinds, or a dtype that is not floating point.
        ValueError: masked values, wrong shapes, no rows, NaN or Inf, k out of range, `out` of wrong shape or dtype, or
            a backend that is unknown or does not take this data; the message says what is available.
        ImportError: backend "faiss" without FAISS.
    """
    if torch.compiler.is_compiling() and isinstance(queries, torch.Tensor) and progress is None and out is None:
        return torch.ops.sdw.knn(queries, references, k, backend)
    points, magnitude = checked_rows("queries", queries)
    others = points
    if references is not None:
        others, largest = checked_rows("references", references)
        magnitude = max(magnitude, largest)
        check_alike(queries, references)
    k = _checked_k(k, len(others), self_join=others is points)
    name, factory = choose_backend(backend, str(points.device), points.dims, k)

    if out is None:
        distances = torch.empty((len(points), k), dtype=torch.float32, device=points.device)
        indices = torch.empty((len(points), k), dtype=torch.int64, device=points.device)
    else:
        distances, indices = checked_out(out, queries, k)

    def report(done: int) -> None:
        if progress is not None:
            if points.device.type == "cuda":
                torch.cuda.current_stream(points.device).synchronize()
            progress(done, len(points))

    self_offset = 0 if others is points else NO_SELF
    search = Search(points, others, k, self_offset, magnitude, distances, indices, report)
    if name == "native":
        _knn_native.native_search(search)
    elif name == "cuda":
        _knn_native.cuda_search(search)
    elif name == "faiss":
        _knn_faiss.faiss_search(search, factory)
    else:
        torch_search(search)
    if out is not None:
        return out
    return (distances, indices) if isinstance(queries, torch.Tensor) else (distances.numpy(), indices.numpy())


def choose_backend(backend: str, device: str, dims: int, k: int) -> tuple[str, str]:
    """The search that `backend` names for such data on `device`, and its FAISS factory string.

    Raises:
        ValueError, ImportError: as `knn`.
    """
    name, _, factory = backend.partition(":")
    faiss = importlib.util.find_spec("faiss") is not None
    if name == "faiss" and not faiss:
        raise ImportError('knn: backend "faiss" needs FAISS: pip install "sdw_fast[faiss]"')
    cuda = hasattr(_C, "knn_cuda") and dims <= _C.knn_cuda_max_dims and k <= _C.knn_cuda_max_k
    unsupported = obstacle(torch.device(device)) if cuda else ""  # the GPU on which the data lie
    available: list[str] = {
        "cpu": ["native", "torch", *["cuda"] * (cuda and bool(_knn_native.cuda_devices()))],
        "cuda": [*["native", "cuda"] * (cuda and not unsupported), "torch"],
    }.get(torch.device(device).type, [])
    if faiss and available:
        available.append("faiss")
    if backend == "auto" and unsupported:
        warn_once(unsupported)
    if backend == "auto" and available:
        name = "faiss" if available[0] == "torch" and faiss and _knn_faiss.has_gpu() else available[0]
    if name not in available or (factory and name != "faiss"):
        choices = ["auto", *available] + ["faiss:<factory>[;<parameters>]"] * ("faiss" in available)
        reason = f" of {dims} dimensions with k = {k}" if hasattr(_C, "knn_cuda") and not cuda else ""
        reason += f" ({unsupported})" if unsupported else ""
        raise ValueError(
            f"knn: backend {backend!r} is not available for data on {device}{reason}; choose one of {choices}"
        )
    return name, factory or "Flat"


def _checked_k(k: Any, rows: int, self_join: bool) -> int:
    available = rows - self_join
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"knn: k must be an integer, got {type(k).__name__}")
    if not 1 <= k <= available:
        reason = f"{rows} rows without the query itself" if self_join else f"{available} references"
        raise ValueError(f"knn: k must be between 1 and {available} ({reason}), got {k}")
    return int(k)


def _op(queries: torch.Tensor, references: torch.Tensor | None, k: int, backend: str) -> tuple[torch.Tensor, ...]:
    return knn(queries, references, k=k, backend=backend)


def _result(queries: torch.Tensor, references: torch.Tensor | None, k: int, backend: str) -> tuple[torch.Tensor, ...]:
    shape = queries.shape[0], k
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


library.define("knn(Tensor queries, Tensor? references, int k, str backend) -> (Tensor, Tensor)")
library.impl("knn", _op, "CompositeExplicitAutograd")
library.impl("knn", torch.library.fallthrough_kernel, "Autograd")  # no derivative: neighbors are constants
torch.library.register_fake("sdw::knn", _result, lib=library)
