"""The study of the papers' teachers: files and normalization by task, a row of each method, ours beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sdw_fast as sdw
from benchmarks.studies import histories, published_teachers, variance

D, A = 11, 3  # of hopper
MEAN, STD = np.linspace(-1, 1, D), np.linspace(0.5, 2, D)


def state_dict(name: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    layers = nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs))
    return {f"{name}.{key}": value for key, value in layers.state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Cal-QL checkpoint of hopper's shape under the name of every task, each with its own mean."""
    torch.manual_seed(0)
    checkpoint = {"actor": state_dict("base_network", D, 2 * A)}
    checkpoint |= {f"critic{number}": state_dict("network", D + A, 1) for number in (1, 2)}
    normalization = {}
    for number, task in enumerate(published_teachers.TASKS):
        name = f"{task.replace('/', '-')}-v2"
        torch.save(checkpoint, tmp_path / f"calql-{name}.pt")
        normalization[name] = {"mean": (MEAN + number).tolist(), "std": STD.tolist()}
    (tmp_path / "normalization.json").write_text(json.dumps(normalization))
    return tmp_path


def test_a_teacher_sees_states_as_its_own_dataset_was_normalized(folder: Path) -> None:
    states = np.random.default_rng(0).normal(size=(7, D)).astype(np.float32)
    first, second = (published_teachers.teacher(folder, task) for task in published_teachers.TASKS[:2])
    np.testing.assert_allclose(second.actions(states + 1), first.actions(states), atol=1e-5)
    assert np.abs(second.actions(states) - first.actions(states)).max() > 0.01


def test_a_row_of_each_method(folder: Path, studied, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TABLE": folder / "rows.jsonl",
        "SETTINGS": {"size": 12, "hidden": [8], "steps": 2, "inner_steps": 2, "batch_size": 32},
        "SEEDS": range(1),
        "POLICIES": 2,
        "EPISODES": 1,
        "EPISODES_OF_ONE": 1,
    }.items():
        monkeypatch.setattr(published_teachers, name, value)
    near = sdw.Teacher(actor=lambda states: (2 * states[:, :A]).tanh())
    monkeypatch.setattr(histories, "of_task", lambda of_histories, task: (studied, near))
    monkeypatch.setattr(
        variance, "results", lambda: {(0, "walker2d/medium-expert", "any"): {"policies": [1.0, 4.0], "ensemble": 3.0}}
    )
    monkeypatch.setattr(
        histories, "results", lambda: {(0, "hopper/medium-replay", "sdw"): {"policies": [7.0], "ensemble": 8.0}}
    )
    cases = [case for case in published_teachers.cases() if case[1] != "halfcheetah/medium"]
    assert [method for _, task, method in cases if task == "hopper/medium-replay"] == ["teacher", "av-pbc", "sdw"]
    for case in cases:
        published_teachers.measure(case, folder, folder)
    found = published_teachers.results()
    assert set(found) == set(cases)
    _, _, halfcheetah, walker2d, hopper = published_teachers.results_table(found).splitlines()
    assert halfcheetah.count("missing") == 9
    theirs, ours = found[0, "hopper/medium-replay", "teacher"]["agreements"]
    assert theirs < 0.5 < ours < 1  # `near` acts as the data do
    row = found[0, "walker2d/medium-expert", "sdw"]
    assert f"| {np.mean(row['policies']):.1f} | {row['ensemble']:.1f} | 2.5 | 3.0 | 42.1 | 73.7 |" in walker2d
    assert hopper.endswith("| 7.0 | 8.0 | 40.9 | 40.9 |")
