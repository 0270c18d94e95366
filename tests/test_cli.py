"""The command line, run as a user would: every command once, the refusals, and a run resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import sdw_fast as sdw
from sdw_fast.cli import app
from sdw_fast.distill import read_metrics

SMALL = ["--size", "8", "--inner-steps", "3", "--batch-size", "32", "--objective", "dbc", "--checkpoint-every", "2"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def dataset(small_data: sdw.TransitionDataset, tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    arrays = ("observations", "actions", "rewards", "terminations", "truncations", "next_observations")
    np.savez(path, env_id="Hopper-v5", **{name: getattr(small_data, name) for name in arrays})
    return path


def test_info() -> None:
    printed = json.loads(run("info", "--json").stdout)
    assert printed["sdw_fast"] == sdw.__version__
    assert printed["instruction_set"] in printed["instruction_sets_available"]
    assert "torch" in run("info").stdout


@pytest.mark.parametrize("command", ["info", "collect", "train-teacher", "density", "distill", "evaluate", "plot"])
def test_every_command_shows_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"sdw-fast {command}" in result.stdout


def test_collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    result = run("collect", "hopper/medium", "--steps", 60, "--seed", 1)
    assert result.exit_code == 0, result.output
    assert "sdw/hopper/medium-v0" in result.stdout
    assert len(sdw.load_dataset("hopper/medium")) == 60


def test_density(dataset: Path, tmp_path: Path) -> None:
    result = run("density", dataset, "--k", 5, "--out", tmp_path / "logd.npy", "--ess", 0.7, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["effective_sample_size"] == pytest.approx(0.7, abs=0.01)
    data = sdw.load_dataset(dataset)
    np.testing.assert_array_equal(np.load(tmp_path / "logd.npy"), sdw.log_density(data, "knn", k=5))
    assert (tmp_path / "logd.png").stat().st_size > 10_000
    assert (tmp_path / "logd.tau.png").stat().st_size > 10_000


def test_distill_resume_evaluate_plot(dataset: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("distill", dataset, *SMALL, "--steps", 6, "--out", whole).exit_code == 0
    assert run("distill", dataset, *SMALL, "--steps", 6, "--out", parts).exit_code == 0
    (parts / "checkpoint").unlink()  # as if killed before the first checkpoint
    assert run("distill", "--resume", parts).exit_code == 0
    first, second = (sdw.SyntheticDataset.load(folder / "last.npz") for folder in (whole, parts))
    np.testing.assert_array_equal(first.observations, second.observations)
    assert [m["step"] for m in read_metrics(parts)] == [1, 2, 3, 4, 5, 6]

    result = run("evaluate", whole / "best.npz", "--env", "Hopper-v5", "--episodes", 2, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert len(printed["returns"]) == 2
    assert printed["normalized_mean"] == pytest.approx(100 * (printed["mean"] + 20.272305) / (3234.3 + 20.272305))

    assert run("plot", whole).exit_code == 0
    assert (whole / "metrics.png").stat().st_size > 10_000


def test_distill_takes_the_inner_loop_s_options(dataset: Path, tmp_path: Path) -> None:
    inner = ("--inner-lr", 0.2, "--inner-momentum", 0.4)
    assert run("distill", dataset, *SMALL, *inner, "--steps", 1, "--out", tmp_path).exit_code == 0
    config = sdw.SyntheticDataset.load(tmp_path / "last.npz").config
    assert (config["inner_lr"], config["inner_momentum"]) == (0.2, 0.4)


def test_distill_several_runs(dataset: Path, tmp_path: Path) -> None:
    assert run("distill", dataset, *SMALL, "--steps", 4, "--runs", 2, "--out", tmp_path).exit_code == 0
    sets = [sdw.SyntheticDataset.load(tmp_path / f"run-00{number}" / "best.npz") for number in range(2)]
    assert sets[1].config["seed"] == sets[0].config["seed"] + 1
    (tmp_path / "checkpoint").unlink()
    assert run("distill", "--resume", tmp_path).exit_code == 0
    again = sdw.SyntheticDataset.load(tmp_path / "run-001" / "last.npz")
    np.testing.assert_array_equal(again.observations, sets[1].observations)
    assert len(read_metrics(tmp_path / "run-000")) == 4


def test_train_teacher_and_distill_with_it(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchrl")
    teacher = tmp_path / "teacher.safetensors"
    result = run("train-teacher", dataset, "--algorithm", "td3bc", "--steps", 3, "--out", teacher)
    assert result.exit_code == 0, result.output
    assert sdw.Teacher.load(teacher).actions(np.zeros((1, 11), np.float32)).shape == (1, 3)
    result = run(
        "distill", dataset, *SMALL, "--objective", "pbc", "--teacher", teacher, "--steps", 2, "--out", tmp_path / "run"
    )
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--out", "somewhere"], "give DATASET and --out"),
        (["distill", "--resume", "nowhere"], "holds no run"),
        (["evaluate", "nothing.npz"], "no synthetic set"),
        (["plot", "nowhere"], "no metrics.jsonl"),
        (["density", "absent.npz"], "no dataset file"),
        (["distill", "absent.npz", "--out", "x", "--objective", "best"], "objective must be one of"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
