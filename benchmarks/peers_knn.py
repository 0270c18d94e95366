"""Nearest neighbors by other libraries: the peers of bench_knn.py."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sdw_fast.ops import knn

K = 10

# A peer takes (points, rows to query) and returns (seconds to build, seconds to query, indices (rows, K) or None).
Peer = Callable[[np.ndarray, np.ndarray], "tuple[float, float, np.ndarray]"]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    _wait_for_gpu()
    begin = time.perf_counter()
    result = call()
    _wait_for_gpu()
    return time.perf_counter() - begin, result


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def without_self(found: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Drops each query from its K + 1 neighbors (the last one where it is not among them)."""
    others = found != rows[:, None]
    others[others.all(1), -1] = False
    return found[others].reshape(len(rows), -1)


def pykdtree(points: np.ndarray, rows: np.ndarray) -> tuple[float, float, np.ndarray]:
    from pykdtree.kdtree import KDTree

    build, tree = timed(lambda: KDTree(points))
    query, (_, found) = timed(lambda: tree.query(points[rows], k=K + 1))
    return build, query, without_self(found.astype(np.int64), rows)


def quitefastmst(points: np.ndarray, rows: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Builds its tree in every call: what a call of one query takes is what building takes."""
    import quitefastmst as library

    library.omp_set_num_threads(torch.get_num_threads())
    build, _ = timed(lambda: library.knn_euclid(points, K + 1, points[:1], algorithm="kd_tree"))
    both, (_, found) = timed(lambda: library.knn_euclid(points, K + 1, points[rows], algorithm="kd_tree"))
    return build, max(0.0, both - build), without_self(found.astype(np.int64), rows)


def nanoflann(points: np.ndarray, rows: np.ndarray) -> tuple[float, float, np.ndarray]:
    from pynanoflann import KDTree

    tree = KDTree(n_neighbors=K + 1, leaf_size=10, metric="l2")
    build, _ = timed(lambda: tree.fit(points))
    query, (_, found) = timed(lambda: tree.kneighbors(points[rows], n_jobs=torch.get_num_threads()))
    return build, query, without_self(found.astype(np.int64), rows)


def fast_hdbscan(points: np.ndarray, rows: np.ndarray) -> tuple[float, float, np.ndarray]:
    import numba
    from fast_hdbscan.numba_kdtree import build_kdtree, parallel_tree_query

    numba.set_num_threads(torch.get_num_threads())
    build, tree = timed(lambda: build_kdtree(points))
    query, (_, found) = timed(lambda: parallel_tree_query(tree, points[rows], k=K + 1))
    return build, query, without_self(found.astype(np.int64), rows)


def scipy(points: np.ndarray, rows: np.ndarray) -> tuple[float, float, np.ndarray]:
    from scipy.spatial import cKDTree

    build, tree = timed(lambda: cKDTree(points))
    query, (_, found) = timed(lambda: tree.query(points[rows], k=K + 1, workers=torch.get_num_threads()))
    return build, query, without_self(found, rows)


def sklearn(points: np.ndarray, rows: np.ndarray) -> tuple[float, float, np.ndarray]:
    from sklearn.neighbors import NearestNeighbors

    model = NearestNeighbors(n_neighbors=K + 1, algorithm="kd_tree", n_jobs=torch.get_num_threads())
    build, _ = timed(lambda: model.fit(points))
    query, found = timed(lambda: model.kneighbors(points[rows], return_distance=False))
    return build, query, without_self(found, rows)


def faiss_flat(points: np.ndarray, rows: np.ndarray) -> tuple[float, float, np.ndarray]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(points.shape[1])
    build, _ = timed(lambda: index.add(points))
    query, (_, found) = timed(lambda: index.search(points[rows], K + 1))
    return build, query, without_self(found, rows)


def faiss_ivf(points: np.ndarray, rows: np.ndarray) -> tuple[float, float, np.ndarray]:
    """About 4 √M cells; probes doubled until the recall on 500 rows reaches 0.99 (the search for it is not timed)."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    cells = 1 << max(4, round(math.log2(4 * math.sqrt(len(points)))))
    index = faiss.index_factory(points.shape[1], f"IVF{cells},Flat")

    def fill() -> None:
        index.train(points)
        index.add(points)

    build, _ = timed(fill)
    sample = rows[:500]
    _, _, exact = faiss_flat(points, sample)
    index.nprobe = 1
    while recall(without_self(index.search(points[sample], K + 1)[1], sample), exact) < 0.99:
        index.nprobe *= 2
    query, (_, found) = timed(lambda: index.search(points[rows], K + 1))
    return build, query, without_self(found, rows)


def hnswlib(points: np.ndarray, rows: np.ndarray) -> tuple[float, float, np.ndarray]:
    import hnswlib as library

    index = library.Index("l2", points.shape[1])
    index.init_index(len(points), ef_construction=100, M=16, random_seed=0)
    index.set_num_threads(torch.get_num_threads())
    index.set_ef(64)
    build, _ = timed(lambda: index.add_items(points))
    query, (found, _) = timed(lambda: index.knn_query(points[rows], K + 1))
    return build, query, without_self(found.astype(np.int64), rows)


def pynndescent(points: np.ndarray, rows: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Its graph is the self-join itself: nothing is left to query."""
    from pynndescent import NNDescent

    def build() -> Any:
        model = NNDescent(points, n_neighbors=K + 1, random_state=0, n_jobs=torch.get_num_threads())
        return model.neighbor_graph[0]

    seconds, found = timed(build)
    return seconds, 0.0, without_self(found[rows].astype(np.int64), rows)


PEERS: dict[str, Peer] = {
    "FAISS flat": faiss_flat,
    "FAISS IVF": faiss_ivf,
    "pykdtree": pykdtree,
    "SciPy cKDTree": scipy,
    "quitefastmst": quitefastmst,
    "nanoflann": nanoflann,
    "fast_hdbscan": fast_hdbscan,
    "scikit-learn": sklearn,
    "PyNNDescent": pynndescent,
    "hnswlib": hnswlib,
}


def cdist_topk(points: torch.Tensor, rows: torch.Tensor) -> tuple[float, float, np.ndarray]:
    """What one writes in PyTorch: blocks of distances, at most 4 GiB of them, and the smallest of each row."""
    block = max(1, (1 << 30) // len(points))

    def search() -> torch.Tensor:
        parts = [torch.cdist(points[some], points).topk(K + 1, largest=False).indices for some in rows.split(block)]
        return torch.cat(parts)

    query, found = timed(search)
    return 0.0, query, without_self(found.cpu().numpy(), rows.cpu().numpy())


def faiss_gpu_flat(points: torch.Tensor, rows: torch.Tensor) -> tuple[float, float, np.ndarray]:
    import faiss
    import faiss.contrib.torch_utils  # teaches knn_gpu tensors

    if not hasattr(faiss, "StandardGpuResources"):
        raise ImportError("this FAISS has no GPU support")
    resources = faiss.StandardGpuResources()
    faiss.knn_gpu(resources, points[:1000], points[:1000], K)  # allocates its memory
    query, (_, found) = timed(lambda: faiss.knn_gpu(resources, points[rows], points, K + 1))
    return 0.0, query, without_self(found.cpu().numpy(), rows.cpu().numpy())


def cuvs_brute_force(points: torch.Tensor, rows: torch.Tensor) -> tuple[float, float, np.ndarray]:
    from cuvs.neighbors import brute_force

    build, index = timed(lambda: brute_force.build(points, metric="sqeuclidean"))
    brute_force.search(index, points[:100], K + 1)
    query, (_, found) = timed(lambda: brute_force.search(index, points[rows], K + 1))
    found = torch.as_tensor(found, device=points.device)
    return build, query, without_self(found.cpu().numpy(), rows.cpu().numpy())


def keops(points: torch.Tensor, rows: torch.Tensor) -> tuple[float, float, np.ndarray]:
    from pykeops.torch import LazyTensor

    def search(some: torch.Tensor) -> torch.Tensor:
        x, y = LazyTensor(points[some][:, None]), LazyTensor(points[None])
        return ((x - y) ** 2).sum(-1).argKmin(K + 1, dim=1)

    search(rows[:100])  # compiles
    query, found = timed(lambda: search(rows))
    return 0.0, query, without_self(found.cpu().numpy(), rows.cpu().numpy())


def ours_on_the_cpu(points: torch.Tensor, rows: torch.Tensor) -> tuple[float, float, np.ndarray]:
    """The whole join, however few rows are asked for."""
    on_host = points.cpu()
    knn(on_host[:2000], k=K)
    seconds, (_, indices) = timed(lambda: knn(on_host, k=K))
    return seconds, 0.0, indices.numpy()[rows.cpu().numpy()]


GPU_PEERS: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[float, float, np.ndarray]]] = {
    "torch.cdist + topk": cdist_topk,
    "cuVS brute force": cuvs_brute_force,
    "KeOps argKmin": keops,
    "FAISS GPU flat": faiss_gpu_flat,
    "sdw_fast on the CPU": ours_on_the_cpu,
}
APPROXIMATE = ("FAISS IVF", "PyNNDescent", "hnswlib")
COMPILED_AT_FIRST = ("PyNNDescent", "fast_hdbscan")  # by numba


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))
