"""The compiled core, and which implementation of an op runs: "auto" resolved to "cpu", "cuda" or "torch"."""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

try:
    import sdw_fast._C as _C
except ImportError as error:
    raise ImportError(
        f"the compiled core of sdw_fast is not built, or does not load ({error}): run `pip install -e .` or "
        "`make setup` in the source checkout"
    ) from error

__all__ = [
    "_C",
    "check_precision",
    "cuda_memory",
    "cuda_stream",
    "cuda_workspace",
    "float32_products",
    "follow_torch",
    "obstacle",
    "one_thread",
    "resolve_backend",
    "views",
    "without_autocast",
]


def resolve_backend(op: str, backend: str, tensors: Iterable[torch.Tensor]) -> str:
    """Resolves the `backend` argument of `op` for these tensors.

    A compiled backend takes float32 tensors on its own device; "torch" takes everything. "auto" is the compiled
    backend of the tensors' device wherever it applies, else "torch"; on a GPU that the kernels do not support, with a
    warning the first time.

    Returns:
        "cpu", "cuda" or "torch".

    Raises:
        ValueError: backend is unknown, not compiled, or does not take these tensors, or the tensors lie on different
            devices. The message lists what is available.
    """
    tensors = list(tensors)
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {sorted(map(str, devices))}")
    device = devices.pop()
    single = all(tensor.dtype == torch.float32 for tensor in tensors)
    compiled = single and hasattr(_C, f"{op}_{device.type}")
    reason = obstacle(device) if compiled else ""
    available = [device.type] if compiled and not reason else []
    available.append("torch")
    if backend == "auto":
        if reason:
            warn_once(reason)
        return available[0]
    if backend not in available:
        dtypes = sorted({str(tensor.dtype) for tensor in tensors})
        raise ValueError(
            f"{op}: backend {backend!r} is not available for {', '.join(dtypes)} tensors on {device}; "
            f"choose one of {['auto', *available]}{f' ({reason})' if reason else ''}"
        )
    return backend


def obstacle(device: torch.device) -> str:
    """Why the compiled kernels cannot run on a device; "" where they can."""
    if device.type != "cuda" or not hasattr(_C, "cuda_obstacle"):
        return ""
    if device.index is not None:
        return _obstacle_of_gpu(device.index)
    return _obstacle_of_gpu(torch.cuda.current_device()) if torch.cuda.is_available() else ""


@functools.cache
def _obstacle_of_gpu(index: int) -> str:
    return _C.cuda_obstacle(index)


@functools.cache
def warn_once(reason: str) -> None:
    """Warns that PyTorch computes in place of the kernels: a user expects a result, and to be told that it is slow."""
    warnings.warn(f'{reason}; "auto" takes PyTorch in their place, which is slower', stacklevel=4)


def views(*tensors: torch.Tensor | None) -> Any:
    """What a kernel takes for these tensors: on the host as NumPy arrays, whose DLPack costs a sixth of a tensor's."""
    taken: list[Any] = []
    for tensor in tensors:
        plain = None if tensor is None else tensor.detach().contiguous()
        taken.append(plain if plain is None or plain.is_cuda else plain.numpy())
    return taken


@contextmanager
def cuda_stream(tensor: torch.Tensor) -> Iterator[int]:
    """Makes the device of a CUDA tensor current, and gives the handle of PyTorch's current stream there; else 0."""
    if not tensor.is_cuda:
        yield 0
        return
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


def cuda_workspace(op: str, size: int, device: torch.device, advice: str) -> torch.Tensor:
    """Allocates the `size` bytes that a compiled CUDA op works in.

    Raises:
        MemoryError: they are not free. The message says how many are, and `advice`, what to do.
    """
    with cuda_memory(op, advice):
        return torch.empty(size, dtype=torch.uint8, device=device)


@contextmanager
def cuda_memory(op: str, advice: str) -> Iterator[None]:
    """Raises MemoryError where PyTorch runs out of a GPU's memory: what was asked for, what is free, and `advice`."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(f"{op}: {str(error).splitlines()[0]}; {advice}") from error


def check_precision(op: str, precision: str) -> None:
    """Raises ValueError unless `precision` is "tf32" or "ieee"."""
    if precision not in ("tf32", "ieee"):
        raise ValueError(f"{op}: precision must be 'tf32' or 'ieee', got {precision!r}")


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which the twins compute in their tensors' own precision, as the kernels do."""
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Makes PyTorch's float32 products on a GPU "tf32" or "ieee", whatever the user has set, which is put back."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        put: Callable[[str], None] = partial(setattr, matmul, "fp32_precision")
        before = matmul.fp32_precision
        put("none")
        if matmul.fp32_precision == before:  # it follows torch.backends.fp32_precision, and shall do so again
            before = "none"
        put(precision)
    else:  # before torch 2.9
        put = torch.set_float32_matmul_precision
        before = torch.get_float32_matmul_precision()
        put({"tf32": "high", "ieee": "highest"}[precision])
    try:
        yield
    finally:
        put(before)


# The number of threads that the user chose for the kernels; None: PyTorch's, whatever it is at the time of a call.
_chosen_threads: int | None = None
# In `one_thread`, what the kernels follow in place of PyTorch's number.
_followed_threads: ContextVar[int | None] = ContextVar("followed_threads", default=None)


def set_num_threads(threads: int) -> None:
    """Sets the number of threads the compiled kernels use; by default they run in those of PyTorch.

    Raises:
        ValueError: below 1.
    """
    global _chosen_threads
    _C.set_num_threads(threads)
    _chosen_threads = threads


def get_num_threads() -> int:
    """Returns the number of threads the compiled kernels use."""
    return _chosen_threads or _followed_threads.get() or torch.get_num_threads()


def follow_torch() -> None:
    """Before a kernel runs on the CPU: its threads are PyTorch's, unless the user chose another number."""
    threads = get_num_threads()
    _C.set_num_threads(threads, shared=threads == (_followed_threads.get() or torch.get_num_threads()))


def _give_openmp() -> None:
    """Tells the kernels where PyTorch's OpenMP runtime lies in the process, so that they run in its threads.

    `import torch` has loaded it with its names visible to all. Elsewhere than on Linux, or where PyTorch was built with
    another kind of threads, the kernels have threads of their own.
    """
    if sys.platform != "linux":
        return
    process = ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num", "omp_in_parallel")
    with suppress(AttributeError):
        _C.set_openmp(*(ctypes.cast(getattr(process, name), ctypes.c_void_p).value or 0 for name in names))


_give_openmp()


@contextmanager
def one_thread() -> Iterator[None]:
    """Has PyTorch compute with one thread, and puts the caller's number back; the kernels keep theirs.

    For many small operations, which more threads do not make faster: those of PyTorch spin for milliseconds after each
    operation, on cores that the kernels want, and an operation waits for all of them, also on crowded cores.
    """
    before = torch.get_num_threads()
    followed = _followed_threads.set(get_num_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _followed_threads.reset(followed)
