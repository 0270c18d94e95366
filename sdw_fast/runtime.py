"""What was built and what is used: instruction set, threads, CUDA, optional libraries."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sdw_fast import shipped
from sdw_fast.ops._backend import _C, get_num_threads, obstacle, set_num_threads
from sdw_fast.version import __version__

__all__ = ["get_num_threads", "set_num_threads", "show_config"]


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Shows what was built and what is used: versions, compiled backends, instruction set, threads, libraries, devices.

    Args:
        mode: "stdout" prints it, a line each; "dicts" returns it, as `numpy.show_config` does.

    Returns:
        None, or a dict of plain values (JSON-serializable).

    Raises:
        ValueError: another mode.
    """
    if mode == "dicts":
        return _config()
    if mode != "stdout":
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    for name, value in _config().items():
        print(f"{name:<28}{value}")
    return None


def _config() -> dict[str, Any]:
    return {
        "sdw_fast": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "compiled_backends": ["cpu", "cuda"] if _C.has_cuda else ["cpu"],
        "instruction_set": _C.active_isa(),
        "instruction_sets_available": _C.supported_isas(),
        "threads": get_num_threads(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cuda_architectures": [f"sm_{number}" for number in _C.cuda_architectures()] if _C.has_cuda else [],
        "cuda_device": _cuda_device(),
        "faiss": _faiss_version(),
        "torchrl": _version("torchrl"),
        "zuko": _version("zuko"),
        "mujoco": _version("mujoco"),
        "pretrained_teachers": shipped.names("teacher"),
        "pretrained_sets": shipped.names("set"),
    }


def _cuda_device() -> str:
    if not _C.has_cuda:
        return f"not compiled ({_C.cuda_left_out})"
    reason = obstacle(torch.device("cuda")) if torch.cuda.is_available() else ""
    return reason or _C.cuda_device_description()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _faiss_version() -> str | None:
    if importlib.util.find_spec("faiss") is None:
        return None
    import faiss

    return f"{faiss.__version__}{' with GPU' if hasattr(faiss, 'StandardGpuResources') else ''}"


# PyTorch's own threads do not live on in a forked child, and work that is shared out to them would wait for ever there.
# The kernels start theirs for each call.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
