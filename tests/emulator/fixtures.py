"""Fixtures that run an op's implementations: PyTorch, CPU, CUDA on a GPU, and CUDA without one.

Without a GPU the CUDA kernels are compiled by the host compiler, every CUDA thread a fiber (emulator.h).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from sdw_fast import _C

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CORE = ROOT / "csrc"
# -U: checked longjmp takes a change of stack for an attack.
FLAGS = "-O2 -fPIC -pthread -std=c++17 -fvisibility=hidden -DSDW_WITH_CUDA -DSDW_EMULATE_CUDA -U_FORTIFY_SOURCE "
FLAGS += "-Wall -Wextra -Wshadow -Wno-unknown-pragmas"
FLAGS += " -Werror" if os.environ.get("SDW_WERROR", "0") != "0" else ""
GUARD = 256  # bytes behind every workspace


class Kernel(NamedTuple):
    """An implementation of the ops."""

    backend: str  # as they take it
    device: str  # where its tensors lie


@pytest.fixture(params=["torch", "cpu", "emulated", "cuda"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Every implementation in turn; `parametrize(..., indirect=["kernel"])` names some."""
    if request.param == "emulated":
        request.getfixturevalue("cuda_on_cpu")
        return Kernel("cuda", "cpu")
    if request.param == "cuda" and not (torch.cuda.is_available() and _C.has_cuda):
        pytest.skip("no GPU")
    return Kernel(request.param, "cuda" if request.param == "cuda" else "cpu")


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The module of the emulated kernels, with `set_seed` for the scheduler and `set_multiprocessors`."""
    if os.environ.get("SDW_SANITIZE"):
        pytest.skip("sanitizers do not follow the fibers' changes of stack")
    if os.environ.get("SDW_EMULATOR") == "0":
        pytest.skip("left out: SDW_EMULATOR=0")
    import fcntl  # which Windows does not have

    sources = [HERE / "emulated.cpp", CORE / "cpu" / "isa.cpp", *(CORE / "cuda").glob("*.cu")]
    sources += (CORE / "bindings").glob("*.cpp")
    not_emulated = {CORE / "cuda" / "device.cu", CORE / "bindings" / "module.cpp", CORE / "bindings" / "runtime.cpp"}
    cache = Path(tempfile.gettempdir()) / f"sdw_emulated_{os.getuid()}"
    cache.mkdir(exist_ok=True)
    with (cache / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one compiles
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _compile(source, cache), sorted(set(sources) - not_emulated)))
        path = cache / _digest(*objects) / f"sdw_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            _produce(path, ["-shared", "-pthread", *map(str, objects)])
    spec = importlib.util.spec_from_file_location("sdw_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_on_cpu(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """backend="cuda" of every op takes CPU tensors and runs the emulated kernels; workspaces are guarded."""
    workspaces = []

    def workspace(op: str, size: int, device: torch.device, advice: str = "") -> torch.Tensor:
        workspaces.append(torch.full((size + GUARD,), 0xFF, dtype=torch.uint8))  # NaN
        return workspaces[-1][:size]

    replacements = {
        "_C": SimpleNamespace(**{**vars(_C), **vars(emulated)}),
        "resolve_backend": lambda op, backend, tensors: backend,
        "cuda_stream": lambda tensor: nullcontext(0),
        "cuda_workspace": workspace,
    }
    for module in [module for name, module in sys.modules.items() if name.startswith("sdw_fast.ops.")]:
        for name in replacements.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, replacements[name])
    emulated.set_seed(1)
    emulated.set_multiprocessors(4)
    emulated.set_shared_limit(227 * 1024)
    yield emulated
    for workspace in workspaces:
        assert bool((workspace[-GUARD:] == 0xFF).all()), "a kernel wrote behind its workspace"


def _compile(source: Path, cache: Path) -> Path:
    """Returns the object file of `source`, compiled now if neither it nor any header has been before."""
    import pybind11

    headers = [*sorted(CORE.rglob("*.h")), *sorted(HERE.glob("*.h"))]
    target = cache / f"{source.stem}-{_digest(source, *headers)}.o"
    if not target.exists():
        includes = [f"-I{CORE / 'include'}", f"-I{HERE}"]
        includes += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        _produce(target, [*FLAGS.split(), *includes, "-c", "-x", "c++", str(source)])
    return target


def _produce(target: Path, arguments: list[str]) -> None:
    unfinished = target.with_suffix(f".{os.getpid()}")
    run: Any = subprocess.run(
        [os.environ.get("CXX", "c++"), *arguments, "-o", str(unfinished)], capture_output=True, text=True
    )
    if run.returncode != 0:
        pytest.fail(f"{target.name} does not build:\n{run.stderr}", pytrace=False)
    unfinished.rename(target)


def _digest(*files: Path) -> str:
    digest = hashlib.sha256(FLAGS.encode())
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
