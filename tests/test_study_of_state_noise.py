"""The study of state noise: a row of each method, beside the rows of the defaults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import presets, state_noise
from sdw_fast import DistillConfig

TASK = "hopper/medium"


def test_a_row_of_each_method_beside_the_defaults(studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_noise, "TABLE", tmp_path / "state_noise.jsonl")
    small = {"size": 12, "hidden": [8], "inner_width": 8, "steps": 2, "inner_steps": 2, "batch_size": 32}
    for name, value in {"SETTINGS": small, "POLICIES": 2, "EPISODES": 1, "EPISODES_OF_ONE": 1}.items():
        monkeypatch.setattr(presets, name, value)
    cases = [(0, TASK, method) for method in state_noise.METHODS]
    for case in cases:
        assert case in state_noise.cases()
        state_noise.measure(case)
    found = state_noise.results()
    assert set(found) == set(cases)
    for case in cases:
        assert (found[case]["settings"]["objective"], found[case]["settings"]["state_noise"]) == (case[2], 1.0)
    default = {"policies": [1.0, 2.0], "ensemble": 7.0}
    means = [float(np.mean(found[case]["policies"])) for case in cases]
    lines = state_noise.results_table({**found, (0, TASK, "default"): default}).splitlines()
    figures = [f"{mean:.1f} (1) | {found[case]['ensemble']:.1f} (1)" for mean, case in zip(means, cases, strict=True)]
    gains = [f"{mean - 1.5:.1f} (1)" for mean in means]
    assert " | ".join([f"| {TASK} | 1.5 (1) | 7.0 (1)", *figures, *gains, "44.9 |"]) in lines
    assert lines[-1].endswith(f"| {' | '.join(gains)} |  |")
    assert f"| {TASK} | 0.7 |" in state_noise.deviations_table({(0, TASK, "default"): default})


def test_only_the_noise_and_the_objective_differ_from_the_defaults() -> None:
    defaults = DistillConfig(seed=3).to_dict()
    for method in state_noise.METHODS:
        config = state_noise.config((3, TASK, method)).to_dict()
        changed = {name for name in config if config[name] != defaults[name]}
        assert changed - {"objective"} == {"state_noise", "steps"}


def test_a_row_from_before_a_setting_came_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = DistillConfig(k=7).to_dict()
    before = {name: value for name, value in wanted.items() if name != "state_noise"}
    assert presets.made_with({"settings": before}, wanted)
    assert not presets.made_with({"settings": before}, {**wanted, "state_noise": 1.0})
    assert not presets.made_with({"settings": {**before, "k": 8}}, wanted)
