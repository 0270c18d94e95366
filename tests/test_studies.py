"""The studies: one real cell of each kind of the suite, resumption from committed rows, tables, the other studies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import (
    ceilings,
    cells,
    density_agreement,
    density_map,
    diversity,
    generalization,
    histories,
    large,
    presets,
    report,
    selection,
    state_noise,
    suite,
    tasks,
    time_to_return,
    value_weights,
    variance,
    work,
)
from sdw_fast.folder import metrics_line, read_metrics


@pytest.fixture
def tiny(studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The suite with its files in a folder of the test, tiny settings, and one episode of one policy."""
    (tmp_path / "page.md").write_text("".join(f"<!-- {n} -->\n\nold\n\n<!-- /{n} -->\n" for n in PAGE))
    for name, value in {
        "TABLE": tmp_path / "suite.jsonl",
        "RUNS": tmp_path / "runs",
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
    }.items():
        monkeypatch.setattr(cells, name, value)
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    threads = sdw.get_num_threads()
    yield tmp_path
    sdw.set_num_threads(threads)


PAGE = ("suite", "ablations", "stages", "generalization")


def row(cell: cells.Cell) -> table.Entries:
    return cells.results()[cell]


@pytest.mark.parametrize("method", ["random", "top-q", "sdw", "sdw,average=0.0", "bc", "teacher"])
def test_a_cell_is_recorded_once_and_is_then_done(tiny: Path, method: str) -> None:
    cell = ("hopper/medium", method, 0)
    assert cell in cells.cells()
    assert cells.results() == {}
    suite.make([cell])
    (result,) = table.read(cells.TABLE)
    assert cells.results() == {cell: result}
    assert (result["task"], result["method"], result["seed"]) == cell
    assert len(result["policies"]) == 2
    assert result["normalized_return"] == pytest.approx(np.mean(result["policies"]), abs=1e-3)
    assert result["standard_error"] == pytest.approx(np.std(result["policies"], ddof=1) / np.sqrt(2), abs=1e-3)
    assert result["settings"] == cells.settings(cell)


