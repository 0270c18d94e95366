"""The suite of the papers' table: one real cell of each kind, resumption from committed results, and the page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from benchmarks import diversity_study, generalization, suite


@pytest.fixture
def tiny(small_data, small_teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The suite with its files in a folder of the test, tiny settings, and one episode of one policy."""
    pytest.importorskip("mujoco")
    data = dataclasses.replace(small_data, env_id="Hopper-v5")
    for name, value in {
        "RESULTS": tmp_path / "results/suite",
        "RUNS": tmp_path / "runs",
        "PAGE": tmp_path / "results/suite.md",
        "SETTINGS": {
            "size": 12,
            "k": 10,
            "ess": 0.8,
            "clip": 0.9,
            "steps": 2,
            "inner_steps": 2,
            "hidden": (8,),
            "batch_size": 32,
        },
        "BC": {"steps": 3, "batch_size": 16, "lr": 1e-3},
        "POLICIES": 2,
        "POLICIES_FOR_SCALE": 2,
        "EPISODES": 1,
        "dataset": lambda task: data,
        "path": lambda task: task,
    }.items():
        monkeypatch.setattr(suite, name, value)
    monkeypatch.setattr(suite.Teacher, "load", lambda path: small_teacher)
    threads = sdw.get_num_threads()
    yield tmp_path
    sdw.set_num_threads(threads)


@pytest.mark.parametrize("method", ["random", "top-q", "sdw", "sdw,average=0.0", "bc", "teacher"])
def test_a_cell_writes_its_result_and_is_then_done(tiny: Path, method: str) -> None:
    cell = ("hopper/medium", method, 0)
    assert cell in suite.cells()
    assert not suite.done(cell)
    suite.make([cell])
    assert suite.done(cell)
    result = json.loads(suite.result_path(cell).read_text())
    assert (result["task"], result["method"], result["seed"]) == cell
    assert len(result["policies"]) == 2
    assert result["normalized_return"] == pytest.approx(np.mean(result["policies"]), abs=1e-3)
    assert result["standard_error"] == pytest.approx(np.std(result["policies"], ddof=1) / np.sqrt(2), abs=1e-3)


def test_an_ablation_differs_from_sdw_in_what_it_names_only() -> None:
    own = suite.settings(("hopper/medium", "sdw", 0))
    for method, change in [*suite.ABLATIONS.items(), ("sdw-wide", suite.WIDE), ("sdw-mild", suite.MILD)]:
        changed = suite.settings(("hopper/medium", method, 0))
        assert {name: changed[name] for name in own if changed[name] != own[name]} == change


def test_more_policies_are_cloned_on_the_set_that_is_there(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = ("hopper/medium", "sdw", 0)
    suite.make([cell])
    last = suite.run_folder(cell) / "last.npz"
    before = last.stat().st_mtime_ns
    monkeypatch.setattr(suite, "POLICIES", 3)
    assert not suite.done(cell)
    suite.make([cell])
    assert suite.done(cell)
    assert len(json.loads(suite.result_path(cell).read_text())["policies"]) == 3
    assert (suite.run_folder(cell) / "last.npz", last.stat().st_mtime_ns) == (last, before)


def test_seconds_are_those_of_all_calls(tiny: Path) -> None:
    cell = ("hopper/medium", "sdw", 0)
    suite.make([cell])
    log = suite.run_folder(cell) / "metrics.jsonl"
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({**step, "seconds": 1_000.0}) + "\n" for step in steps))
    suite.make([cell])  # finds it distilled
    assert json.loads(suite.result_path(cell).read_text())["seconds"]["training"] == 1_000 * len(steps)


def test_a_cell_reports_the_last_set(tiny: Path) -> None:
    suite.make([("hopper/medium", "sdw", 1)])
    last = sdw.SyntheticDataset.load(suite.run_folder(("hopper/medium", "sdw", 1)) / "last.npz")
    assert last.config["iteration"] == 2
    expected = [
        suite.episodes(policy, suite.dataset(""), clone).mean() for clone, policy in enumerate(suite.clones(last))
    ]
    result = json.loads((tiny / "results/suite/hopper-medium/sdw-1.json").read_text())
    assert result["policies"] == pytest.approx(expected, abs=1e-3)


def test_a_cell_of_other_settings_is_made_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = ("hopper/medium", "random", 0)
    suite.make([cell])
    monkeypatch.setitem(suite.SETTINGS, "size", 9)
    assert not suite.done(cell)


