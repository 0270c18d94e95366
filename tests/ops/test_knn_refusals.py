"""What knn refuses, which backend it takes, and what is particular to FAISS."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import brute_force, surface

from sdw_fast import _C
from sdw_fast.ops import _knn_faiss, _knn_native, knn
from sdw_fast.ops.knn import choose_backend

MEMINFO = Path("/proc/meminfo")
HAS_FAISS = importlib.util.find_spec("faiss") is not None


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
    with pytest.raises(ValueError, match="meta"):
        knn(torch.zeros((5, 2), device="meta"), k=1)


def test_the_largest_number() -> None:
    # Squares of 1e37 leave float32's range; the coordinates are scaled, the distance itself does not leave it.
    x = np.array([[0.0], [9e36], [2e36]])
    np.testing.assert_array_equal(knn(x, k=1)[0], np.array([[2e36], [7e36], [2e36]], np.float32))
    with pytest.raises(ValueError, match=r"queries reach 1.1e\+37; .*Scale them down"):
        knn(np.array([[0.0], [-1.1e37]]), k=1)
    with pytest.raises(ValueError, match=r"references reach 1.1e\+37"):
        knn(x, np.array([[0.0], [-1.1e37]]), k=1)


def test_out_that_does_not_fit() -> None:
    x, distances, indices = np.zeros((5, 2), np.float32), np.zeros((5, 1), np.float32), np.zeros((5, 1), np.int64)
    with pytest.raises(ValueError, match="out distances must be float32 of shape"):
        knn(x, k=1, out=(np.zeros((5, 2), np.float32), indices))
    with pytest.raises(ValueError, match="out indices must be int64 of shape"):
        knn(x, k=1, out=(distances, indices.astype(np.int32)))
    with pytest.raises(TypeError, match="out distances must be of the kind of queries"):
        knn(x, k=1, out=(torch.zeros(5, 1), indices))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out indices must be writable, with no negative strides"):
        knn(x, k=1, out=(distances, indices[::-1]))
    distances.flags.writeable = False
    with pytest.raises(ValueError, match="out distances must be writable"):
        knn(x, k=1, out=(distances, indices))


@pytest.mark.skipif(not MEMINFO.exists(), reason="the system does not say what is free")
def test_a_tree_larger_than_memory() -> None:
    import resource  # which Windows does not have

    # Asked of the compiled core itself: knn would first read the pages, which here are never touched.
    kibibytes = re.search(r"MemAvailable:\s+(\d+)", MEMINFO.read_text())
    assert kibibytes is not None
    rows = int(1.3 * 1024 * int(kibibytes[1])) // (9 * 32 + 16)
    x = torch.empty((rows, 32))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))  # without the check an allocation would fail
    try:
        with pytest.raises(MemoryError, match=r"\d+ points of 32 numbers needs \d+ MiB; \d+ MiB are available"):
            _C.KnnIndex(x, x, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class Taken(Exception):
    pass


def test_auto_takes_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*arguments: object) -> None:
        raise Taken

    x = torch.zeros(5, 2)
    monkeypatch.setattr(_C, "KnnIndex", taken)
    for options in ({}, {"backend": "auto"}, {"backend": "native"}):
        with pytest.raises(Taken):
            knn(x, k=1, **options)
    knn(x, k=1, backend="torch")


def test_what_is_available_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without CUDA there is no CUDA tensor to pass; what decides for one is asked directly.
    monkeypatch.delattr(_C, "knn_cuda", raising=False)
    with pytest.raises(ValueError, match=r"'native' is not available for data on cuda; choose one of .*torch"):
        choose_backend("native", "cuda", 3, 1)
    assert choose_backend("auto", "cuda", 3, 1)[0] in ("torch", "faiss")
    assert choose_backend("auto", "cpu", 3, 1)[0] == "native"


@pytest.mark.usefixtures("cuda_on_cpu")
def test_what_is_available_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_knn_native, "cuda_devices", lambda: [])
    assert choose_backend("auto", "cuda", 17, 10)[0] == "native"
    assert choose_backend("cuda", "cuda", 64, 256)[0] == "cuda"
    assert choose_backend("auto", "cuda", 65, 10)[0] in ("torch", "faiss")
    assert choose_backend("auto", "cuda", 17, 257)[0] in ("torch", "faiss")
    with pytest.raises(ValueError, match="'native' is not available for data on cuda of 65 dimensions with k = 10"):
        choose_backend("native", "cuda", 65, 10)
    with pytest.raises(ValueError, match="'cuda' is not available for data on cpu"):
        choose_backend("cuda", "cpu", 17, 10)
    monkeypatch.setattr(_knn_native, "cuda_devices", lambda: [torch.device("cuda", 0)])
    assert choose_backend("cuda", "cpu", 17, 10)[0] == "cuda"
    assert choose_backend("auto", "cpu", 17, 10)[0] == "native"


@pytest.mark.skipif(not HAS_FAISS, reason="needs faiss")
@pytest.mark.parametrize(("has_gpu", "taken"), [(True, "faiss"), (False, "torch")])
def test_auto_where_the_kernel_does_not_apply(monkeypatch: pytest.MonkeyPatch, has_gpu: bool, taken: str) -> None:
    monkeypatch.delattr(_C, "knn_cuda", raising=False)
    monkeypatch.setattr(_knn_faiss, "has_gpu", lambda: has_gpu)
    assert choose_backend("auto", "cuda", 3, 1) == (taken, "Flat")
    assert choose_backend("faiss:IVF4,Flat;nprobe=2", "cpu", 3, 1) == ("faiss", "IVF4,Flat;nprobe=2")


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "sdw_fast\[faiss\]"'):
        knn(np.zeros((5, 2)), k=1, backend="faiss")
    with pytest.raises(ValueError, match=r"choose one of \['auto', 'native', 'torch'"):
        knn(np.zeros((5, 2)), k=1, backend="cpu")


@pytest.mark.skipif(not HAS_FAISS, reason="needs faiss")
def test_faiss_by_name_and_probes() -> None:
    x = np.random.default_rng(4).standard_normal((2000, 4)).astype(np.float32)
    distances, indices = knn(x, k=5, backend="faiss:IVF16,Flat;nprobe=16")
    squared, expected = brute_force(x, None, 5)
    np.testing.assert_allclose(distances, np.sqrt(squared), rtol=2e-7, atol=1e-30)
    np.testing.assert_array_equal(indices, expected)
    with pytest.raises(ValueError, match="nonsense"):
        knn(x, k=5, backend="faiss:nonsense")
    # One cell of sixteen holds fewer than 400 rows: the rest is missing.
    distances, indices = knn(x, k=400, backend="faiss:IVF16,Flat;nprobe=1")
    assert (indices == -1).any()
    np.testing.assert_array_equal(indices == -1, np.isinf(distances))


@pytest.mark.skipif(not HAS_FAISS, reason="needs faiss")
def test_faiss_on_a_gpu_gets_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    # What knn hands to faiss.knn_gpu and makes of its answer, with the product form in its place.
    pytest.importorskip("faiss.contrib.torch_utils")
    import faiss

    def knn_gpu(resources: object, x: torch.Tensor, y: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dtype == y.dtype == torch.float32
        distances, indices = (y.square().sum(1) - 2 * x @ y.T).topk(k, largest=False)
        return distances, indices

    monkeypatch.setattr(faiss, "knn_gpu", knn_gpu, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", SimpleNamespace, raising=False)
    monkeypatch.setattr(_knn_faiss, "index_search", _knn_faiss.brute_force_on_gpu)
    monkeypatch.setattr(_knn_faiss, "cuda_stream", lambda tensor: torch.no_grad())
    x = torch.from_numpy(surface(300, 9, 16)) + 1000
    distances, indices = knn(x, k=4, backend="faiss")
    expected, expected_index = brute_force(x.numpy(), None, 4)
    np.testing.assert_array_equal(indices, expected_index)
    np.testing.assert_allclose(distances, np.sqrt(expected), rtol=2e-7)