def test_the_command_goes_on_from_the_table(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[cells.Cell] = []
    monkeypatch.setattr(
        suite, "run", lambda missing, jobs: [suite.make([cell]) for cell in missing] and made.extend(missing)
    )
    monkeypatch.setattr(suite, "train_missing", lambda tasks, jobs: None)
    suite.make([("hopper/medium", "random", 1)])
    for expected in ([("hopper/medium", "random", 0), ("hopper/medium", "random", 2)], []):
        made.clear()
        monkeypatch.setattr("sys.argv", ["suite", "--only", "hopper/medium/random/"])
        suite.main()
        assert made == expected
    assert len(table.read(cells.TABLE)) == 3
    assert "| hopper/medium |" in report.PAGE.read_text()


def test_an_ablation_differs_from_sdw_in_what_it_names_only() -> None:
    own = cells.settings(("hopper/medium", "sdw", 0))
    for method, change in [*cells.ABLATIONS.items(), ("sdw-wide", cells.WIDE), ("sdw-mild", cells.MILD)]:
        changed = cells.settings(("hopper/medium", method, 0))
        assert {name: changed[name] for name in own if changed[name] != own[name]} == change


def test_more_policies_are_cloned_on_the_set_that_is_there(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = ("hopper/medium", "sdw", 0)
    suite.make([cell])
    last = cells.run_folder(cell) / "last.npz"
    before = last.stat().st_mtime_ns
    monkeypatch.setattr(cells, "POLICIES", 3)
    assert cell not in cells.results()
    suite.make([cell])
    assert cell in cells.results()
    assert len(row(cell)["policies"]) == 3
    assert (cells.run_folder(cell) / "last.npz", last.stat().st_mtime_ns) == (last, before)


def test_seconds_are_those_of_all_calls(tiny: Path) -> None:
    cell = ("hopper/medium", "sdw", 0)
    suite.make([cell])
    steps = read_metrics(cells.run_folder(cell))
    log = cells.run_folder(cell) / "metrics.jsonl"
    log.write_text("".join(metrics_line({**step, "seconds": 1_000.0}) for step in steps))
    suite.make([cell])  # finds it distilled
    assert row(cell)["seconds"]["training"] == 1_000 * len(steps)


def test_a_cell_reports_the_last_set(tiny: Path) -> None:
    suite.make([("hopper/medium", "sdw", 1)])
    last = sdw.SyntheticDataset.load(cells.run_folder(("hopper/medium", "sdw", 1)) / "last.npz")
    assert last.config["iteration"] == 2
    expected = [
        suite.episodes(policy, tasks.dataset(""), clone).mean() for clone, policy in enumerate(work.clones(last, 2))
    ]
    assert row(("hopper/medium", "sdw", 1))["policies"] == pytest.approx(expected, abs=1e-3)


def test_a_cell_of_other_settings_is_made_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = ("hopper/medium", "random", 0)
    suite.make([cell])
    monkeypatch.setitem(cells.SETTINGS, "size", 9)
    assert cell not in cells.results()


def test_a_setting_that_came_later_leaves_rows_as_they_are(tiny: Path) -> None:
    known, cell = cells.settings(("hopper/medium", "sdw", 0)), ("hopper/medium", "sdw", 0)
    default = sdw.DistillConfig().to_dict()
    assert known["k"] == default["k"]
    assert known["inner_steps"] != default["inner_steps"]
    for name, done in (("k", True), ("inner_steps", False)):
        older = {key: value for key, value in known.items() if key != name}
        assert cells.up_to_date({"settings": older}, cell) == done


def test_a_new_teacher_makes_a_new_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distilled, pairs = (("hopper/medium", method, 0) for method in ("sdw", "random"))
    suite.make([distilled])
    suite.make([pairs])
    before = cells.run_folder(distilled)
    monkeypatch.setitem(tasks.TEACHERS, "hopper/medium", {"algorithm": "td3bc", "steps": 7})
    assert cells.results().keys() == {pairs}  # random pairs ask no teacher
    suite.make([distilled])
    assert cells.results().keys() == {pairs, distilled}
    assert cells.run_folder(distilled) != before


def test_seeds_side_by_side_leave_what_single_runs_leave(tiny: Path) -> None:
    seeds = [("hopper/medium", "sdw", seed) for seed in cells.SEEDS]
    suite.make(seeds)
    assert cells.results().keys() == set(seeds)
    together = [sdw.SyntheticDataset.load(cells.run_folder(cell) / "last.npz") for cell in seeds]
    for cell, found in zip(seeds, together, strict=True):
        suite.make([cell])
        alone = sdw.SyntheticDataset.load(cells.run_folder(cell) / "last.npz")
        assert found.config == alone.config
        np.testing.assert_allclose(found.observations, alone.observations, rtol=1e-3, atol=1e-3)


def test_published_comparison_comes_first_and_names_are_unique() -> None:
    every = cells.cells()
    assert len(set(map(cells.name, every))) == len(every)
    first = every[: 6 * (2 * 3 + 2)]
    assert {task for task, _, _ in first} == set(cells.PUBLISHED)
    assert {method for _, method, _ in first} == {"av-pbc", "sdw", "bc", "teacher"}
    assert {task for task, method, _ in every if method in cells.COMPARED} == set(cells.PUBLISHED)


def test_a_gpu_distills_all_seeds_of_a_method_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "DEVICE", "cuda")
    three, five = ([("hopper/medium", method, s) for s in cells.seeds(method)] for method in ("sdw", "sdw-mild"))
    assert (len(three), len(five)) == (3, 5)
    assert suite.batches([*three, *five]) == [three, five]
    assert suite.batches([three[0], *five[:3]]) == [[three[0]], *([cell] for cell in five[:3])]


def test_tables(tiny: Path) -> None:
    for seed, mean in enumerate((10.0, 20.0, 30.0)):
        suite.record(("hopper/medium", "sdw", seed), np.full((2, 1), mean), {"training": 3600.0, "evaluation": 0.0})
    suite.record(("hopper/medium", "random", 1), np.full((2, 1), 5.0), {"training": 0.0, "evaluation": 8.0})
    text = suite.all_tables(cells.results())
    line = next(line for line in text.splitlines() if line.startswith("| hopper/medium |"))
    figures = dict.fromkeys(cells.METHODS, "missing") | {"random": "5.0 (1)", "sdw": "20.0 ± 5.8"}
    expected = ["hopper/medium", *figures.values(), "32.5", "38.4", "44.9"]
    assert [part.strip() for part in line.strip("|").split("|")] == expected
    mixture = next(line for line in text.splitlines() if line.startswith("| hopper/mixture |"))
    without = len(cells.COMPARED)
    assert (mixture.count("missing"), mixture.count("–")) == (len(cells.METHODS) - without, without + 3)  # published
    assert "| SDW | 3 | 3600 | 0 | 3.00 |" in text
    lead = next(line for line in text.split("## SDW against")[1].splitlines() if line.startswith("| hopper/medium |"))
    assert lead == "| hopper/medium | 0.52 | missing | missing | missing | missing | missing |"
    assert "| mean |  | missing |  | missing |  | missing |" in text
    suite.write_page(cells.results())
    page = report.PAGE.read_text()
    assert "| hopper/medium | missing | 20.0 ± 5.8 | missing |" in page
    assert "| as above | 20.0 ± 5.8 | missing |" in page
    with pytest.raises(ValueError, match="no lines <!-- other -->"):
        report.fill("other", "")


def test_the_page_shows_what_the_committed_tables_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cells.results().keys() == set(cells.cells())
    before = report.PAGE.read_text()
    (tmp_path / "results.md").write_text(before)
    monkeypatch.setattr(report, "PAGE", tmp_path / "results.md")
    suite.write_page(cells.results())
    generalization.write_page()
    diversity.write_page()
    value_weights.write_page(report.PAGE)
    readme = tmp_path / "README.md"
    readme.write_text(report.README.read_text())
    presets.write_page(report.PAGE, readme)
    assert readme.read_text() == report.README.read_text()
    time_to_return.write_page(report.PAGE)
    histories.write_page(report.PAGE)
    ceilings.write_page(report.PAGE)
    large.write_page(report.PAGE)
    density_map.write_page(report.PAGE)
    selection.write_page(report.PAGE)
    variance.write_page(report.PAGE)
    state_noise.write_page(report.PAGE)
    assert report.PAGE.read_text() == before


def test_difference_of_means() -> None:
    assert report.difference([10.0, 20.0, 30.0], [40.0, 40.0, 40.0]) == "-20.0 ± 5.8"
    assert report.difference([1.0, 3.0], [1.0, 5.0]) == "-1.0 ± 2.2"  # standard errors 1 and 2
    assert report.difference([3.0], [1.0, 2.0]) == "+1.5"
    apart = ([1.0, 3.0], [1.0, 5.0])  # -1.0 ± 2.236
    assert report.mean_difference([apart, ([8.0, 8.0], [4.0, 4.0])]) == "+1.5 ± 1.1"


def test_generalization_trains_every_variant(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TABLE": tiny / "generalization.jsonl",
        "TASKS": ("hopper/medium",),
        "METHODS": ("sdw",),
        "POLICIES": 2,
        "EPISODES": 1,
        "ENSEMBLE": 2,
    }.items():
        monkeypatch.setattr(generalization, name, value)
    generalization.measure(("hopper/medium", "sdw"))  # distills what is missing
    synthetic = generalization.synthetic_set("hopper/medium", "sdw")
    returns = generalization.results()["hopper/medium", "sdw"]
    assert returns.keys() == generalization.variants(synthetic.config).keys()
    assert all(len(values) == 2 for values in returns.values())
    assert "| width 64 | " in generalization.results_table()
    generalization.write_page()
    assert "| Adam | " in report.PAGE.read_text()
    monkeypatch.setitem(cells.SETTINGS, "size", 9)
    assert generalization.results() == {}


def test_optimizers_and_residual_networks_fit_the_set(tiny: Path) -> None:
    data = tasks.dataset("hopper/medium")
    pairs = work.chosen_pairs(data, None, sdw.DistillConfig(size=32, hidden=(64, 64)))
    states, actions = torch.from_numpy(pairs.observations), torch.from_numpy(pairs.actions)
    for residual in (False, True):
        train = generalization.with_optimizer(lambda p: torch.optim.Adam(p, 1e-3), 200, residual)
        assert (train(pairs, 0)(states) - actions).square().mean() < 0.1 * actions.square().mean()


def test_ensemble_is_the_mean_action(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generalization, "ENSEMBLE", 2)
    pairs = work.chosen_pairs(tasks.dataset(""), None, sdw.DistillConfig(size=8, hidden=(8,), inner_steps=2))
    states = torch.from_numpy(pairs.observations)
    members = [sdw.behavior_clone(pairs, seed=seed)(states) for seed in (1000, 1001)]
    torch.testing.assert_close(generalization.ensemble(pairs, 0)(states), (members[0] + members[1]) / 2)


def test_diversity(tiny: Path, small_teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TABLE": tiny / "diversity.jsonl",
        "ENVS": ("hopper",),
        "QUALITIES": ("medium",),
        "STOPS": (1, 30),
        "POLICIES": 2,
        "EPISODES": 1,
        "COVERED": 300,
        "SCALES": (3, 5),
    }.items():
        monkeypatch.setattr(diversity, name, value)
    monkeypatch.setattr(work, "STAGES", (0, 3, 1000))
    monkeypatch.setattr(tasks, "TASKS", ["hopper/medium"])
    monkeypatch.setattr(cells, "ABLATED", ("hopper/medium",))
    for method, seed in (("sdw", 0), ("av-pbc", 0), ("av-pbc", 1)):
        suite.make([("hopper/medium", method, seed)])
    diversity.measure_ranking(("hopper", "medium"))
    (ranked,) = table.read(diversity.TABLE)
    reached = np.array(ranked["reached"])
    assert reached.shape == (2, 2, 2)
    assert (reached[:, 1, 0] < reached[:, 0, 0]).all()  # the loss falls
    assert "| hopper/medium |" in diversity.ranking(jobs=1)
    assert "| hopper/medium | 0 | " in diversity.tau()
    assert "| 3 to 999 | " in diversity.stages()
    columns = diversity.rows("stages", "task")["hopper/medium"]["columns"]
    assert sum(columns["share"]) == pytest.approx(1)
    assert np.dot(columns["share"], columns["weight, k = 3"]) == pytest.approx(1)  # weights have mean 1
    states = torch.from_numpy(tasks.dataset("").observations)
    pairs = work.distilled(("hopper/medium", "sdw", 0))
    actions = [sdw.behavior_clone(pairs, seed=seed)(states) for seed in range(2)]
    expected = np.mean([((a.detach().numpy() - small_teacher.actions(states.numpy())) ** 2).mean() for a in actions])
    assert np.dot(columns["share"], columns["error, SDW"]) == pytest.approx(expected, rel=1e-4)
    assert "| hopper/medium | random pairs | " in (section := diversity.sets())
    assert "| hopper/medium | SDW | " in section
    assert 0 < diversity.rows("sets", "task", "method")["hopper/medium", "random"]["spread"]["coverage"] < 1
    size = len(table.read(diversity.TABLE))
    for again in (diversity.stages, diversity.sets):
        again()
    assert len(table.read(diversity.TABLE)) == size  # nothing new, nothing added
    diversity.write_page()
    assert "| 0 to 2 | " in report.PAGE.read_text()
    assert {path.name for path in tiny.glob("*.png")} == {"diversity_ranking.png", "diversity_tau.png"}


@pytest.mark.parametrize("bandwidth", ["scott", "silverman", 0.3])
def test_kernel_density_is_scipys_without_the_state_itself(bandwidth: str | float) -> None:
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(0).standard_normal((400, 3))
    x = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T  # SciPy's kernel has the covariance's
    x *= np.array([0.5, 1.0, 30.0])  # shape, ours the columns' deviations: the same for uncorrelated columns
    kernel = stats.gaussian_kde(x.T, bw_method=bandwidth)
    own = 1 / math.sqrt(np.linalg.det(2 * math.pi * kernel.covariance))
    expected = np.log((kernel(x.T) * 400 - own) / 399)
    found = density_agreement.kde_log_density(x, bandwidth=bandwidth)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_kernel_density_of_constant_columns_and_isolated_states() -> None:
    x = np.random.default_rng(0).standard_normal((150, 2))
    x[0] = 1e3  # its kernels underflow in any plain sum
    expected = density_agreement.kde_log_density(x, bandwidth=0.1)
    assert np.isfinite(expected).all()
    assert expected.argmin() == 0
    padded = torch.from_numpy(np.concatenate([x, np.ones((150, 1))], axis=1))
    np.testing.assert_allclose(density_agreement.kde_log_density(padded, bandwidth=0.1), expected)
    for states, message in ((x[:1], "at least 2"), (np.ones((9, 2)), "all states are equal")):
        with pytest.raises(ValueError, match=message):
            density_agreement.kde_log_density(states)
    for bandwidth in ("wide", 0, -1.0, math.inf):
        with pytest.raises(ValueError, match="bandwidth must be"):
            density_agreement.kde_log_density(x, bandwidth=bandwidth)
