"""The studies of variance and of ceilings, and what all studies of such rows do: make what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import ceilings, variance, work


def test_variance_compares_policies_of_the_same_seeds(studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TABLE": tmp_path / "variance.jsonl",
        "SETTINGS": {"size": 12, "hidden": [8], "steps": 4, "inner_steps": 2, "batch_size": 32},
        "SEEDS": range(1),
        "POLICIES": 3,
        "EPISODES": 1,
        "EPISODES_OF_ONE": 1,
    }.items():
        monkeypatch.setattr(variance, name, value)
    for kind in variance.KINDS:
        variance.measure((0, "hopper/medium", kind))
    configs = [variance.config((3, "hopper/medium", kind)) for kind in variance.KINDS]
    assert [config.fixed_initialization for config in configs] == [None, 3, 3, None]
    assert [config.inner_width for config in configs] == [64, 64, 128, 64]
    assert [(config.initializations, config.steps) for config in configs] == [(None, 4)] * 3 + [(4, 1)]
    found = variance.results()
    row = found[0, "hopper/medium", "any"]
    assert [len(found[0, "hopper/medium", kind]["policies"]) for kind in variance.KINDS] == [3, 1, 1, 3]
    returns = variance.returns(found, "hopper/medium")
    assert returns["any"][0] == pytest.approx(np.mean(row["policies"]))
    assert returns["lowest"][0] == row["policies"][np.argmin(row["losses"])]
    gain = returns["ensemble"][0] - returns["any"][0]
    assert f"| all, minus the first |  | {returns['fixed'][0] - returns['any'][0]:.1f} (1) |" in (
        text := variance.results_table(found)
    )
    assert text.endswith(f" | {gain:.1f} (1) |")


def test_ceilings_clone_the_teacher_on_all_states(studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "TABLE", tmp_path / "ceilings.jsonl")
    monkeypatch.setattr(ceilings, "SETTINGS", {**ceilings.SETTINGS, "steps": 4, "look_every": 2, "batch_size": 8})
    monkeypatch.setattr(ceilings, "EPISODES", 1)
    monkeypatch.setattr(variance, "TABLE", tmp_path / "variance.jsonl")
    given = []
    clone = work.clone_on_all
    monkeypatch.setattr(work, "clone_on_all", lambda data, *seed, **kw: given.append(data) or clone(data, *seed, **kw))
    ceilings.measure((0, "hopper/medium"))
    np.testing.assert_allclose(given[0].actions, np.tanh(studied.observations[:, :3]), rtol=1e-5, atol=1e-6)
    assert ceilings.results()[0, "hopper/medium"]["policy"] == 0


def test_low_losses_with_high_returns_rank_well() -> None:
    assert variance.ranking({"losses": [0.3, 0.1, 0.2], "policies": [10, 90, 40]}) == pytest.approx(1)
    assert variance.ranking({"losses": [0.1, 0.3, 0.2], "policies": [10, 90, 40]}) == pytest.approx(-1)


def test_a_study_makes_the_missing_rows_of_the_tasks_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "one_thread", lambda: None)
    done = [(0, "hopper/medium")]
    cases = [(0, "hopper/medium"), (1, "hopper/medium"), (0, ("hopper", 0.5)), (0, "walker2d/medium")]
    work.make_missing(cases, "hopper", lambda: done, done.append)
    assert done == cases[:3]
