"""The command line, run as a user would: every command, every option, the refusals, and runs resumed."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import sdw_fast as sdw
from sdw_fast.cli import app
from sdw_fast.config import DistillConfig, TeacherConfig
from sdw_fast.distiller import Distiller
from sdw_fast.files import sealed, to_json, unsealed, write_text
from sdw_fast.folder import read_metrics

TINY = ["--size", "8", "--inner-steps", "3", "--batch-size", "32", "--objective", "dbc", "--checkpoint-every", "2"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})


def printed(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["config"]


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps."""
    folder = tmp_path_factory.mktemp("finished")
    assert run("distill", dataset, *TINY, "--steps", 6, "--out", folder).exit_code == 0
    return folder


def assert_same_set(first: Path, second: Path) -> None:
    a, b = (sdw.SyntheticDataset.load(path) for path in (first, second))
    np.testing.assert_array_equal(a.observations, b.observations)
    np.testing.assert_array_equal(a.actions, b.actions)


# --- info, collect ---------------------------------------------------------------------------------------------------


def test_info() -> None:
    config = printed("info")
    assert config["sdw_fast"] == sdw.__version__
    assert config["instruction_set"] in config["instruction_sets_available"]
    assert "torch" in run("info").stdout


@pytest.mark.parametrize(
    "command", ["info", "collect", "train-teacher", "density", "distill", "evaluate", "plot", "report"]
)
def test_every_command_shows_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"sdw-fast {command}" in result.stdout


def test_collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    result = run("collect", "hopper/medium", "--steps", 60, "--seed", 1)
    assert result.exit_code == 0, result.output
    assert "sdw/hopper/medium-v0" in result.stdout
    first = sdw.load_dataset("hopper/medium")
    assert len(first) == 60
    assert "--overwrite" in run("collect", "hopper/medium", "--steps", 60, "--seed", 2).output
    assert run("collect", "hopper/medium", "--steps", 60, "--seed", 2, "--overwrite").exit_code == 0
    assert sdw.load_dataset("hopper/medium").content_hash != first.content_hash
    assert run("collect", "hopper/medium", "--steps", 60, "--seed", 1, "--overwrite").exit_code == 0
    assert sdw.load_dataset("hopper/medium").content_hash == first.content_hash


# --- settings become options -----------------------------------------------------------------------------------------

# Of every setting a value that is not its default.
OTHER = {
    "objective": "dbc",
    "value_weights": "paper",
    "beta": 0.03,
    "density": False,
    "density_method": "flow",
    "k": 7,
    "tau": 0.25,
    "ess": 0.6,
    "clip": 0.8,
    "state_noise": 1.0,
    "size": 9,
    "init": "kmeans++",
    "hidden": [32, 16],
    "inner_width": 12,
    "gain": 1.2,
    "fixed_initialization": 5,
    "inner_steps": 4,
    "inner_lr": 0.15,
    "inner_momentum": 0.7,
    "adapt_inner_lr": False,
    "window": 3,
    "tape": "recompute",
    "precision": "ieee",
    "steps": 5,
    "batch_size": 33,
    "initializations": 2,
    "optimizer": "sgd",
    "lr": 0.04,
    "schedule": "constant",
    "momentum": 0.8,
    "average": 0.85,
    "clip_norm": 0.5,
    "select": "held-out",
    "seed": 3,
    "eval_every": 2,
    "eval_clones": 1,
    "eval_episodes": 3,
    "checkpoint_every": 6,
}
OTHER_TEACHER = {"algorithm": "iql", "steps": 3, "alpha": 1.5, "expectile": 0.8, "temperature": 2.0, "seed": 4}


