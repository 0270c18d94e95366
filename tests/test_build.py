"""What CMake is told: what the user says; warnings are errors on request only; too old architectures end the build."""

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


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup.py needs, in a path with a space; a CMake that writes down what it is told."""
    folder = tmp_path / "a checkout"
    (folder / "sdw_fast").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "sdw_fast/version.py"):
        shutil.copy(ROOT / name, folder / name)
    (tmp_path / "bin").mkdir()
    cmake = tmp_path / "bin" / "cmake"
    cmake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "$CMAKE_BUILD_PARALLEL_LEVEL jobs" >> "{tmp_path}/told"\n')
    cmake.chmod(0o755)
    return folder


def build(checkout: Path, **environment: str) -> list[str]:
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    path = os.pathsep.join([str(checkout.parent / "bin"), PATH])
    environment = {**os.environ, "PATH": path, **environment}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (checkout.parent / "told").read_text().splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="the CMake of this test is a shell script")
def test_cmake_is_told_what_the_user_says(checkout: Path) -> None:
    told = build(checkout, CMAKE_ARGS="-DONE='a b' -DTWO=2", CMAKE_BUILD_PARALLEL_LEVEL="3")
    assert {"-DONE=a b", "-DTWO=2", "3 jobs", str(checkout)} <= set(told)


@pytest.mark.skipif(sys.platform == "win32", reason="the CMake of this test is a shell script")
def test_a_build_folder_is_used_again_unless_cmake_would_not_notice_the_difference(checkout: Path) -> None:
    def kept(checkout: Path, **environment: str) -> bool:
        build(checkout, **environment)
        (folder,) = (checkout / "build").glob("cmake-*")
        before = (folder / "marker").exists()
        (folder / "marker").touch()
        return before

    assert not kept(checkout)
    assert kept(checkout)
    assert not kept(checkout, CXX="c++")  # CMake takes the compiler of the first time for ever
    assert not kept(checkout.rename(checkout.parent / "moved"), CXX="c++")


def test_a_source_folder_that_cannot_be_written_is_named(checkout: Path) -> None:
    script = "import os, runpy; os.access = lambda *_: False; runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], cwd=checkout, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip().endswith("a checkout is read-only: install from a copy of it.")
