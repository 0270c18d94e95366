"""benchmarks/gpu_check.sh: a stage that fails or hangs costs itself only, and two files come back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks/gpu_check.sh"
# Stands for Python: one table hangs, one fails, one leaves a result; there is no GPU.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
    *get_device_name*) exit 1 ;;
    *"table outer_step"*) exec sleep 600 ;;
    *"table unrolled_bc"*) exit 7 ;;
    *"table ceilings"*) echo {} >"$(echo "$*" | sed 's/.*--out \([^ ]*\).*/\1/')/ceilings.jsonl" ;;
esac
echo "called with $*"
"""


@pytest.fixture
def check(tmp_path: Path):
    """Runs the script in a folder of its own."""
    for name, content in {"python": PYTHON, "cmake": "#!/bin/sh\n", "ninja": "#!/bin/sh\n"}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")

    def run(*stages: str, **variables: str) -> tuple[int, str]:
        environment = {"PYTHON": str(tmp_path / "bin/python"), "OUT": str(tmp_path / "out"), "SDW_PATIENCE": "4"}
        environment |= variables
        command = [str(tmp_path / "benchmarks/gpu_check.sh"), *stages]
        result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
        return result.returncode, result.stdout + result.stderr

    return run


def test_what_hangs_or_fails_costs_itself_only(check, tmp_path: Path) -> None:
    status, output = check("--dry-run", "ops")
    assert status == 1
    outcomes = [line.removeprefix("-- ") for line in output.splitlines() if line.startswith("-- ")]
    assert outcomes[0].startswith("build: done")
    assert outcomes[1].startswith("every op once: done")
    assert outcomes[2] == "table: outer_step: FAILED, ran out of its 2 s"
    assert outcomes[3].startswith("table: unrolled_bc: FAILED with status 7")
    assert all("done" in outcome for outcome in outcomes[4:])
    assert output.rstrip().endswith("FAILED: table: outer_step,table: unrolled_bc")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "results.tar.gz"]
    assert (tmp_path / "out/log.txt").read_text() == output
    with tarfile.open(tmp_path / "out/results.tar.gz") as tar:
        assert "./ceilings.jsonl" in tar.getnames()


def test_stages_are_named(check) -> None:
    status, output = check("--dry-run", "knn", "distill")
    assert status == 0
    assert "benchmarks.bench_knn_gpu surface:17" in output
    assert "benchmarks.gpu_distill --returns" in output
    assert "table" not in output
    assert check("everything")[0] == 2


def test_an_extension_from_elsewhere_is_taken_as_it_is(check) -> None:
    _, output = check("--dry-run", "build", SDW_PREBUILT="1")
    assert "== build" not in output
    assert "-- prebuilt: done" in output


def test_without_a_gpu_nothing_is_run(check) -> None:
    status, output = check()
    assert status == 3
    assert "NO GPU: try --dry-run" in output
    assert "build" not in output


def test_a_test_that_waits_for_ever_ends_with_where_it_was(tmp_path: Path) -> None:
    hang = (
        "import ctypes\n\n\ndef test_hang():\n    ctypes.PyDLL(None).sleep(60)  # holds the interpreter, as a GPU may\n"
    )
    (tmp_path / "test_hang.py").write_text(hang)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "--capture=sys"]
    environment = {**os.environ, "SDW_TEST_SECONDS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = subprocess.run(
        [*command, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert "in test_hang" in result.stderr
