"""knn against answers worked by hand, then against float64 brute force on random data."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import brute_force

from sdw_fast import _C, get_num_threads, set_num_threads
from sdw_fast.ops import knn

knn_module = sys.modules["sdw_fast.ops.knn"]

HAS_FAISS = importlib.util.find_spec("faiss") is not None
EXACT = ["native", "torch", *(["faiss"] if HAS_FAISS else [])]


def check(queries: np.ndarray, references: np.ndarray | None, k: int, backend: str) -> None:
    """Distances to float32 precision, indices identical to brute force."""
    distances, indices = knn(queries, references, k=k, backend=backend)
    squared, expected_indices = brute_force(queries, references, k)
    assert distances.dtype == np.float32
    assert indices.dtype == np.int64
    np.testing.assert_allclose(distances, np.sqrt(squared), rtol=2e-7, atol=1e-30)
    np.testing.assert_array_equal(indices, expected_indices)


def states(rows: int, dimension: int, seed: int, intrinsic: int = 3) -> np.ndarray:
    """Points near a curved surface, as the states of a robot are."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((rows, intrinsic)) @ rng.standard_normal((intrinsic, dimension))
    return (np.sin(latent) + 0.3 * latent + 0.02 * rng.standard_normal((rows, dimension))).astype(np.float32)


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
    x.flags.writeable = False
    check(x, x, 4, backend)
    check(x.astype(np.float32), x, 4, backend)
    x = x.copy()
    distances, indices = knn(torch.from_numpy(x).T.contiguous().T.requires_grad_(), k=4, backend=backend)
    assert isinstance(distances, torch.Tensor)
    assert isinstance(indices, torch.Tensor)
    np.testing.assert_array_equal(indices.numpy(), brute_force(x, None, 4)[1])


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_are_left_as_they_were(backend: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(states(100, 3, 1)).to(dtype)
    y = x[:40] + 0.25
    before = x.clone(), y.clone()
    knn(x, k=2, backend=backend)
    knn(y, x, k=2, backend=backend)
    torch.testing.assert_close((x, y), before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_ties_go_to_the_lower_index(backend: str) -> None:
    grid = np.random.default_rng(2).integers(0, 3, (700, 2)).astype(np.float32)
    check(grid, None, 50, backend)
    check(grid[:50], grid, 90, backend)
    check(np.full((300, 3), 5.3, np.float32), None, 299, backend)
    bits = np.random.default_rng(3).integers(0, 2, (600, 12)).astype(np.float64)
    check(bits, None, 9, backend)


def test_thousands_of_duplicates_cost_little() -> None:
    # 30,000 equal rows: were each searched among all others, this would be 9e8 distances at zero.
    x = np.full((30_000, 4), 0.1, np.float32)
    distances, indices = knn(x, k=3)
    assert not distances.any()
    np.testing.assert_array_equal(indices[3:], np.broadcast_to([0, 1, 2], (29_997, 3)))
    np.testing.assert_array_equal(indices[:3], [[1, 2, 3], [0, 2, 3], [0, 1, 3]])


@pytest.mark.parametrize(
    ("rows", "dimension", "k"),
    [
        *[(1, 17, 1), (2, 1, 1), (15, 2, 14), (16, 3, 3), (17, 5, 16), (257, 17, 10), (4097, 11, 10), (3000, 1, 5)],
        *[(2000, 30, 256), (1500, 64, 10), (400, 376, 5), (300, 512, 3), (900, 8, 899)],
    ],
)
def test_native_sizes(rows: int, dimension: int, k: int) -> None:
    x = states(rows, dimension, 4)
    if rows > 1:
        check(x, None, k, "native")
    check(states(33, dimension, 5), x, k, "native")


def test_native_scans_where_nothing_can_be_pruned() -> None:
    x = np.random.default_rng(6).random((2000, 64), dtype=np.float32)
    coordinates = knn_module._Frame(x, 1.0)
    index = _C.KnnIndex(x, coordinates.coordinates(x), coordinates.scale)
    assert index.self_join(10).scans
    check(x, None, 10, "native")
    check(x[:100], x, 64, "native")
    check(x + 1000, None, 10, "native")
    y = states(3000, 17, 7)
    coordinates = knn_module._Frame(y, 1.0)
    index = _C.KnnIndex(y, coordinates.coordinates(y), coordinates.scale)
    assert not index.self_join(10).scans


@pytest.mark.parametrize("backend", EXACT)
def test_shifted_data_keep_their_digits(backend: str) -> None:
    # Far from the origin, and with close pairs: 2^-13 apart at 1000, the last digits float32 has there.
    x = states(1500, 17, 8) + 1000
    x[750:] = x[:750]
    x[750:, 3] += 2.0**-13
    check(x, None, 5, backend)


def test_neighbors_closer_than_float32_resolves() -> None:
    rng = np.random.default_rng(9)
    centers = rng.standard_normal((5, 6))
    x = centers[rng.integers(0, 5, 1200)] + 1e-11 * rng.standard_normal((1200, 6))  # float64
    check(x, None, 7, "native")
    check(x + 1e4, None, 7, "native")
    outlier = states(900, 4, 10)
    outlier[17] = 3e30
    check(outlier, None, 4, "native")
    for scale in (1e-30, 1e-18, 1e12, 1e34):
        check((states(500, 5, 11) * scale).astype(np.float64), None, 4, "native")


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_native_equals_brute_force(data: st.DataObject) -> None:
    rows = data.draw(st.integers(2, 700), "rows")
    dimension = data.draw(st.integers(1, 40), "dimension")
    k = data.draw(st.integers(1, min(rows - 1, 40)), "k")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    x = rng.standard_normal((rows, dimension)) * rng.choice([1e-3, 1.0, 10.0], dimension)
    kind = data.draw(st.sampled_from(["continuous", "rounded", "repeated", "shifted", "constant axes"]), "kind")
    if kind == "rounded":
        x = np.round(x)
    elif kind == "repeated":
        x = x[rng.integers(0, max(1, rows // 20), rows)]
    elif kind == "shifted":
        x = x + 1000
    elif kind == "constant axes":
        x[:, ::2] = 3.0
    x = x.astype(data.draw(st.sampled_from([np.float32, np.float64]), "dtype"))
    if data.draw(st.booleans(), "self-join"):
        check_distances(x, None, k)
    else:
        check_distances(x[: max(1, rows // 3)] + x.dtype.type(0.125), x, k)


def check_distances(queries: np.ndarray, references: np.ndarray | None, k: int) -> None:
    """As check, but two float64 sums of the same squares may differ in their last digit and so exchange a tie."""
    distances, indices = knn(queries, references, k=k, backend="native")
    squared, expected_indices = brute_force(queries, references, k)
    expected = np.sqrt(squared)
    np.testing.assert_allclose(distances, expected, rtol=2e-7, atol=1e-30)
    points = (queries if references is None else references).astype(np.float64)
    found = np.sqrt(((queries[:, None].astype(np.float64) - points[indices]) ** 2).sum(-1))
    different = indices != expected_indices
    np.testing.assert_allclose(found[different], expected[different], rtol=1e-12)
    assert all(len(set(row)) == k for row in indices.tolist())
    if references is None:
        assert not (indices == np.arange(len(indices))[:, None]).any()


def test_any_number_of_threads_gives_the_same_answer() -> None:
    x = states(3000, 17, 12)
    threads = get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            set_num_threads(count)
            results.append(knn(x, k=10))
    finally:
        set_num_threads(threads)
    for distances, indices in results[1:]:
        np.testing.assert_array_equal(distances, results[0][0])
        np.testing.assert_array_equal(indices, results[0][1])


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_every_instruction_set(isa: str) -> None:
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/ops']; import numpy as np; from test_knn import check, states; "
        "check(states(1300, 17, 0), None, 10, 'native'); check(states(200, 5, 1), states(900, 5, 2), 300, 'native'); "
        "check(np.random.default_rng(0).random((700, 64)), None, 3, 'native'); "
        "check(np.ones((500, 3), np.float32), None, 4, 'native')"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"SDW_ISA": isa}
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_memory_maps_in_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn_module, "_SLAB_BYTES", 4 * 17 * 300)
    x = states(1000, 17, 13)
    x[700:800] = x[100:200]  # ties across slabs
    path = tmp_path / "states.npy"
    np.save(path, x)
    mapped = np.load(path, mmap_mode="r")
    out = (
        np.lib.format.open_memmap(tmp_path / "d.npy", "w+", np.float32, (1000, 10)),
        np.lib.format.open_memmap(tmp_path / "i.npy", "w+", np.int64, (1000, 10)),
    )
    seen: list[int] = []
    knn(mapped, k=10, out=out, progress=lambda done, total: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == 1000
    np.testing.assert_array_equal(out[1], brute_force(x, None, 10)[1])
    np.testing.assert_array_equal(knn(mapped[:410], x, k=3)[1], brute_force(x[:410], x, 3)[1])
    np.testing.assert_array_equal(knn(x[:41], mapped, k=3)[1], brute_force(x[:41], x, 3)[1])
    assert knn(mapped, k=999)[1].shape == (1000, 999)


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
    with pytest.raises(ValueError, match="Scale them down"):
        knn(np.full((3, 2), 1e300), k=1)
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


def test_data_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without CUDA there is no CUDA tensor to pass; what decides for one is asked directly.
    monkeypatch.delattr(_C, "knn_cuda", raising=False)
    with pytest.raises(ValueError, match=r"'native' is not available for data on cuda; choose one of .*torch"):
        knn_module._resolve("native", "cuda", 3, 1)
    assert knn_module._resolve("auto", "cuda", 3, 1)[0] in ("torch", "faiss")
    assert knn_module._resolve("auto", "cpu", 3, 1)[0] == "native"
    with pytest.raises(ValueError, match="meta"):
        knn(torch.zeros((5, 2), device="meta"), k=1)
