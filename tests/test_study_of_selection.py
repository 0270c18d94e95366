"""The study of real pairs: dual ranking by hand, and a row of each method."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import sdw_fast as sdw
from benchmarks.studies import selection


def test_dual_ranking_by_hand(small_data: sdw.TransitionDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    # Episodes of 20 steps in two stages of 10: of 12 pairs, 200 · 1 and 200 · 1/2 shares give 8 and 4.
    monkeypatch.setattr(selection, "STAGE", 10)
    row = np.arange(400)
    monkeypatch.setattr(sdw, "log_density", lambda data, k: -row.astype(float))  # the last row is the rarest
    critic = sdw.Teacher(lambda s: s[:, :3], lambda s, a: s[:, 0])
    order = dataclasses.replace(small_data, observations=np.tile(row[:, None], 11).astype(np.float32))
    pairs = selection.dual_ranking(order, critic, 12)  # and has the highest value
    stage = (row % 20) // 10
    expected = [*row[stage == 0][::-1][:8], *row[stage == 1][::-1][:4]]
    assert pairs.observations[:, 0].tolist() == [float(r) for r in expected]


def test_a_rare_state_of_low_value_is_as_good_as_a_common_one_of_high_value(small_data) -> None:
    rows, values, densities = np.arange(4), np.array([3.0, 2.0, 1.0, 0.0]), np.array([3.0, 0.0, 1.0, 2.0])
    # ranks of value 0 1 2 3, of density 3 0 1 2: sums 3 1 3 5
    assert selection._best(rows, values, densities, 3).tolist() == [1, 0, 2]


def test_a_row_of_each_method(studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TABLE": tmp_path / "rows.jsonl", "SEEDS": range(1), "SIZES": (16,), "POLICIES": 2}.items():
        monkeypatch.setattr(selection, name, value)
    monkeypatch.setattr(selection, "EPISODES", 1)
    for case in selection.cases():
        if case[1] == "hopper/medium":
            selection.measure(case)
    lines = selection.results_table(selection.results()).splitlines()
    assert [("missing" in line) for line in lines[2:]] == ["hopper/medium " not in line for line in lines[2:]]
    (tmp_path / "page.md").write_text("<!-- selection -->\n\nold\n\n<!-- /selection -->\n")
    selection.write_page(tmp_path / "page.md")
    assert "old" not in (tmp_path / "page.md").read_text()
