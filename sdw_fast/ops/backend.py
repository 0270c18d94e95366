"""Which implementation of an op runs: "auto" resolved to "cpu", "cuda" or "torch", and refusals that name choices."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sdw_fast import _C


def resolve_backend(op: str, backend: str, tensors: Iterable[torch.Tensor]) -> str:
    """Resolves the `backend` argument of `op` for these tensors.

    A compiled backend takes float32 tensors on its own device; "torch" takes everything. "auto" is the compiled
    backend of the tensors' device wherever it applies, else "torch".

    Returns:
        "cpu", "cuda" or "torch".

    Raises:
        ValueError: backend is unknown, not compiled, or does not take these tensors, or the tensors lie on different
            devices. The message lists what is available.
    """
    tensors = list(tensors)
    devices = {tensor.device.type for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {sorted(devices)}")
    device = devices.pop()
    single = all(tensor.dtype == torch.float32 for tensor in tensors)
    compiled = {"cpu": hasattr(_C, op), "cuda": hasattr(_C, f"{op}_cuda")}
    available = [name for name in ("cpu", "cuda") if compiled[name] and name == device and single] + ["torch"]
    if backend == "auto":
        return available[0]
    if backend not in available:
        dtypes = sorted({str(tensor.dtype) for tensor in tensors})
        raise ValueError(
            f"{op}: backend {backend!r} is not available for {', '.join(dtypes)} tensors on {device}; "
            f"choose one of {['auto', *available]}"
        )
    return backend
