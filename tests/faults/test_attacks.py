"""The first trials of the attacks on processes and disks; the rest is `make torture`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from campaign import Attack, table
from concurrency import eight_threads, forks, two_processes
from disks import filling, limited_files
from kills import deleting
from soak import rounds, whole_path

import sdw_fast as sdw


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads(), sdw.get_num_threads()
    yield
    torch.set_num_threads(before[0])
    sdw.set_num_threads(before[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("attack", "numbers"),
    [
        (forks, range(2)),
        (eight_threads, range(1)),
        (two_processes, range(6)),
        (filling(limited_files), (0, 8, 10, 12, 104)),
        (deleting, (3, 17, 45)),
    ],
    ids=["forks", "eight threads", "two processes", "full disk", "folder deleted"],
)
def test_first_trials_are_clean(attack, numbers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchrl")
    monkeypatch.setenv("MINARI_DATASETS_PATH", os.fspath(tmp_path))
    trial = attack(tmp_path, 0)
    assert {number: trial(number) for number in numbers} == dict.fromkeys(numbers)


def test_the_whole_path_twice_gives_the_same_bits(tmp_path: Path) -> None:
    """Load, density, distill, save, load, clone; also what .ci/sanitize.sh runs."""
    assert torch.equal(whole_path(tmp_path, 3), whole_path(tmp_path, 3))
    assert not torch.equal(whole_path(tmp_path, 3), whole_path(tmp_path, 4))


def test_results_of_several_calls_add_up() -> None:
    lines = [
        {"attack": "a", "tried": 2, "clean": 1, "silent": 1, "crashed": 0, "hung": 0, "complete": False},
        {"attack": "a", "tried": 1000, "clean": 999, "silent": 0, "crashed": 0, "hung": 1, "complete": True},
    ]
    shown = table([Attack("a", rounds, trials=9, foreign=True), Attack("b", rounds, trials=9)], lines).splitlines()
    assert shown[2:] == ["| a (foreign) | 1,002 | 1,000 | 1 | 0 | 1 | yes |"]
