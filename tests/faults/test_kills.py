"""Kills at every file event of a run: whatever was written last, the next start ends in the files of a whole run."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import three_episodes

import sdw_fast as sdw
from sdw_fast.folder import read_metrics


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What a fork leaves of other threads is not the question here."""
    before = sdw.get_num_threads()
    sdw.set_num_threads(1)
    yield
    sdw.set_num_threads(before)


def distill(out: Path) -> sdw.SyntheticDataset:
    settings = {"objective": "dbc", "size": 4, "hidden": (4,), "inner_steps": 2, "batch_size": 4, "steps": 3}
    data = sdw.load_dataset(three_episodes())
    return sdw.distill(data, **settings, checkpoint_every=1, out=out, progress=False)


def killed_at(event: int, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Does the work in a process that is killed before or after a rename or a flush to the disk; whether it came there.

    Event 2n is just before the n-th of them, 2n + 1 just after.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    passed = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal passed
            for count in (True, False):
                if passed == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                passed += 1
                if count:
                    result = function(*arguments)
            return result

        return call

    with contextlib.suppress(BaseException):
        monkeypatch.setattr(os, "fsync", counted(os.fsync))
        monkeypatch.setattr(Path, "replace", counted(Path.replace))
        work()
        os._exit(0)
    os._exit(1)


def test_a_run_killed_at_any_file_event_ends_in_the_same_files(tmp_path: Path, monkeypatch) -> None:
    whole = distill(tmp_path / "whole")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.npz")}
    assert kept.keys() == {"states.npz", "best.npz", "last.npz"}
    others = {".lock", "checkpoint", "config.json", "metrics.jsonl"}
    for event in range(200):
        out = tmp_path / str(event)
        killed = killed_at(event, lambda out=out: distill(out), monkeypatch)
        np.testing.assert_array_equal(distill(out).observations, whole.observations, err_msg=str(event))
        assert {path.name: path.read_bytes() for path in out.glob("*.npz")} == kept, event
        assert [step["step"] for step in read_metrics(out)] == [1, 2, 3], event
        names = {path.name for path in out.iterdir()}
        assert names == others | kept.keys(), event
        if not killed:
            break
    assert 40 < event < 199