def test_a_new_teacher_makes_a_new_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [("hopper/medium", method, 0) for method in ("sdw", "random")]
    suite.make(cells[:1])
    suite.make(cells[1:])
    before = suite.run_folder(cells[0])
    monkeypatch.setitem(suite.TEACHERS, "hopper/medium", {"algorithm": "td3bc", "steps": 7})
    assert [suite.done(cell) for cell in cells] == [False, True]  # random pairs ask no teacher
    suite.make(cells[:1])
    assert suite.done(cells[0])
    assert suite.run_folder(cells[0]) != before


def test_seeds_side_by_side_leave_what_single_runs_leave(tiny: Path) -> None:
    cells = [("hopper/medium", "sdw", seed) for seed in suite.SEEDS]
    suite.make(cells)
    assert all(map(suite.done, cells))
    together = [sdw.SyntheticDataset.load(suite.run_folder(cell) / "last.npz") for cell in cells]
    for cell, found in zip(cells, together, strict=True):
        suite.make([cell])
        alone = sdw.SyntheticDataset.load(suite.run_folder(cell) / "last.npz")
        assert found.config == alone.config
        np.testing.assert_allclose(found.observations, alone.observations, rtol=1e-3, atol=1e-3)


def test_published_comparison_comes_first_and_names_are_unique() -> None:
    cells = suite.cells()
    assert len(set(map(suite.name, cells))) == len(cells) == len({suite.result_path(cell) for cell in cells})
    first = cells[: 6 * (2 * 3 + 2)]
    assert {task for task, _, _ in first} == set(suite.PUBLISHED)
    assert {method for _, method, _ in first} == {"av-pbc", "sdw", "bc", "teacher"}
    assert {task for task, method, _ in cells if method in suite.COMPARED} == set(suite.PUBLISHED)


def test_a_gpu_distills_all_seeds_of_a_method_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "DEVICE", "cuda")
    three, five = ([("hopper/medium", method, s) for s in suite.seeds(method)] for method in ("sdw", "sdw-mild"))
    assert (len(three), len(five)) == (3, 5)
    assert suite.work([*three, *five]) == [three, five]
    assert suite.work([three[0], *five[:3]]) == [[three[0]], *([cell] for cell in five[:3])]


def test_page(tiny: Path) -> None:
    for seed, mean in enumerate((10.0, 20.0, 30.0)):
        suite.write(("hopper/medium", "sdw", seed), np.full((2, 1), mean), {"training": 3600.0, "evaluation": 0.0})
    suite.write(("hopper/medium", "random", 1), np.full((2, 1), 5.0), {"training": 0.0, "evaluation": 8.0})
    suite.write_page()
    page = (tiny / "results/suite.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| hopper/medium |"))
    cells = dict.fromkeys(suite.METHODS, "missing") | {"random": "5.0 (1)", "sdw": "20.0 ± 5.8"}
    expected = ["hopper/medium", *cells.values(), "32.5", "38.4"]
    assert [part.strip() for part in row.strip("|").split("|")] == expected
    replay = next(line for line in page.splitlines() if line.startswith("| hopper/medium-replay |"))
    without = len(suite.COMPARED)
    assert (replay.count("missing"), replay.count("–")) == (len(suite.METHODS) - without, without + 1)  # published SDW
    assert "| SDW | 3 | 3600 | 0 | 3.00 |" in page
    lead = next(line for line in page.split("## SDW against")[1].splitlines() if line.startswith("| hopper/medium |"))
    assert lead == "| hopper/medium | 0.52 | missing | missing | missing | missing | missing |"
    assert "| mean |  | missing |  | missing |  | missing |" in page


def test_difference_of_means() -> None:
    assert suite.difference([10.0, 20.0, 30.0], [40.0, 40.0, 40.0]) == "-20.0 ± 5.8"
    assert suite.difference([1.0, 3.0], [1.0, 5.0]) == "-1.0 ± 2.2"  # standard errors 1 and 2
    assert suite.difference([3.0], [1.0, 2.0]) == "+1.5"
    apart = ([1.0, 3.0], [1.0, 5.0])  # -1.0 ± 2.236
    assert suite.mean_difference([apart, ([8.0, 8.0], [4.0, 4.0])]) == "+1.5 ± 1.1"


