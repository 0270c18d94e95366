"""The study of the presets: a row of each method, single policies and the ensemble beside each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import presets


@pytest.fixture
def tiny(studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The study with its table in a folder of the test, few steps, two policies and one seed."""
    for name, value in {
        "TABLE": tmp_path / "presets.jsonl",
        "SETTINGS": {"size": 12, "hidden": [8], "inner_width": 8, "steps": 2, "inner_steps": 2, "batch_size": 32},
        "SEEDS": range(1),
        "POLICIES": 2,
        "EPISODES": 1,
        "EPISODES_OF_ONE": 1,
    }.items():
        monkeypatch.setattr(presets, name, value)


def test_a_row_of_each_method_and_its_line(tiny) -> None:
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
    figures = [f"{np.mean(found[c]['policies']):.1f} | {found[c]['ensemble']:.1f}" for c in cases]
    lines = presets.results_table(found).splitlines()
    gain = f"{found[cases[0]]['ensemble'] - np.mean(found[cases[0]]['policies']):.1f}"
    assert f"| hopper/medium | {' | '.join(figures)} | {gain} | 38.4 | 44.9 |" in lines
    assert f"| all |  |  |  |  |  |  | {gain} (1) |  |  |" in lines
    assert any(line.startswith("| walker2d/medium | missing | missing |") for line in lines)


def test_a_row_of_other_settings_does_not_count(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    presets.measure((0, "hopper/medium", "default"))
    monkeypatch.setitem(presets.SETTINGS, "steps", 3)
    assert presets.results() == {}


def test_the_readme_has_the_defaults_beside_the_published_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {(0, "hopper/medium", "default"): {"policies": [1.0, 3.0], "ensemble": 7.0}}
    suite = {("hopper/medium", "sdw-mild", seed): {"normalized_return": 10.0 + seed} for seed in range(5)}
    monkeypatch.setattr(presets.cells, "results", lambda: suite)
    assert (
        "| hopper/medium | 2.0 (1) | 7.0 (1) | 12.0 ± 0.7 | 38.4 | 44.9 |" in presets.readme_table(found).splitlines()
    )
