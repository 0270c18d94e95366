"""Damaged files: the first mutations of every format, which are refused by name or change nothing that is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mutations import OURS, UNCHECKED, WITH_CRC, Format, mutating

MUTATIONS = 150


@pytest.mark.parametrize("make", [*OURS, *WITH_CRC, *UNCHECKED], ids=lambda make: make.__name__)
def test_mutations_are_refused_by_name_or_change_nothing(
    make: Callable[[Path], Format], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    trial = mutating(make)(tmp_path, 0)
    silent = {number: said for number in range(MUTATIONS) if (said := trial(number)) is not None}
    assert not silent or make in UNCHECKED, silent
