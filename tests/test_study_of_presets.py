"""The study behind the README's table: a row of each method, single policies and the ensemble, both pages filled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import table
from benchmarks.studies import presets, report

PAGES = {"README.md": "returns", "results.md": "presets"}


@pytest.fixture
def tiny(studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study with its files in a folder of the test, few steps, two policies and one seed."""
    for name, value in {
        "TABLE": tmp_path / "presets.jsonl",
        "SETTINGS": {"size": 12, "hidden": [8], "inner_width": 8, "steps": 2, "inner_steps": 2, "batch_size": 32},
        "SEEDS": range(1),
        "POLICIES": 2,
        "EPISODES": 1,
        "EPISODES_OF_ONE": 1,
    }.items():
        monkeypatch.setattr(presets, name, value)
    for page, name in PAGES.items():
        (tmp_path / page).write_text(f"<!-- {name} -->\n\nold\n\n<!-- /{name} -->\n")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "results.md")
    return tmp_path


def test_a_row_of_each_method_fills_both_pages(tiny: Path) -> None:
    cases = [case for case in presets.cases() if case[1] == "hopper/medium"]
    assert [method for _, _, method in cases] == list(presets.METHODS)
    for case in cases:
        presets.measure(case)
    found = presets.results()
    assert set(found) == set(cases)
    chosen = [
        {name: found[case]["settings"][name] for name in ("objective", "value_weights", "k", "ess")} for case in cases
    ]
    published = {"objective": "sdw", "value_weights": "paper", "k": 100, "ess": 0.95}
    defaults = {"objective": "sdw", "value_weights": "shifted", "k": 10, "ess": 0.5}
    assert chosen == [defaults, published, {**published, "objective": "av-pbc"}]
    presets.write_page()
    figures = [f"{np.mean(found[c]['policies']):.1f} | {found[c]['ensemble']:.1f}" for c in cases]
    readme, page = ((tiny / name).read_text() for name in PAGES)
    assert f"| hopper/medium | {figures[0]} | 66.0 ± 3.7 | 38.4 |" in readme
    assert f"| hopper/medium | {' | '.join(figures)} | 38.4 | 44.9 |" in page
    assert "| walker2d/medium | missing | missing |" in readme


def test_a_row_of_other_settings_does_not_count(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    presets.measure((0, "hopper/medium", "default"))
    monkeypatch.setitem(presets.SETTINGS, "steps", 3)
    assert presets.results() == {}
