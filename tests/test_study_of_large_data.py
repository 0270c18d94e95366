"""The study at D4RL's size: returns-to-go by hand, a teacher trained once and kept, a row of each method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import large, work


def test_returns_to_go_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "DISCOUNT", 0.5)
    monkeypatch.setattr(large, "HORIZON", 2)
    rewards = np.array([1, 2, 4, 8, 16, 32], np.float32)
    terminations = np.array([0, 0, 1, 0, 0, 0], bool)
    following, known = large.returns_to_go(rewards, terminations, np.array([2, 5]))
    assert following.tolist() == [3, 4, 4, 24, 32, 32]
    assert known.tolist() == [True, True, True, True, False, False]  # the second episode is cut: its last two go on


def test_q_correlates_with_what_followed(small_data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "HORIZON", 5)

    class Seer:
        def __init__(self, sign: float) -> None:
            self.sign = sign

        def values(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
            following, known = large.returns_to_go(data.rewards, data.terminations, data.episode_ends)
            assert len(observations) == known.sum()
            return self.sign * following[known] + 7

    data = small_data
    assert large.correlation(data, Seer(1.0)) == pytest.approx(1)
    assert large.correlation(data, Seer(-2.0)) == pytest.approx(-1)


def test_a_row_of_each_method_and_the_teacher_once(studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchrl")
    for name, value in {
        "TABLE": tmp_path / "large.jsonl",
        "TEACHER": {**large.TEACHER, "steps": 2},
        "SETTINGS": {"size": 12, "hidden": [8], "steps": 2, "inner_steps": 2, "batch_size": 32, "k": 3},
        "HORIZON": 5,
        "SEEDS": range(1),
        "POLICIES": 2,
        "EPISODES": 1,
        "EPISODES_OF_ONE": 1,
    }.items():
        monkeypatch.setattr(large, name, value)
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(large, "dataset", lambda task: studied)
    (tmp_path / "benchmarks/teachers").mkdir(parents=True)
    cases = [case for case in large.cases() if case[1] == "hopper/medium"]
    assert [method for _, _, method in cases] == ["teacher", *large.METHODS]
    for case in cases:
        large.measure(case)
    assert [path.name for path in (tmp_path / "benchmarks/teachers").iterdir()] == ["hopper-medium-large.safetensors"]
    found = large.results()
    assert set(found) == set(cases)
    assert [len(found[case]["policies"]) for case in cases] == [1] + [2] * len(large.METHODS)
    assert -1 <= found[cases[0]]["correlation"] <= 1
    assert 4 * 0.2 / 1.2**2 <= found[cases[0]]["value_ess"] <= 1
    assert all(len(found[case]["errors"]) == len(work.STAGES) - 1 for case in cases[1:])
    assert all(len(found[case]["errors_by_density"]) == 10 for case in cases[1:])
    line = next(line for line in large.results_table(found).splitlines() if line.startswith("| hopper/medium |"))
    assert f"| {found[cases[0]]['policies'][0]:.1f} | 68 |" in line
    assert f"{np.mean(found[cases[1]]['policies']):.1f} | {found[cases[1]]['ensemble']:.1f} |" in line
    lead = np.mean(found[cases[2]]["policies"]) - np.mean(found[cases[1]]["policies"])
    assert line.endswith(f"| {lead:.1f} | 44.9 |")


def test_leads_are_taken_seed_by_seed() -> None:
    returns = {(0, "av-pbc"): [1.0, 3.0], (0, "sdw"): [7.0], (1, "av-pbc"): [4.0], (2, "sdw"): [9.0]}
    found = {(seed, "hopper/medium", method): {"policies": of} for (seed, method), of in returns.items()}
    assert large.leads(found, "hopper/medium", "sdw", "av-pbc") == [5.0]
    assert large.leads(found, "hopper/medium", "av-pbc", "sdw") == [-5.0]
    assert large.leads(found, "walker2d/medium", "sdw", "av-pbc") == []


def test_variants_stand_below_the_settings() -> None:
    rows = {"sdw": (1.0, 2.0), "sdw,ess=0.4": (4.0, 8.0), "sdw,ess=0.2": (3.0, 7.0)}
    found = {(0, "hopper/medium", method): {"policies": [one], "ensemble": ten} for method, (one, ten) in rows.items()}
    found[0, "walker2d/medium", "sdw"] = {"policies": [5.0], "ensemble": 6.0}  # has no variant: no line
    assert large.variants_table(found).splitlines()[2:] == [
        "| hopper/medium | as above | 1.0 (1) | 2.0 (1) |  |",
        "| hopper/medium | ess=0.4 | 4.0 (1) | 8.0 (1) | 3.0 (1) |",
        "| hopper/medium | ess=0.2 | 3.0 (1) | 7.0 (1) | 2.0 (1) |",
        "| hopper/medium | inner_width=128 | missing | missing | missing |",
    ]


def test_value_weights_beside_none() -> None:
    rows = {"pbc": 1.0, "av-pbc": 3.0, "pbc,density": 7.0, "sdw": 13.0}
    found = {(0, "hopper/medium", method): {"policies": [one]} for method, one in rows.items()}
    found[0, "hopper/medium", "teacher"] = {"value_ess": 0.987}
    found[0, "walker2d/medium", "sdw"] = {"policies": [5.0]}  # has no PBC: no line
    *_, line = large.values_table(found).splitlines()
    assert line == f"| hopper/medium | 0.99 | {' | '.join(f'{x:.1f} (1)' for x in (1, 3, 7, 13, 2, 6, 10))} |"
    assert len(large.values_table(found).splitlines()) == 3


def test_noise_beside_the_objectives_without() -> None:
    rows = {"av-pbc": (1.0, 2.0), "sdw": (3.0, 5.0), "av-pbc,state_noise=1": (7.0, 9.0)}
    found = {(0, "hopper/medium", method): {"policies": [one], "ensemble": ten} for method, (one, ten) in rows.items()}
    found[0, "walker2d/medium", "sdw"] = {"policies": [5.0], "ensemble": 6.0}  # has none with noise: no line
    assert large.noise_table(found).splitlines()[2:] == ["| hopper/medium | 7.0 (1) | 9.0 (1) | 6.0 (1) | 4.0 (1) |"]


def test_errors_by_hand(small_data, small_teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the rows of every second episode and the policies of the set: by stage, and by density among all rows."""
    for name, value in {
        "EPISODES_LOOKED_AT": -(-len(small_data.episode_ends) // 2),
        "POLICIES": 2,
        "TENTHS": 2,
        "SETTINGS": {"k": 3},
    }.items():
        monkeypatch.setattr(large, name, value)
    monkeypatch.setattr(work, "STAGES", (0, 1, 1000))
    pairs = sdw.real_pairs(small_data, 12)
    rare = sdw.log_density(small_data, k=3) < np.median(sdw.log_density(small_data, k=3))
    starts = np.append(0, small_data.episode_ends[:-1] + 1)
    first, squared, of_rare = [], [], []
    for start, end in list(zip(starts, small_data.episode_ends, strict=True))[::2]:
        states = small_data.observations[start : end + 1]
        for policy in work.clones(pairs, 2):
            apart = policy(torch.from_numpy(states)).detach().numpy() - small_teacher.actions(states)
            squared.extend(((apart / small_data.units.require_actions().scale) ** 2).mean(1))
            first.extend([True] + [False] * (end - start))
            of_rare.extend(rare[start : end + 1])
    assert 0 < sum(of_rare) < len(of_rare)
    assert sum(first) == 2 * len(starts[::2])
    expected = {"errors": ~np.array(first), "errors_by_density": ~np.array(of_rare)}  # False first
    found = large.errors(pairs, small_data, small_teacher)
    for name, group in expected.items():
        assert found[name] == pytest.approx([np.mean(np.array(squared)[group == one]) for one in (0, 1)], rel=1e-3)


def test_errors_are_means_over_the_seeds() -> None:
    errors = {(0, "pbc"): [0.1] * 7, (3, "pbc"): [0.3] * 7, (0, "sdw"): [0.05] * 6 + [0.25]}
    found = {(seed, "hopper/medium", method): {"errors": of} for (seed, method), of in errors.items()}
    found[1, "hopper/medium", "av-pbc"] = {"policies": [1.0]}  # older than the errors: no column
    header, _, *lines = large.errors_table(found).splitlines()
    assert header == "| steps into the episode | hopper/medium, PBC (2) | hopper/medium, SDW (1) |"
    assert lines[0] == "| 0 to 0 | 0.200 | 0.050 |"
    assert lines[-1] == "| 400 to 999 | 0.200 | 0.250 |"
    found[0, "hopper/medium", "sdw"]["errors_by_density"] = [0.5, *[0.25] * 9]
    header, _, *lines = large.density_table(found).splitlines()
    assert header == "| states | hopper/medium, SDW (1) |"
    assert lines[:2] == ["| rarest tenth | 0.500 |", "| 2 | 0.250 |"]
    assert len(lines) == 10
    assert lines[-1] == "| densest tenth | 0.250 |"


def test_effective_sample_size_of_value_weights_by_hand(small_data) -> None:
    class TwoValues:
        def label(self, observations: np.ndarray, units: sdw.Units, *, values: bool) -> tuple[np.ndarray, np.ndarray]:
            return observations, np.arange(len(observations)) % 2 * 3.0 - 7.0  # half of them -7, half -4

    assert len(small_data) % 2 == 0
    assert large.value_ess(small_data, TwoValues()) == pytest.approx((0.2 + 1) ** 2 / (2 * (0.2**2 + 1**2)))