def as_options(settings: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words


def test_every_setting_is_tested() -> None:
    assert list(OTHER) == [field.name for field in dataclasses.fields(DistillConfig)]
    assert list(OTHER_TEACHER) == [field.name for field in dataclasses.fields(TeacherConfig)]
    assert not [name for name, value in DistillConfig().to_dict().items() if OTHER[name] == value]


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_is_an_option_that_reaches_the_run(dataset: Path, monkeypatch, name: str) -> None:
    reached = []
    monkeypatch.setattr("sdw_fast.run.new_distiller", lambda data, teacher, config, **_: reached.append(config))
    evaluated = {"eval_every": 2, "eval_clones": 2}
    needs = evaluated if name in ("eval_clones", "eval_episodes") else {}
    needs |= {"value_weights": "paper"} if name == "beta" else {}
    run("distill", dataset, *as_options({**needs, name: OTHER[name]}), "--out", "not reached")
    assert [config.to_dict() for config in reached] == [{**DistillConfig().to_dict(), **needs, name: OTHER[name]}]


def test_evaluations_happen_when_and_as_often_as_told(dataset: Path, tmp_path: Path) -> None:
    often = ["--steps", 5, "--eval-every", 2, "--eval-clones", 1, "--eval-episodes", 3, "--checkpoint-every", 6]
    assert run("distill", dataset, *TINY, *often, "--out", tmp_path).exit_code == 0
    assert [step["step"] for step in read_metrics(tmp_path) if "score" in step] == [2, 4, 5]  # the last step always
    assert sdw.SyntheticDataset.load(tmp_path / "best.npz").config["eval_episodes"] == 3


def test_options_that_are_not_given_are_the_defaults(finished: Path) -> None:
    given = {"size": 8, "inner_steps": 3, "batch_size": 32, "objective": "dbc", "checkpoint_every": 2, "steps": 6}
    assert settings_of(finished) == {**DistillConfig().to_dict(), **given}


def test_help_tells_every_setting_s_meaning_and_default() -> None:
    shown = run("distill", "--help").stdout
    for setting in dataclasses.fields(DistillConfig):
        assert f"--{setting.name.replace('_', '-')}" in shown
    assert "Neighbors of the k-NN density. [10]" in shown


def test_presets_none_and_what_overrides_them(dataset: Path, tmp_path: Path) -> None:
    small = ["--objective", "dbc", "--size", 4, "--inner-steps", 2, "--batch-size", 8, "--steps", 1]
    assert run("distill", dataset, *small, "--preset", "published", "--out", tmp_path / "a").exit_code == 0
    published = DistillConfig.preset("published", objective="dbc", size=4, inner_steps=2, batch_size=8, steps=1)
    assert settings_of(tmp_path / "a") == published.to_dict()
    own = ["--preset", "published", "--inner-width", "none", "--density", "--k", 20, "--hidden", "16"]
    assert run("distill", dataset, *small, *own, "--out", tmp_path / "b").exit_code == 0
    expected = {**published.to_dict(), "inner_width": None, "density": True, "k": 20, "hidden": [16]}
    assert settings_of(tmp_path / "b") == expected
    assert "preset must be one of" in run("distill", dataset, "--preset", "best", "--out", tmp_path / "c").output


def test_density_is_a_switch(dataset: Path, tmp_path: Path) -> None:
    small = ["--size", 4, "--inner-steps", 2, "--batch-size", 8, "--steps", 1, "--objective", "dbc"]
    for option, expected in (("--density", True), ("--no-density", False)):
        assert run("distill", dataset, *small, option, "--out", tmp_path / option).exit_code == 0
        content = json.loads((tmp_path / option / "config.json").read_text())
        assert content["config"]["density"] is expected
        assert ("density" in content["objective"]) is expected


@pytest.mark.parametrize(
    "arguments", [["--k", "many"], ["--k", "none"], ["--lr", "fast"], ["--hidden", "32,wide"], ["--inner-widht", "3"]]
)
def test_words_that_are_no_values_are_refused(dataset: Path, tmp_path: Path, arguments: list[str]) -> None:
    result = run("distill", dataset, *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert not (tmp_path / "run").exists()


# --- density ---------------------------------------------------------------------------------------------------------


def test_density(dataset: Path, tmp_path: Path) -> None:
    values = printed("density", dataset, "--k", 5, "--out", tmp_path / "logd.npy", "--ess", 0.7)
    assert values["effective_sample_size"] == pytest.approx(0.7, abs=0.01)
    data = sdw.load_dataset(dataset)
    np.testing.assert_array_equal(np.load(tmp_path / "logd.npy"), sdw.log_density(data, "knn", k=5))
    assert (tmp_path / "logd.png").stat().st_size > 10_000
    assert (tmp_path / "logd.tau.png").stat().st_size > 10_000
    assert {"states", "dimension", "intrinsic_dimension", "entropy", "tau", "largest"} <= values.keys()


def test_density_options_reach_the_weights(dataset: Path) -> None:
    data = sdw.load_dataset(dataset)
    for options, k, settings in [
        ([], 10, {"ess": 0.5}),
        (["--k", 20], 20, {"ess": 0.5}),
        (["--tau", 0.3], 10, {"tau": 0.3}),
        (["--ess", 0.9, "--clip", 0.8], 10, {"ess": 0.9, "clip": 0.8}),
    ]:
        expected = sdw.density_weights(sdw.log_density(data, k=k), **settings).to_dict()
        values = printed("density", dataset, *options)
        assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_density_method_and_seed_reach(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("zuko")
    with np.load(dataset) as file:
        few = {name: array[:60] if array.ndim else array for name, array in file.items()}
    np.savez(tmp_path / "few.npz", **few)
    out = tmp_path / "logd.npy"
    result = run("density", tmp_path / "few.npz", "--density-method", "flow", "--seed", 1, "--out", out)
    assert result.exit_code == 0, result.output
    assert "effective_sample_size" in result.stdout
    data = sdw.load_dataset(tmp_path / "few.npz")
    np.testing.assert_array_equal(np.load(out), sdw.log_density(data, "flow", seed=1))


# --- distill, resume, evaluate, plot ---------------------------------------------------------------------------------


def test_distill_and_resume(dataset: Path, finished: Path, tmp_path: Path) -> None:
    report = printed("distill", dataset, *TINY, "--steps", 6, "--out", tmp_path)
    assert report == {"run": str(tmp_path), "sets": 1, "pairs": 8, "steps": 6}
    (tmp_path / "checkpoint").unlink()  # as if killed before the first checkpoint
    assert run("distill", "--resume", tmp_path).exit_code == 0
    assert_same_set(finished / "last.npz", tmp_path / "last.npz")
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_is_130_and_the_run_goes_on_to_the_same_set(
    dataset: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Distiller.advance

    def interrupted(distiller: Distiller) -> torch.Tensor:
        if distiller.iteration == 2:
            signal.raise_signal(signal.SIGINT)
        return advance(distiller)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "advance", interrupted)
        result = run("distill", dataset, *TINY, "--steps", 6, "--out", tmp_path)
    assert result.exit_code == 130
    assert f"sdw-fast distill --resume {tmp_path}" in result.output
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3]
    assert run("distill", "--resume", tmp_path).exit_code == 0
    assert_same_set(finished / "last.npz", tmp_path / "last.npz")


def test_resume_may_evaluate_otherwise_but_not_distill_otherwise(dataset: Path, tmp_path: Path) -> None:
    begun = ["--schedule", "constant", "--steps", 4, "--out", tmp_path]
    assert run("distill", dataset, *TINY, *begun).exit_code == 0
    refused = run("distill", "--resume", tmp_path, "--size", 9)
    assert (refused.exit_code, "other settings of ['size']" in refused.output) == (1, True)
    more = ["--steps", 6, "--eval-every", 2, "--eval-clones", 1, "--eval-episodes", 2, "--checkpoint-every", 3]
    assert run("distill", "--resume", tmp_path, *more).exit_code == 0
    config = settings_of(tmp_path)
    assert [config[name] for name in ("size", "steps", "eval_every", "eval_clones", "eval_episodes")] == [8, 6, 2, 1, 2]
    assert [m["step"] for m in read_metrics(tmp_path) if "score" in m] == [6]


def test_resume_takes_dataset_teacher_device_and_number_from_the_run(dataset: Path, finished: Path) -> None:
    options = [["--device", "cpu"], ["--preset", "paper"], ["--n-runs", 2], ["--teacher", "t"], ["--out", "x"]]
    for option in [*options, ["--env", "Toy-v0"], ["--mapped"]]:
        result = run("distill", "--resume", finished, *option)
        assert result.exit_code == 1
        assert f"--resume takes {option[0]} from the run" in result.output
    assert "--resume takes DATASET from the run" in run("distill", dataset, "--resume", finished).output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_reaches_the_run_and_its_resumption(dataset: Path, finished: Path, tmp_path: Path) -> None:
    assert "needs a GPU" in run("distill", dataset, *TINY, "--steps", 1, "--device", "cuda", "--out", tmp_path).output
    content = unsealed(json.loads((finished / "config.json").read_text()))
    rest = {"teacher": None, "device": "cpu", "n_runs": None, "env": None, "mapped": False}
    assert content["source"] == {"dataset": str(dataset), **rest}
    content["source"]["device"] = "cuda"
    write_text(tmp_path / "config.json", to_json(sealed(content)))
    assert "needs a GPU" in run("distill", "--resume", tmp_path).output


def test_distill_several_runs(dataset: Path, finished: Path, tmp_path: Path) -> None:
    assert printed("distill", dataset, *TINY, "--steps", 4, "--n-runs", 2, "--out", tmp_path)["sets"] == 2
    sets = [sdw.SyntheticDataset.load(tmp_path / f"run-00{number}" / "best.npz") for number in range(2)]
    assert sets[1].config["seed"] == sets[0].config["seed"] + 1
    (tmp_path / "checkpoint").unlink()
    assert run("distill", "--resume", tmp_path).exit_code == 0
    again = sdw.SyntheticDataset.load(tmp_path / "run-001" / "last.npz")
    np.testing.assert_array_equal(again.observations, sets[1].observations)
    assert len(read_metrics(tmp_path / "run-000")) == 4


def test_the_environment_of_a_dataset_that_names_none(dataset: Path, toy_env: str, tmp_path: Path) -> None:
    with np.load(dataset) as file:
        np.savez(tmp_path / "nameless.npz", **{name: file[name] for name in file.files if name != "env_id"})
    options = [tmp_path / "nameless.npz", *TINY, "--steps", 1, "--eval-every", 1, "--out", tmp_path / "run"]
    assert "names no environment" in run("distill", *options).output
    assert run("distill", *options, "--env", "Toy-v0").exit_code == 0
    assert run("distill", "--resume", tmp_path / "run").exit_code == 0


def test_evaluate(finished: Path) -> None:
    path = finished / "best.npz"
    plain = printed("evaluate", path)
    assert (plain["env_id"], plain["seed"], plain["episodes"]) == ("Toy-v0", 0, 10)
    pairs = sdw.SyntheticDataset.load(path)
    assert plain == sdw.evaluate_synthetic(pairs, clones=5, episodes=10, seed=0).to_dict()
    for option, expected in [
        ("seed", {"seed": 3}),
        ("episodes", {"episodes": 3, "clones": 3}),
        ("clones", {"clones": 2}),
    ]:
        values = printed("evaluate", path, f"--{option}", expected[option])
        assert values == sdw.evaluate_synthetic(pairs, **{"clones": 5, "episodes": 10, **expected}).to_dict()
        assert values["returns"] != plain["returns"]
    assert "env_id           Toy-v0" in run("evaluate", path).stdout


def test_evaluate_in_another_environment(finished: Path) -> None:
    values = printed("evaluate", finished / "best.npz", "--env", "Hopper-v5", "--episodes", 2)
    assert (values["env_id"], len(values["returns"])) == ("Hopper-v5", 2)
    assert values["normalized_mean"] == pytest.approx(100 * (values["mean"] + 20.272305) / (3234.3 + 20.272305))


def test_plot(finished: Path) -> None:
    assert run("plot", finished).exit_code == 0
    assert (finished / "metrics.png").stat().st_size > 10_000


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_an_out_that_cannot_be_a_folder_gets_one_sentence(dataset: Path) -> None:
    result = run("distill", dataset, *TINY, "--steps", 1, "--out", dataset / "run")
    assert (result.exit_code, result.output[:6]) == (1, "error:")
