"""The battery of environments: what a row holds, what a failure leaves behind, the score, the table."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import battery, recordings
from sdw_fast.units import d4rl_returns


@pytest.fixture
def tiny(small_data, small_teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The battery with one task, tiny settings, and its files in a folder of the test."""
    pytest.importorskip("mujoco")
    units = dataclasses.replace(small_data.units, env_id="Hopper-v5", returns=d4rl_returns("Hopper-v5"))
    data = dataclasses.replace(small_data, units=units)
    for name, value in {
        "TABLE": tmp_path / "battery.jsonl",
        "TASKS": {"hopper": recordings.Task("Hopper-v5", 1)},
        "SETTINGS": {"size": 12, "steps": 2, "inner_steps": 2, "hidden": (8,), "batch_size": 32},
        "BC": {"steps": 6, "batch_size": 16, "lr": 1e-3},
        "LOOK_EVERY": 2,
        "POLICIES": 2,
        "POLICIES_ON_ALL": 2,
        "EPISODES": 1,
        "teacher": lambda task, folder: small_teacher,
    }.items():
        monkeypatch.setattr(battery, name, value)
    monkeypatch.setattr(recordings, "TASKS", battery.TASKS)
    monkeypatch.setattr(sdw, "load_dataset", lambda name: data)
    return tmp_path


@pytest.mark.parametrize("method", battery.METHODS)
def test_a_row_is_made_once_and_holds_every_policy_s_return(tiny: Path, method: str) -> None:
    battery.measure(("hopper", method, 0), tiny)
    (row,) = table.read(battery.TABLE)
    assert battery.results() == {("hopper", method, 0): row}
    assert row["error"] is None
    assert len(row["policies"]) == 2
    assert row["return"] == pytest.approx(np.mean(row["policies"]), abs=1e-3)
    assert set(row["cpu_seconds"]) == {"training", "evaluation"}


def test_a_refusal_and_a_warning_are_kept(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        import warnings

        warnings.warn("the data is odd", stacklevel=1)
        raise FloatingPointError("the inner loop diverged")

    monkeypatch.setattr(sdw, "distill", fail)
    battery.measure(("hopper", "sdw", 0), tiny)
    (row,) = table.read(battery.TABLE)
    assert row["error"] == "FloatingPointError: the inner loop diverged"
    assert row["told"] == ["the data is odd"]
    assert "return" not in row


def test_other_settings_make_a_row_anew(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    battery.measure(("hopper", "random", 0), tiny)
    monkeypatch.setitem(battery.SETTINGS, "size", 9)
    assert battery.results() == {}


def test_cloning_on_all_data_keeps_the_parameters_of_the_least_held_out_loss(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.3, 0.1, 0.2])
    taken = []

    def loss(params: Any, *_: Any, **__: Any) -> float:
        taken.append(params[0].detach().clone())
        return next(losses)

    data = sdw.load_dataset("hopper")
    monkeypatch.setattr(battery.work, "cloning", lambda *_, **__: ([p + s for p in start] for s in range(6)))
    start = battery.work.initial(data.observations.shape[1], (8,), data.actions.shape[1], 1.0, generator())
    monkeypatch.setattr(sdw.ops, "behavior_matching", loss)
    policy = battery.work.clone_on_all(data, 0, held_out=0.1, look_every=2, steps=6, batch_size=8, lr=0.1)
    first = next(policy.net.parameters())
    assert len(taken) == 3
    assert (first == taken[1]).all()


def generator() -> Any:
    import torch

    return torch.Generator().manual_seed(0)


def test_the_table(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def figures(mean: float) -> dict[str, Any]:
        return {"return": mean, "standard_error": 1.0, "policies": [mean], "error": None, "told": []}

    recording = {of: {"mean": mean} for of, mean in (("random", -100.0), ("data", 70.0), ("teacher", 95.0))}
    for (method, seed), row in {
        (battery.RECORDING, 0): recording,
        ("bc", 0): figures(100.0),
        ("random", 0): figures(0.0),
        ("dbc", 0): {**figures(85.0), "told": ["the step size was lowered"]},
        ("pbc", 0): {"error": "ValueError: no", "told": []},
        ("sdw", 0): figures(72.0),
        ("sdw", 1): figures(92.0),
    }.items():
        battery._append(("hopper", method, seed), row)
    found = battery.results()
    assert battery.score(found, "hopper", 0.0) == 0.5
    assert battery.results_table(found).splitlines()[-1] == (
        "| hopper | -100 | 70 | 95 | 100 | 0.50 | **0.93** (warned) | refused | **0.91** (of 2) |"
    )
    battery._append(("hopper", "bc", 0), figures(-100.0))
    assert "| -100 | returns 0 | returns 85 (warned) |" in battery.results_table(battery.results())
    (tiny / "page.md").write_text("<!-- battery -->\n\nold\n\n<!-- /battery -->\n")
    monkeypatch.setattr(battery, "PAGE", tiny / "page.md")
    battery.write_page()
    assert "| hopper | -100 |" in (tiny / "page.md").read_text()
