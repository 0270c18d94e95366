"""Processes that share a study: no cell is done twice at a time, and a dead process's is done by another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies import claims

CELLS = [f"hopper/medium/sdw,lr=0.0{number}/{number}" for number in range(12)]


def _share(folder: Path, start: Any) -> None:
    """A process of a study: it goes through all cells, and does those that it can claim and that are not done."""
    start.wait()
    for _ in range(2):
        for cell in CELLS:
            result = folder / cell.replace("/", "~")
            with claims.claimed(folder / "claims", cell) as ours:
                if ours and not result.exists():
                    time.sleep(0.002)
                    with (folder / "log").open("a") as log:
                        log.write(f"{cell}\n")
                    result.touch()


def test_processes_never_do_the_same_cell(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=_share, args=(tmp_path, start)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert sorted((tmp_path / "log").read_text().split()) == sorted(CELLS)
    assert not any((tmp_path / "claims").iterdir())


def _die(folder: Path) -> None:
    with claims.claimed(folder, "a/cell"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_claim_of_a_dead_process_lapses(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path,))
    process.start()
    process.join()
    [left] = tmp_path.iterdir()
    assert str(process.pid) in left.read_text()
    with claims.claimed(tmp_path, "a/cell") as ours:
        assert not ours
    long_ago = time.time() - claims.LAPSED - 1
    os.utime(left, (long_ago, long_ago))
    with claims.claimed(tmp_path, "a/cell") as ours, claims.claimed(tmp_path, "a/cell") as another:
        assert ours
        assert not another
    assert not any(tmp_path.iterdir())


def test_a_claim_is_renewed_while_its_holder_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RENEWED", 0.01)
    with claims.claimed(tmp_path, "cell") as ours:
        assert ours
        [file] = tmp_path.iterdir()
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        with claims.claimed(tmp_path, "cell") as another:
            assert not another


def test_who_was_taken_for_dead_leaves_the_claim_to_the_other(tmp_path: Path) -> None:
    with claims.claimed(tmp_path, "cell"):
        [own] = tmp_path.iterdir()
        os.utime(own, (0, 0))  # as on a machine that slept
        other = claims.claimed(tmp_path, "cell")
        assert other.__enter__()
    assert [file.name for file in tmp_path.iterdir()] == ["cell.1"]
    other.__exit__(None, None, None)
