"""The study behind the README's table: a row of each objective, single policies and the ensemble, both pages filled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import table
from benchmarks.studies import published_preset, report

PAGES = {"README.md": "returns", "results.md": "published preset"}


@pytest.fixture
def tiny(studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study with its files in a folder of the test, few steps, two policies and one seed."""
    for name, value in {
        "TABLE": tmp_path / "published_preset.jsonl",
        "SETTINGS": {"size": 12, "hidden": [8], "inner_width": 8, "steps": 2, "inner_steps": 2, "batch_size": 32},
        "SEEDS": range(1),
        "POLICIES": 2,
        "EPISODES": 1,
        "EPISODES_OF_ONE": 1,
    }.items():
        monkeypatch.setattr(published_preset, name, value)
    for page, name in PAGES.items():
        (tmp_path / page).write_text(f"<!-- {name} -->\n\nold\n\n<!-- /{name} -->\n")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "results.md")
    return tmp_path


def test_a_row_of_each_objective_fills_both_pages(tiny: Path) -> None:
    cases = [case for case in published_preset.cases() if case[1] == "hopper/medium"]
    assert cases == [(0, "hopper/medium", "sdw"), (0, "hopper/medium", "av-pbc")]
    for case in cases:
        published_preset.measure(case)
    found = published_preset.results()
    assert set(found) == set(cases)
    settings = found[cases[0]]["settings"]
    assert (settings["ess"], settings["clip"], settings["value_weights"], settings["steps"]) == (0.95, 0.9, "paper", 2)
    published_preset.write_page()
    figures = [f"{np.mean(found[c]['policies']):.1f} | {found[c]['ensemble']:.1f}" for c in cases]
    for page, shown in {"README.md": figures[:1], "results.md": figures}.items():
        text = (tiny / page).read_text()
        assert f"| hopper/medium | {' | '.join(shown)} | 38.4 | 44.9 |" in text
        assert "| walker2d/medium | missing |" in text


def test_a_row_of_other_settings_does_not_count(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = (0, "hopper/medium", "sdw")
    published_preset.measure(case)
    monkeypatch.setitem(published_preset.SETTINGS, "steps", 3)
    assert published_preset.results() == {}