def test_generalization_trains_every_variant(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RESULTS": tiny / "results/generalization",
        "dataset": suite.dataset,
        "TASKS": ("hopper/medium",),
        "METHODS": ("sdw",),
        "POLICIES": 2,
        "EPISODES": 1,
        "ENSEMBLE": 2,
    }.items():
        monkeypatch.setattr(generalization, name, value)
    generalization.measure(("hopper/medium", "sdw"))  # distills what is missing
    synthetic = generalization.synthetic_set("hopper/medium", "sdw")
    returns = json.loads(generalization.result_path(("hopper/medium", "sdw")).read_text())["returns"]
    assert returns.keys() == generalization.variants(synthetic.config).keys()
    assert all(len(values) == 2 for values in returns.values())
    generalization.write_page()
    assert "| Adam | " in (tiny / "results/generalization.md").read_text()


def test_optimizers_and_residual_networks_fit_the_set(tiny: Path) -> None:
    data = suite.dataset("hopper/medium")
    pairs = suite.chosen_pairs(data, None, suite.DistillConfig(size=32, hidden=(64, 64)))
    states, actions = torch.from_numpy(pairs.observations), torch.from_numpy(pairs.actions)
    for residual in (False, True):
        train = generalization.with_optimizer(lambda p: torch.optim.Adam(p, 1e-3), 200, residual)
        assert (train(pairs, 0)(states) - actions).square().mean() < 0.1 * actions.square().mean()


def test_ensemble_is_the_mean_action(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generalization, "ENSEMBLE", 2)
    pairs = suite.chosen_pairs(suite.dataset(""), None, suite.DistillConfig(size=8, hidden=(8,), inner_steps=2))
    states = torch.from_numpy(pairs.observations)
    members = [sdw.behavior_clone(pairs, seed=seed)(states) for seed in (1000, 1001)]
    torch.testing.assert_close(generalization.ensemble(pairs, 0)(states), (members[0] + members[1]) / 2)


def test_diversity_study(tiny: Path, small_teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RESULTS": tiny / "results/diversity",
        "DOCS": tiny,
        "dataset": suite.dataset,
        "ENVS": ("hopper",),
        "QUALITIES": ("medium",),
        "STOPS": (1, 30),
        "POLICIES": 2,
        "EPISODES": 1,
        "TASKS": ["hopper/medium"],
        "COVERED": 300,
        "SCALES": (3, 5),
        "path": suite.path,
    }.items():
        monkeypatch.setattr(diversity_study, name, value)
    suite.make([("hopper/medium", "sdw", 0)])
    suite.make([("hopper/medium", "av-pbc", 0)])
    suite.make([("hopper/medium", "av-pbc", 1)])
    diversity_study.measure_ranking(("hopper", "medium"))
    reached = np.array(json.loads((tiny / "results/diversity/ranking-hopper-medium.json").read_text())["reached"])
    assert reached.shape == (2, 2, 2)
    assert (reached[:, 1, 0] < reached[:, 0, 0]).all()  # the loss falls
    assert "| hopper/medium |" in diversity_study.ranking(jobs=1)
    assert "| hopper/medium | 0 | " in diversity_study.tau()
    monkeypatch.setattr(diversity_study, "STAGES", (0, 3, 1000))
    monkeypatch.setattr(suite, "ABLATED", ("hopper/medium",))
    assert "| 3 to 999 | " in diversity_study.stages()
    columns = json.loads((tiny / "results/diversity/stages.json").read_text())["hopper/medium"]
    assert sum(columns["share"]) == pytest.approx(1)
    assert np.dot(columns["share"], columns["weight, k = 3"]) == pytest.approx(1)  # weights have mean 1
    states = torch.from_numpy(suite.dataset("").observations)
    pairs = diversity_study._sets("hopper/medium", "sdw")[0]
    actions = [sdw.behavior_clone(pairs, seed=seed)(states) for seed in range(2)]
    expected = np.mean([((a.detach().numpy() - small_teacher.actions(states.numpy())) ** 2).mean() for a in actions])
    assert np.dot(columns["share"], columns["error, SDW"]) == pytest.approx(expected, rel=1e-4)
    assert "| hopper/medium | random pairs | " in (section := diversity_study.sets())
    assert "| hopper/medium | SDW | " in section
    spread = json.loads((tiny / "results/diversity/sets.json").read_text())["hopper/medium"]["random"]
    assert 0 < spread["coverage"] < 1
    assert {path.name for path in tiny.glob("*.png")} == {"diversity_ranking.png", "diversity_tau.png"}
