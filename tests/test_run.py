"""What a run leaves behind: its folder, metrics, the best set. How it is cut and goes on: test_interruption.py."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast import run as module
from sdw_fast import selection
from sdw_fast.evaluation import SELECTION_SEED, Evaluation
from sdw_fast.folder import RunFolder, load_checkpoint, metrics_line, read_metrics, read_run
from sdw_fast.progress import _Silent
from sdw_fast.run import new_distiller

TINY = {"size": 12, "hidden": (16, 16), "inner_steps": 5, "batch_size": 64, "steps": 30, "checkpoint_every": 7}


METRICS = {"loss", "gradient_norm", "adjoint_growth", "inner_loss", "inner_lr", "seconds"}


def load(path: Path) -> sdw.SyntheticDataset:
    return sdw.SyntheticDataset.load(path)


def test_result_carries_where_it_came_from(small_data, small_teacher, tmp_path) -> None:
    data = dataclasses.replace(small_data, name="small")
    result = sdw.distill(data, small_teacher, **TINY, seed=3, out=tmp_path / "run", progress=False)
    selected = result.config.pop("selected")
    assert (selected["by"], set(selected)) == ("held-out loss", {"by", "loss"})
    assert result.config == {**sdw.DistillConfig(**TINY, seed=3).to_dict(), "iteration": 30}
    assert (result.dataset_name, result.dataset_hash) == ("small", small_data.content_hash)
    assert result.version == sdw.__version__
    assert load(tmp_path / "run" / "best.npz") == result
    assert load(tmp_path / "run" / "last.npz") == result
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == list(range(1, 31))
    assert {"config.json", "metrics.jsonl", "checkpoint", "best.npz", "last.npz"} <= set(os.listdir(tmp_path / "run"))
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["config"] == sdw.DistillConfig(**TINY, seed=3).to_dict()
    assert content["dataset"] == {"name": "small", "hash": small_data.content_hash, "transitions": 400}
    assert (content["version"], content["n_runs"], content["source"]) == (sdw.__version__, None, None)
    assert content["objective"]["objective"] == "sdw"
    with pytest.raises(ValueError, match="started from Python"):
        read_run(tmp_path / "run")


def test_config_is_read_back(small_data, small_teacher, tmp_path) -> None:
    config = sdw.DistillConfig(**TINY)
    source = {"dataset": "somewhere", "teacher": None}
    module.run(new_distiller(small_data, small_teacher, config), tmp_path, source=source, progress=False)
    assert read_run(tmp_path) == (source, config)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable configuration"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no metrics"):
        read_metrics(tmp_path / "nowhere")


def test_metrics_beyond_the_checkpoint_are_cut(small_data, small_teacher, tmp_path) -> None:
    """A killed run leaves steps that no checkpoint knows, the last perhaps half written."""
    settings = {**TINY, "steps": 14, "schedule": "constant", "out": tmp_path, "progress": False}
    sdw.distill(small_data, small_teacher, **settings)
    whole = read_metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(metrics_line({"step": 15, "loss": 9.0}) + '{"step": 16, "lo')
    assert [m["step"] for m in read_metrics(tmp_path)] == list(range(1, 16))
    sdw.distill(small_data, small_teacher, **{**settings, "steps": 15})
    metrics = read_metrics(tmp_path)
    assert metrics[:14] == whole
    assert [m["step"] for m in metrics[14:]] == [15]
    assert metrics[14]["loss"] != 9.0


def test_metrics_that_were_cut_or_changed_are_refused(small_data, small_teacher, tmp_path) -> None:
    settings = {**TINY, "steps": 4, "out": tmp_path, "progress": False}
    sdw.distill(small_data, small_teacher, **settings)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    for text, words in (
        (lines[0], "ends at step 1 and the checkpoint at step 4: it was cut; remove it"),
        (lines[0] + "".join(lines[2:]), "its steps do not follow one another"),
        (whole.replace('"loss": 0.', '"loss": 1.', 1), "was changed"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            sdw.distill(small_data, small_teacher, **settings)
    path.unlink()
    sdw.distill(small_data, small_teacher, **settings)


def test_a_folder_without_checkpoint_starts_anew(small_data, small_teacher, tmp_path) -> None:
    settings = {**TINY, "out": tmp_path, "progress": False}
    expected = sdw.distill(small_data, small_teacher, **settings)
    (tmp_path / "checkpoint").unlink()

    def callback(distiller: sdw.Distiller, metrics: dict) -> None:
        assert not (tmp_path / "best.npz").exists() or distiller.iteration == 30

    assert sdw.distill(small_data, small_teacher, **settings, callback=callback) == expected
    assert [m["step"] for m in read_metrics(tmp_path)] == list(range(1, 31))


def test_a_finished_run_is_only_read(small_data, small_teacher, tmp_path) -> None:
    settings = {**TINY, "out": tmp_path, "progress": False}
    expected = sdw.distill(small_data, small_teacher, **settings)
    steps: list[int] = []
    again = sdw.distill(small_data, small_teacher, **settings, callback=lambda d, m: steps.append(d.iteration))
    assert again == expected
    assert steps == []


def test_checkpoints_are_as_frequent_as_asked(small_data, small_teacher, tmp_path) -> None:
    seen = []

    def callback(distiller: sdw.Distiller, metrics: dict) -> None:
        path = tmp_path / "checkpoint"
        seen.append(load_checkpoint(path)["distiller"]["iteration"] if path.exists() else 0)

    settings = {**TINY, "checkpoint_every": 4, "steps": 9}
    sdw.distill(small_data, small_teacher, **settings, out=tmp_path, callback=callback, progress=False)
    assert seen == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    assert load_checkpoint(tmp_path / "checkpoint")["distiller"]["iteration"] == 9


@pytest.mark.parametrize("n_runs", [None, 2])
def test_callback_gets_metrics_as_the_sets_are(small_data, small_teacher, n_runs) -> None:
    given: list[dict[str, Any]] = []
    settings = {**TINY, "steps": 2, "n_runs": n_runs, "progress": False}
    sdw.distill(small_data, small_teacher, **settings, callback=lambda d, m: given.append(m))
    assert [set(m) for m in given] == [METRICS, METRICS | {"held_out_loss"}]  # looked at in the last step
    for metrics in given:
        assert isinstance(metrics.pop("seconds"), float)
        for value in metrics.values():
            assert isinstance(value, float) if n_runs is None else value.shape == (2,)


def test_files_are_closed(small_data, small_teacher, tmp_path) -> None:
    distiller = new_distiller(small_data, small_teacher, sdw.DistillConfig(**TINY))
    with RunFolder(tmp_path, distiller) as folder:
        folder.log(2, [{"loss": 1.0}, {"loss": np.float32(2.0)}])
    assert [(m["step"], m["loss"]) for m in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0)]
    with pytest.raises(ValueError, match="closed"):
        folder.log(3, [{"loss": 3.0}])


@pytest.mark.parametrize("n_runs", [None, 2])
def test_tensorboard_is_written_where_it_is_installed(small_data, small_teacher, tmp_path, monkeypatch, n_runs) -> None:
    settings = {**TINY, "steps": 3, "n_runs": n_runs, "schedule": "constant", "progress": False}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    sdw.distill(small_data, small_teacher, **settings, out=tmp_path / "without")
    assert not list((tmp_path / "without").rglob("tensorboard"))
    written: dict[str, list[tuple[str, float, int]]] = {}
    closed, purged = [], []

    class SummaryWriter:
        def __init__(self, path: str, purge_step: int) -> None:
            self.scalars = written.setdefault(path, [])
            purged.append(purge_step)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append((name, value, step))

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    sdw.distill(small_data, small_teacher, **settings, out=tmp_path / "with")
    sdw.distill(small_data, small_teacher, **{**settings, "steps": 4}, out=tmp_path / "with")
    folders = [tmp_path / "with"] if n_runs is None else [tmp_path / "with" / f"run-00{i}" for i in range(2)]
    assert list(written) == [str(folder / "tensorboard") for folder in folders]
    for folder, scalars in zip(folders, written.values(), strict=True):
        kept = read_metrics(folder)
        assert scalars == [(name, x, m["step"]) for m in kept for name, x in m.items() if name != "step"]
    assert purged == [1] * len(folders) + [4] * len(folders)
    assert len(closed) == 2 * len(folders)


# --- the best set -----------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], sdw.SyntheticDataset]:
    """The sets that were evaluated, by seed and step. Their scores are scripted: the best of seed 0 is that of step 16,
    of seed 1 that of step 8; only the score decides, not the return."""
    seen = {}
    scripts = {0: {8: 20.0, 16: 50.0, 24: 30.0, 30: 40.0}, 1: {8: -1.0, 16: -3.0, 24: -2.0, 30: -1.0}}

    def evaluate(
        synthetic: sdw.SyntheticDataset, env: str, *, clones: int, episodes: int, seed: int, ranks: None
    ) -> Evaluation:
        assert (env, clones, episodes) == ("checked", 2, 4)
        step, seed = synthetic.config["iteration"], (seed - SELECTION_SEED) // 1000
        seen[seed, step] = synthetic
        score = scripts[seed][step]
        returns = np.full(episodes, 1000 - score)
        return Evaluation("Any-v0", seed, returns, np.ones(episodes, np.int64), np.full(episodes, score))

    monkeypatch.setattr("sdw_fast.environments.check_environment", lambda units, env: "checked")
    monkeypatch.setattr(selection, "evaluate_synthetic", evaluate)
    return seen


EVALUATED = {**TINY, "eval_every": 8, "eval_clones": 2, "eval_episodes": 4, "progress": False}


@pytest.fixture
def any_data(small_data) -> sdw.TransitionDataset:
    return dataclasses.replace(small_data, units=dataclasses.replace(small_data.units, env_id="Any-v0"))


@pytest.mark.parametrize("folder", [True, False])
def test_the_best_set_is_the_one_of_the_best_score(any_data, small_teacher, tmp_path, seen, folder: bool) -> None:
    given: list[dict[str, Any]] = []
    result = sdw.distill(
        any_data, small_teacher, **EVALUATED, out=tmp_path if folder else None, callback=lambda d, m: given.append(m)
    )
    assert list(seen) == [(0, 8), (0, 16), (0, 24), (0, 30)]
    assert result.config["iteration"] == 16
    assert result == seen[0, 16]
    assert [(m["score"], m["return"]) for m in given if "score" in m] == [(20, 980), (50, 950), (30, 970), (40, 960)]
    if folder:
        assert load(tmp_path / "best.npz") == seen[0, 16]
        assert load(tmp_path / "last.npz") == seen[0, 30]
        assert seen[0, 16] != seen[0, 30]
        kept = {m["step"]: m["score"] for m in read_metrics(tmp_path) if "score" in m}
        assert kept == {8: 20, 16: 50, 24: 30, 30: 40}


def test_the_progress_bar_shows_what_was_measured(any_data, small_teacher, seen, monkeypatch) -> None:
    shown: list[list[str]] = []
    monkeypatch.setattr(_Silent, "set_postfix", lambda bar, figures, refresh: shown.append([*figures.values()]))
    options = {**EVALUATED, "select": "last"}
    metrics: list[dict[str, Any]] = []
    sdw.distill(any_data, small_teacher, **options, callback=lambda d, m: metrics.append(m))
    assert shown[6] == [f"{metrics[6]['loss']:.4f}", f"{metrics[6]['gradient_norm']:.3g}"]  # no return is known yet
    assert [figures[2:] for figures in shown[7:16:8]] == [["20.0"], ["50.0"]]
    assert shown[17][2:] == ["50.0"]  # the last one stays
    shown.clear()
    sdw.distill(any_data, small_teacher, **{**options, "eval_every": 0, "select": "held-out"})
    assert {len(figures) for figures in shown[:-1]} == {2}
    assert len(shown[-1]) == 3  # the held-out loss


def test_every_run_has_a_best_set_of_its_own(any_data, small_teacher, tmp_path, seen) -> None:
    given: list[dict[str, Any]] = []
    results = sdw.distill(
        any_data, small_teacher, **EVALUATED, n_runs=2, out=tmp_path, callback=lambda d, m: given.append(m)
    )
    for number, best in enumerate([16, 8]):  # an equal score later does not replace it
        assert results[number] == seen[number, best]
        assert load(tmp_path / f"run-00{number}" / "best.npz") == seen[number, best]
        assert load(tmp_path / f"run-00{number}" / "last.npz") == seen[number, 30]
    assert [m["score"].tolist() for m in given if "score" in m] == [[20, -1], [50, -3], [30, -2], [40, -1]]
    assert {m["step"]: m["score"] for m in read_metrics(tmp_path / "run-001") if "score" in m}[24] == -2


def test_the_best_set_is_not_forgotten(any_data, small_teacher, tmp_path, seen) -> None:
    """Cut after the best evaluation, a run goes on to worse ones."""

    def callback(distiller: sdw.Distiller, metrics: dict) -> None:
        if distiller.iteration == 22:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        sdw.distill(any_data, small_teacher, **EVALUATED, out=tmp_path, callback=callback)
    best = seen[0, 16]
    result = sdw.distill(any_data, small_teacher, **EVALUATED, out=tmp_path)
    assert (0, 30) in seen
    assert result == best
    assert load(tmp_path / "best.npz") == best


def test_evaluation_needs_an_environment(small_data, small_teacher, tmp_path) -> None:
    with pytest.raises(ValueError, match="names no environment"):
        sdw.distill(small_data, small_teacher, **TINY, eval_every=10, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


# --- where it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_host_that_runs_ahead_changes_nothing(small_data, small_teacher, tmp_path, monkeypatch, optimizer) -> None:
    """What a GPU does, on the CPU: steps are looked at only from time to time, the optimizer is the fused one."""
    settings = {**TINY, "steps": 24, "optimizer": optimizer, "average": 0.9, "schedule": "cosine"}
    waiting = sdw.distill(small_data, small_teacher, **settings, out=tmp_path / "waiting", progress=False)
    monkeypatch.setattr(sdw.Distiller, "runs_ahead", True)
    monkeypatch.setattr(module, "FETCH_EVERY", 5)
    ahead = sdw.distill(small_data, small_teacher, **settings, out=tmp_path / "ahead", progress=False)
    np.testing.assert_allclose(ahead.observations, waiting.observations, rtol=1e-3, atol=1e-3)
    first, second = (read_metrics(tmp_path / name) for name in ("waiting", "ahead"))
    assert [m["step"] for m in first] == [m["step"] for m in second] == list(range(1, 25))
    np.testing.assert_allclose([m["loss"] for m in first], [m["loss"] for m in second], rtol=1e-3)
    together = [len(list(group)) for _, group in itertools.groupby(m["seconds"] for m in second)]
    assert together == [5, 2, 5, 2, 5, 2, 3]  # steps looked at together share their seconds; a checkpoint every 7


def test_works_outside_the_main_thread(small_data, small_teacher) -> None:
    results: list[sdw.SyntheticDataset] = []
    thread = threading.Thread(
        target=lambda: results.append(sdw.distill(small_data, small_teacher, **TINY, progress=False))
    )
    thread.start()
    thread.join()
    assert len(results) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(small_data, small_teacher) -> None:
    with pytest.raises(ValueError, match="'cuda' needs a GPU"):
        sdw.distill(small_data, small_teacher, **TINY, device="cuda")
