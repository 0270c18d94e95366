"""knn against answers worked by hand, then against float64 brute force on random data."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from sdw_fast.ops import knn

HAS_FAISS = importlib.util.find_spec("faiss") is not None
EXACT = ["auto", "torch", *(["faiss"] if HAS_FAISS else [])]


def brute_force(queries: np.ndarray, references: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All differences in float64; a stable sort breaks ties by index."""
    points = queries if references is None else references
    x, y = queries.astype(np.float64), points.astype(np.float64)
    squared = sum((x[:, None, d] - y[None, :, d]) ** 2 for d in range(x.shape[1]))
    if references is None:
        np.fill_diagonal(squared, np.inf)
    index = np.argsort(squared, 1, kind="stable")[:, :k]
    return np.sqrt(np.take_along_axis(squared, index, 1)), index


def check(queries: np.ndarray, references: np.ndarray | None, k: int, backend: str) -> None:
    """Distances to float32 precision, indices identical to brute force."""
    distances, indices = knn(queries, references, k=k, backend=backend)
    expected_distances, expected_indices = brute_force(queries, references, k)
    assert distances.dtype == np.float32
    assert indices.dtype == np.int64
    np.testing.assert_allclose(distances, expected_distances, rtol=2e-7, atol=1e-30)
    np.testing.assert_array_equal(indices, expected_indices)


@pytest.mark.parametrize("backend", EXACT)
def test_by_hand(backend: str) -> None:
    # Four corners of a 3 by 4 rectangle: from (0, 0) the others lie at 3, 4 and 5.
    corners = np.array([[0, 0], [3, 0], [0, 4], [3, 4]], np.float32)
    distances, indices = knn(corners, k=3, backend=backend)
    np.testing.assert_array_equal(distances, [[3, 4, 5]] * 4)
    np.testing.assert_array_equal(indices, [[1, 2, 3], [0, 3, 2], [3, 0, 1], [2, 1, 0]])

    # From the middle of the lower side: (0, 0) and (3, 0) tie at 1.5, the lower index first.
    distances, indices = knn(np.array([[1.5, 0]], np.float32), corners, k=2, backend=backend)
    np.testing.assert_array_equal(distances, [[1.5, 1.5]])
    np.testing.assert_array_equal(indices, [[0, 1]])

    # A row leaves itself out by index; its duplicate stays, at distance 0.
    twins = np.array([[7.0], [7.0], [9.0]])
    distances, indices = knn(twins, k=2, backend=backend)
    np.testing.assert_array_equal(distances, [[0, 2], [0, 2], [2, 2]])
    np.testing.assert_array_equal(indices, [[1, 2], [0, 2], [0, 1]])


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(("queries", "references", "dimension", "k"), [(1, 7, 3, 2), (97, 301, 17, 10), (300, 0, 5, 7)])
def test_random(backend: str, queries: int, references: int, dimension: int, k: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((queries, dimension), dtype=np.float32)
    y = rng.standard_normal((references, dimension), dtype=np.float32) if references else None
    check(x, y, k, backend)


@pytest.mark.parametrize("backend", EXACT)
def test_kinds_and_layouts(backend: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((60, 8))
    for dtype in (np.float16, np.float32, np.float64):
        check(x.astype(dtype), None, 4, backend)
    check(x[::2, ::3], None, 4, backend)
    check(np.asfortranarray(x), x[:, ::-1], 4, backend)
    distances, indices = knn(torch.from_numpy(x).T.contiguous().T, k=4, backend=backend)
    assert isinstance(distances, torch.Tensor)
    assert isinstance(indices, torch.Tensor)
    np.testing.assert_array_equal(indices.numpy(), brute_force(x, None, 4)[1])


def test_torch_breaks_ties_by_index() -> None:
    x = np.random.default_rng(2).integers(0, 3, (400, 2)).astype(np.float32)
    check(x, None, 50, "torch")
    check(np.zeros((40, 3), np.float32), None, 39, "torch")


@pytest.mark.parametrize("backend", EXACT)
def test_out_and_progress(backend: str) -> None:
    x = np.random.default_rng(3).standard_normal((50, 4)).astype(np.float32)
    out = np.empty((50, 3), np.float32), np.empty((50, 3), np.int64)
    seen: list[tuple[int, int]] = []
    result = knn(x, k=3, backend=backend, out=out, progress=lambda done, total: seen.append((done, total)))
    assert result[0] is out[0]
    assert seen[-1] == (50, 50)
    np.testing.assert_array_equal(out[1], brute_force(x, None, 3)[1])

    def cancel(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        knn(x, k=3, backend=backend, progress=cancel)


@pytest.mark.skipif(not HAS_FAISS, reason="needs faiss")
def test_faiss_by_name_and_probes() -> None:
    x = np.random.default_rng(4).standard_normal((2000, 4)).astype(np.float32)
    check(x, None, 5, "faiss:IVF16,Flat;nprobe=16")
    with pytest.raises(ValueError, match="nonsense"):
        knn(x, k=5, backend="faiss:nonsense")


def test_refusals() -> None:
    x = np.zeros((5, 2), np.float32)
    bad = x.copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="row 3"):
        knn(bad, k=1)
    bad[3, 1] = np.inf
    with pytest.raises(ValueError, match="references must be finite"):
        knn(torch.from_numpy(x), torch.from_numpy(bad), k=1)
    with pytest.raises(ValueError, match="neither of them 0"):
        knn(x[:0], k=1)
    with pytest.raises(ValueError, match="neither of them 0"):
        knn(x, x[:0], k=1)
    with pytest.raises(ValueError, match="between 1 and 0"):
        knn(x[:1], k=1)
    with pytest.raises(ValueError, match="between 1 and 4"):
        knn(x, k=5)
    with pytest.raises(ValueError, match="between 1 and 5"):
        knn(x, x, k=6)
    with pytest.raises(ValueError, match="between 1"):
        knn(x, k=0)
    with pytest.raises(TypeError, match="k must be an integer"):
        knn(x, k=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 dimensions, references 2"):
        knn(np.zeros((4, 3), np.float32), x, k=1)
    with pytest.raises(ValueError, match="shape"):
        knn(x[0], k=1)
    with pytest.raises(TypeError, match="int64"):
        knn(x.astype(np.int64), k=1)
    with pytest.raises(TypeError, match="list"):
        knn([[1.0, 2.0]], k=1)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="both"):
        knn(x, torch.from_numpy(x), k=1)  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"cuda.*choose one of"):
        knn(x, k=1, backend="cuda")
    with pytest.raises(ValueError, match="out distances"):
        knn(x, k=1, out=(np.zeros((5, 2), np.float32), np.zeros((5, 1), np.int64)))


def test_tensors_elsewhere_are_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        knn(torch.zeros((5, 2), device="meta"), k=1)
