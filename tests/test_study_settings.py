"""What the studies of weights ask `sdw.distill` for: each kind its own settings, and the rest the same."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sdw_fast as sdw
from benchmarks.studies import large, value_weights

SAME = {"size": 256, "k": 100, "ess": 0.8, "seed": 3}


@pytest.mark.parametrize(
    ("study", "steps", "expected"),
    [
        (
            value_weights,
            1_000,
            {
                "paper": {"objective": "sdw", "value_weights": "paper"},
                "shifted": {"objective": "sdw", "value_weights": "shifted"},
                "k=10,ess=0.5": {"objective": "sdw", "k": 10, "ess": 0.5},
            },
        ),
        (
            large,
            2_000,
            {
                "av-pbc": {"objective": "av-pbc"},
                "sdw": {"objective": "sdw"},
                "sdw,ess=0.4": {"objective": "sdw", "ess": 0.4},
                "sdw,ess=0.2": {"objective": "sdw", "ess": 0.2},
                "sdw,inner_width=128": {"objective": "sdw", "inner_width": 128},
                "pbc": {"objective": "pbc"},
                "pbc,density": {"objective": "pbc", "density": True},
                "av-pbc,state_noise=1": {"objective": "av-pbc", "state_noise": 1.0},
            },
        ),
    ],
    ids=["value_weights", "large"],
)
def test_each_kind_is_distilled_with_its_own_settings(
    studied,
    small_teacher: sdw.Teacher,
    study: ModuleType,
    steps: int,
    expected: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []

    def distill(data: sdw.TransitionDataset, teacher: sdw.Teacher, **settings: Any) -> sdw.SyntheticDataset:
        assert settings.pop("progress") is False
        asked.append(settings)
        return sdw.real_pairs(data, 12)

    monkeypatch.setattr(sdw, "distill", distill)
    monkeypatch.setattr(large, "dataset", lambda task: studied)
    monkeypatch.setattr(large, "teacher", lambda task: small_teacher)
    for name, value in {"TABLE": tmp_path / "table.jsonl", "POLICIES": 1, "EPISODES": 1}.items():
        monkeypatch.setattr(study, name, value)
    kinds = {kind for seed, task, kind in study.cases() if (seed, task) == (3, "hopper/medium")}
    assert kinds == set(expected)
    for kind, own in expected.items():
        study.measure((3, "hopper/medium", kind))
        assert asked.pop() == {**SAME, "steps": steps, **own}
        assert (3, "hopper/medium", kind) in study.results()
