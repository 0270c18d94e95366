"""knn on every backend: answers worked by hand, then float64 brute force on random data."""

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
from oracle import brute_force, surface

from sdw_fast import _C, get_num_threads, set_num_threads
from sdw_fast.ops import _knn_cuda, _knn_native, knn

HAS_GPU = torch.cuda.is_available() and hasattr(_C, "knn_cuda")
HAS_FAISS = importlib.util.find_spec("faiss") is not None
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"))
FAISS = pytest.param("faiss", marks=pytest.mark.skipif(not HAS_FAISS, reason="needs faiss"))
ALL = ["native", "torch", FAISS, "emulated", GPU]
EXACT = ["native", "torch", "emulated", GPU]  # FAISS itself exchanges neighbors that float32 does not tell apart


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What knn takes; "emulated" is "cuda" with the host as its device."""
    if request.param != "emulated":
        return request.param
    request.getfixturevalue("cuda_on_cpu")
    monkeypatch.setattr(_knn_native, "cuda_devices", lambda: [torch.device("cpu")])
    monkeypatch.setattr(_knn_native, "free_bytes", lambda device: 1 << 30)
    return "cuda"


def check(queries: np.ndarray, references: np.ndarray | None, k: int, backend: str, ties: bool = False) -> None:
    """Distances to float32 precision, indices identical to brute force.

    With `ties`, and on CUDA, two float64 sums of the same squares may differ in their last digits and exchange a tie.
    """
    distances, indices = knn(queries, references, k=k, backend=backend)
    squared, expected = brute_force(queries, references, k)
    assert distances.dtype == np.float32
    assert indices.dtype == np.int64
    np.testing.assert_allclose(distances, np.sqrt(squared), rtol=2e-7, atol=1e-30)
    different = indices != expected
    if not ties and backend != "cuda":
        assert not different.any()
    assert ties or different.mean() < 0.01
    points = (queries if references is None else references).astype(np.float64)
    truth = np.square(queries[:, None].astype(np.float64) - points[indices]).sum(-1)
    np.testing.assert_allclose(truth[different], squared[different], rtol=1e-12 if ties else 1e-13, atol=0)
    assert all(len(set(row)) == k for row in indices.tolist())
    if references is None:
        assert not (indices == np.arange(len(indices))[:, None]).any()


@pytest.mark.parametrize("backend", ALL, indirect=True)
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


@pytest.mark.parametrize("backend", ALL, indirect=True)
@pytest.mark.parametrize(("queries", "references", "dimension", "k"), [(1, 7, 3, 2), (97, 301, 17, 10), (300, 0, 5, 7)])
def test_random(backend: str, queries: int, references: int, dimension: int, k: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((queries, dimension), dtype=np.float32)
    y = rng.standard_normal((references, dimension), dtype=np.float32) if references else None
    check(x, y, k, backend)


@pytest.mark.parametrize(
    ("rows", "dimension", "k"),
    [
        *[(1, 17, 1), (2, 1, 1), (15, 2, 14), (16, 3, 3), (17, 5, 16), (257, 17, 10), (4097, 11, 10), (3000, 1, 5)],
        *[(2000, 30, 256), (1500, 64, 10), (400, 376, 5), (300, 512, 3), (900, 8, 899)],
    ],
)
def test_sizes_native(rows: int, dimension: int, k: int) -> None:
    x = surface(rows, dimension, 4)
    if rows > 1:
        check(x, None, k, "native")
    check(surface(33, dimension, 5), x, k, "native")


@pytest.mark.parametrize("backend", ["emulated", GPU], indirect=True)
@pytest.mark.parametrize(
    ("rows", "dimension", "k"),
    [
        *[(2, 1, 1), (31, 3, 30), (32, 3, 4), (33, 3, 4), (63, 2, 7), (64, 3, 10), (65, 11, 10), (129, 17, 10)],
        *[(257, 1, 5), (320, 17, 40), (300, 11, 256), (150, 33, 5), (200, 64, 10), (2049, 3, 1), (2113, 11, 3)],
    ],
)
def test_sizes_cuda(backend: str, rows: int, dimension: int, k: int) -> None:
    check(surface(rows, dimension, 0), None, k, backend)


@pytest.mark.parametrize("backend", ["emulated", GPU], indirect=True)
@pytest.mark.parametrize(
    ("queries", "references", "dimension", "k"),
    [(1, 1, 1, 1), (1, 700, 17, 10), (33, 63, 3, 63), (97, 301, 20, 10), (100, 2049, 5, 20), (5, 4, 24, 4)],
)
def test_queries_against_references_cuda(backend: str, queries: int, references: int, dimension: int, k: int) -> None:
    x = np.random.default_rng(1).standard_normal((queries, dimension), dtype=np.float32)
    check(x, surface(references, dimension, 2), k, backend)


@pytest.mark.parametrize("backend", ["native", "torch"], indirect=True)
def test_more_than_one_block_of_references(backend: str) -> None:
    check(surface(40, 3, 20), surface(9000, 3, 21), 5, backend)


def test_two_threads_on_many_distinct_rows() -> None:
    # Beyond 16,384 rows the halves of the tree are sorted in two threads, beyond 4,096 queries they are placed in two.
    x, y = surface(40_000, 6, 22), surface(6_001, 6, 23)
    threads = get_num_threads()
    try:
        set_num_threads(2)
        own, others = knn(x, k=4, backend="native")[1], knn(y, x, k=4, backend="native")[1]
    finally:
        set_num_threads(threads)
    rows = np.random.default_rng(24).permutation(len(x))[:300]
    found = brute_force(x[rows], x, 5)[1]
    np.testing.assert_array_equal(found[:, 0], rows)
    np.testing.assert_array_equal(own[rows], found[:, 1:])
    rows = np.append(np.random.default_rng(25).permutation(len(y))[:300], [2999, 3000, 6000])
    np.testing.assert_array_equal(others[rows], brute_force(y[rows], x, 4)[1])
    # Every row is found, each once: none is lost or doubled on its way into the tree.
    np.testing.assert_array_equal(knn(x, x, k=1, backend="native")[1][:, 0], np.arange(len(x)))


@pytest.mark.parametrize("backend", ALL, indirect=True)
def test_kinds_and_layouts(backend: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((60, 8))
    for dtype in (np.float16, np.float32, np.float64, ">f4"):
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


@pytest.mark.parametrize("backend", ALL, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_are_left_as_they_were(backend: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(surface(100, 3, 1)).to(dtype)
    y = x[:40] + 0.25
    before = x.clone(), y.clone()
    knn(x, k=2, backend=backend)
    knn(y, x, k=2, backend=backend)
    torch.testing.assert_close((x, y), before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", EXACT, indirect=True)
def test_ties_go_to_the_lower_index(backend: str) -> None:
    grid = np.random.default_rng(2).integers(0, 3, (300 if backend == "cuda" else 700, 2)).astype(np.float32)
    equal = np.full((200, 3) if backend == "cuda" else (300, 3), 5.3, np.float32)
    bits = np.random.default_rng(3).integers(0, 2, (600, 12)).astype(np.float64)
    for x, y, k in [(grid, None, 50), (grid[:50], grid, 90), (equal, None, len(equal) - 1), (bits, None, 9)]:
        distances, indices = knn(x, y, k=k, backend=backend)
        squared, expected = brute_force(x, y, k)
        np.testing.assert_array_equal(distances, np.sqrt(squared).astype(np.float32))
        np.testing.assert_array_equal(indices, expected)


def test_thousands_of_duplicates_cost_little() -> None:
    # 30,000 equal rows: were each searched among all others, this would be 9e8 distances at zero.
    x = np.full((30_000, 4), 0.1, np.float32)
    distances, indices = knn(x, k=3)
    assert not distances.any()
    np.testing.assert_array_equal(indices[3:], np.broadcast_to([0, 1, 2], (29_997, 3)))
    np.testing.assert_array_equal(indices[:3], [[1, 2, 3], [0, 2, 3], [0, 1, 3]])


@pytest.mark.parametrize("backend", ALL, indirect=True)
def test_shifted_data_keep_their_digits(backend: str) -> None:
    # Far from the origin, and with close pairs: 2^-13 apart at 1000, the last digits float32 has there.
    x = surface(400 if backend == "cuda" else 1500, 17, 8) + 1000
    half = len(x) // 2
    x[half:] = x[:half]
    x[half:, 3] += 2.0**-13
    check(x, None, 5, backend)


@pytest.mark.parametrize("backend", ["native", "emulated", GPU], indirect=True)
def test_neighbors_closer_than_float32_resolves(backend: str) -> None:
    rng = np.random.default_rng(9)
    few = backend == "cuda"
    centers = rng.standard_normal((5, 6))
    x = centers[rng.integers(0, 5, 300 if few else 1200)]
    x = x + 1e-11 * rng.standard_normal(x.shape)  # float64
    check(x, None, 7, backend)
    check(x + 1e4, None, 7, backend)
    outlier = surface(200 if few else 900, 4, 10)
    outlier[17] = 3e30
    check(outlier, None, 4, backend)
    for scale in (1e-30, 1e-18, 1e12, 1e34):
        check((surface(100 if few else 500, 5, 11) * scale).astype(np.float64), None, 4, backend)


@pytest.mark.parametrize("backend", ["native", "emulated", GPU], indirect=True)
@pytest.mark.parametrize("far", [0, 3000])  # without them the native backend scans, with them it walks its tree
def test_thresholds_are_as_wide_as_float32_is_wrong(backend: str, far: int) -> None:
    # On a sphere about the query, at radii that differ by less than float32 sees: only float64 tells the nearest. The
    # query is the origin of the coordinates by symmetry, so that relative rounding alone is to be bounded.
    for seed in range(10):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((100 + far, 5))
        x *= (1 + 3e-9 * rng.permutation(len(x)))[:, None] / np.linalg.norm(x, axis=1, keepdims=True)
        x[100:] *= 100
        check(np.zeros((1, 5)), np.concatenate([x, -x]), 21, backend, ties=True)


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
        check(x, None, k, "native", ties=True)
    else:
        check(x[: max(1, rows // 3)] + x.dtype.type(0.125), x, k, "native", ties=True)


def test_any_number_of_threads_gives_the_same_answer() -> None:
    x = surface(3000, 17, 12)
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
        "import numpy as np; from test_knn import check, surface; "
        "check(surface(1300, 17, 0), None, 10, 'native'); "
        "check(surface(200, 5, 1), surface(900, 5, 2), 300, 'native'); "
        "check(np.random.default_rng(0).random((700, 64)), None, 3, 'native'); "
        "check(np.ones((500, 3), np.float32), None, 4, 'native')"
    )
    environment = os.environ | {"SDW_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_memory_maps_in_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_knn_native, "SLAB_BYTES", 4 * 17 * 300)
    x = surface(1000, 17, 13)
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


@pytest.mark.parametrize("backend", ["native", "torch", FAISS], indirect=True)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f8"])
def test_memory_maps_equal_arrays(backend: str, dtype: str, tmp_path: Path) -> None:
    x = surface(300, 5, 27).astype(dtype)
    np.save(tmp_path / "states.npy", x)
    mapped = np.load(tmp_path / "states.npy", mmap_mode="r")
    for a, b in [(knn(mapped, k=3, backend=backend), knn(x, k=3, backend=backend))]:
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_array_equal(knn(x[::2], mapped, k=3, backend=backend)[1], knn(x[::2], x, k=3, backend=backend)[1])


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.usefixtures("cuda_on_cpu")
def test_several_devices_and_slabs(devices: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x = surface(400, 7, 10)
    x[300:330] = x[20:50]  # ties across slabs
    free = 150 * 2 * (12 * 7 + 16 * 8 + 96)  # room for 150 references at a time, and 44 queries
    monkeypatch.setattr(_knn_native, "free_bytes", lambda device: free)
    monkeypatch.setattr(_knn_native, "cuda_devices", lambda: [torch.device("cpu")] * devices)
    seen: list[tuple[int, int]] = []
    distances, indices = knn(x, k=5, backend="cuda", progress=lambda done, total: seen.append((done, total)))
    expected, expected_index = brute_force(x, None, 5)
    np.testing.assert_allclose(distances, np.sqrt(expected), rtol=2e-7)
    np.testing.assert_array_equal(indices, expected_index)
    assert seen == sorted(seen)
    assert seen[-1] == (400, 400)

    np.save(tmp_path / "states.npy", x)
    mapped = np.load(tmp_path / "states.npy", mmap_mode="r")
    np.testing.assert_array_equal(knn(mapped[:90], mapped, k=3, backend="cuda")[1], brute_force(x[:90], x, 3)[1])

    def cancel(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        knn(x, k=3, backend="cuda", progress=cancel)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_one_device_that_holds_everything(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_knn_cuda, "LIST_BYTES", 1)  # a group a portion
    x = torch.from_numpy(surface(200, 5, 11)).to(torch.float16)
    seen: list[int] = []
    distances, indices = knn(x, k=4, backend=backend, progress=lambda done, total: seen.append(done))
    assert seen == [*range(32, 200, 32), 200]
    assert distances.dtype == torch.float32
    np.testing.assert_array_equal(indices, brute_force(x.numpy(), None, 4)[1])
    y = torch.from_numpy(surface(150, 5, 12)).double()
    np.testing.assert_array_equal(knn(y, x, k=4, backend=backend)[1], brute_force(y.numpy(), x.numpy(), 4)[1])


@pytest.mark.parametrize("backend", ALL, indirect=True)
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
