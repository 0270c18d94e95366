"""Which implementation of an op runs: what `backend` may name, on which device."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdw_fast.ops import _backend
from sdw_fast.ops._backend import resolve_backend
from sdw_fast.ops.knn import choose_backend

OLD = "Tesla T4, sm_75, cannot run the CUDA kernels, which need sm_80 or newer and were compiled for sm_80, sm_90"


def tensor(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """What is asked of a tensor; there is no GPU to put one on."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A core with CUDA on a machine of which cuda:0 is supported and cuda:1 is too old."""
    core = SimpleNamespace(
        unrolled_bc_cpu=None,
        unrolled_bc_cuda=None,
        knn_cuda=None,
        knn_cuda_max_dims=64,
        knn_cuda_max_k=256,
        cuda_obstacle=lambda device: OLD if device == 1 else "",
    )
    for module in ("_backend", "knn"):  # `sdw_fast.ops.knn` by name is the function
        monkeypatch.setattr(sys.modules[f"sdw_fast.ops.{module}"], "_C", core)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    _backend._obstacle_of_gpu.cache_clear()
    _backend.warn_once.cache_clear()
    yield
    _backend._obstacle_of_gpu.cache_clear()
    _backend.warn_once.cache_clear()


@pytest.mark.usefixtures("two_gpus")
def test_auto_takes_the_kernels_where_they_apply() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("unrolled_bc", "auto", [tensor("cuda:0")]) == "cuda"
        assert resolve_backend("unrolled_bc", "auto", [tensor("cpu")]) == "cpu"
        assert resolve_backend("unrolled_bc", "auto", [tensor("cuda:1", torch.float64)]) == "torch"


@pytest.mark.usefixtures("two_gpus")
def test_tensors_of_two_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be on one device, got \['cuda:0', 'cuda:1'\]"):
        resolve_backend("unrolled_bc", "auto", [tensor("cuda:0"), tensor("cuda:1")])


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_too_old_gets_pytorch_and_one_warning() -> None:
    with pytest.warns(UserWarning, match="Tesla T4, sm_75, cannot run .* slower"):
        assert resolve_backend("unrolled_bc", "auto", [tensor("cuda:1")]) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("unrolled_bc", "auto", [tensor("cuda:1")]) == "torch"
    with pytest.raises(ValueError, match=r"choose one of \['auto', 'torch'\] \(Tesla T4, sm_75, .*\)"):
        resolve_backend("unrolled_bc", "cuda", [tensor("cuda:1")])


def test_a_workspace_that_is_not_free_is_a_memory_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*size: int, **options: Any) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(MemoryError, match=r"^unrolled_bc: CUDA out of memory\. Tried .* 2\.00 GiB\.; fewer rows$"):
        _backend.cuda_workspace("unrolled_bc", 2 << 30, torch.device("cuda"), "fewer rows")


@pytest.mark.usefixtures("two_gpus")
def test_neighbors_on_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no FAISS
    assert choose_backend("auto", "cuda:0", 17, 10)[0] == "native"
    with pytest.warns(UserWarning, match="sm_75"):
        assert choose_backend("auto", "cuda:1", 17, 10)[0] == "torch"
    with pytest.raises(ValueError, match=r"'cuda' is not available for data on cuda:1 .*Tesla T4, sm_75"):
        choose_backend("cuda", "cuda:1", 17, 10)
