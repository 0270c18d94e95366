"""Kills at every file event of a run, and at some of each other command: run again, it ends in the same files."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from campaign import NoMoreTrials
from commands import COMMANDS
from kills import killing


def test_a_run_killed_at_any_file_event_ends_in_the_same_files(tmp_path: Path) -> None:
    trial, event = killing("distill")(tmp_path, 0), 0
    with contextlib.suppress(NoMoreTrials):
        while True:
            assert trial(event) is None, event
            event += 1
    assert event > 40


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"distill"}))
def test_a_command_killed_at_a_file_event_ends_in_the_same_files(command: str, tmp_path: Path) -> None:
    pytest.importorskip("torchrl")
    trial = killing(command)(tmp_path, 0)
    for event in (0,) if command == "evaluate" else (2, 5):  # it only prints
        assert trial(event) is None, event
