"""The study of where density weights win: which episodes a point holds, and a row of each objective."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import density_map


@pytest.mark.parametrize(("share", "episodes", "medium", "expert"), [(0.0, 3, 3, 0), (0.5, 4, 2, 2), (1.0, 0, 0, 10)])
def test_episodes_of_a_point(studied, share: float, episodes: int, medium: int, expert: int) -> None:
    data = density_map.data_of(("hopper", share, episodes), seed=1)
    rows = [int(np.flatnonzero((studied.observations == x).all(1))[0]) for x in data.observations[::20]]
    assert len(data) == 20 * (medium + expert)
    assert all(row % 20 == 0 for row in rows)  # whole episodes
    assert (sum(row < 200 for row in rows), sum(row >= 200 for row in rows)) == (medium, expert)
    assert data.units.states == studied.units.states
    other = density_map.data_of(("hopper", share, episodes), seed=2)
    assert (episodes == 0) == np.array_equal(other.observations, data.observations)


def test_lead_is_seed_by_seed(studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TABLE": tmp_path / "rows.jsonl",
        "SETTINGS": {**density_map.SETTINGS, "size": 8, "steps": 2, "hidden": [8], "inner_steps": 2},
        "SEEDS": range(1),
        "POLICIES": 2,
        "EPISODES": 1,
        "EPISODES_OF_ENSEMBLE": 1,
    }.items():
        monkeypatch.setattr(density_map, name, value)
    point = ("hopper", 0.0, 3)
    for objective in density_map.OBJECTIVES:
        density_map.measure((0, point, objective))
    found = density_map.results()
    first, second = (found[0, point, objective] for objective in ("av-pbc", "sdw"))
    lead = np.mean(second["policies"]) - np.mean(first["policies"])
    line = density_map.results_table(found).splitlines()[2]
    assert line.startswith(f"| hopper | 0% | 3 | {np.mean(first['policies']):.1f} | {lead:.1f} | ")
    assert 0 < first["coverage"] < 1
