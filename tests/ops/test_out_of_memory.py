"""Memory and threads that the system refuses: MemoryError or fewer threads, and nothing is left behind."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import refusals


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("replaces libstdc++'s functions as the loader of glibc allows")
    if os.environ.get("SDW_SANITIZE"):
        pytest.skip("sanitizers replace operator new themselves")
    return refusals.build(tmp_path_factory.mktemp("refusals"))


def run(library: Path, what: str) -> list[int]:
    same_packages = {"PYTHONPATH": os.pathsep.join(sys.path), "LD_PRELOAD": str(library)}
    command = [sys.executable, refusals.__file__, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **same_packages})
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@pytest.mark.parametrize("op", ["knn", "unrolled_bc", "behavior_matching", "weighted_bc_loss"])
def test_every_request_refused(library: Path, op: str) -> None:
    refused, answered = run(library, op)
    assert refused >= 20  # the library was in the way
    assert 0 < answered < refused / 2  # in fewer threads


def test_forks_while_memory_is_freed(library: Path) -> None:
    assert run(library, "forks") == [10]


def test_a_thread_refused_where_pytorchs_are_shared(library: Path) -> None:
    assert run(library, "shared") == [1]
