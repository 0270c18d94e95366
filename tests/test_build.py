"""What CMake is told: warnings are errors on request only, and architectures without support end the build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/local/cuda/bin"])
CMAKE = shutil.which("cmake", path=PATH)
pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs CMake")


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(CMAKE), "-S", str(ROOT), "-B", str(folder), "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": PATH, **environment})


@pytest.mark.parametrize("wanted", [False, True])
def test_warnings_are_errors_on_request_only(tmp_path: Path, wanted: bool) -> None:
    run = configure(tmp_path, "-DSDW_CUDA=0", *["-DSDW_WERROR=1"] * wanted)
    assert run.returncode == 0, run.stderr
    commands = [entry["command"].split() for entry in json.loads((tmp_path / "compile_commands.json").read_text())]
    assert all("-Wall" in command and ("-Werror" in command) == wanted for command in commands)


@pytest.mark.skipif(shutil.which("nvcc", path=PATH) is None, reason="needs nvcc")
def test_an_architecture_that_is_too_old_ends_the_build(tmp_path: Path) -> None:
    run = configure(tmp_path, "-DSDW_CUDA=1", CUDAARCHS="75-real;90")
    assert run.returncode != 0
    assert "need sm_80 (Ampere) or newer, and sm_75 was asked for" in " ".join(run.stderr.split())
