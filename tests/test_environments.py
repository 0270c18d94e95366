"""Environments: every way to name one, with a dataset and for a run, and the check before a run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import three_episodes
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import ClipAction, RescaleAction, TimeLimit
from toys import Steps, one, registered, units  # noqa: F401
from typer.testing import CliRunner

import sdw_fast as sdw
from sdw_fast import environments
from sdw_fast.cli import app
from sdw_fast.environments import check_environment, limited, make_env

SHARED = Steps()
TINY: dict[str, Any] = {"objective": "dbc", "size": 3, "hidden": (4,), "inner_steps": 2, "progress": False}


# --- making one ------------------------------------------------------------------------------------------------------


def test_mujoco_deprecation_notes_stay_silent(tmp_path: Path) -> None:
    script = "from sdw_fast.environments import make_env; make_env('HalfCheetah-v5'); print('made')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    command = [sys.executable, "-W", "always", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert run.stdout == "made\n"
    assert "deprecated" not in run.stderr
    assert not list(tmp_path.iterdir())  # MuJoCo would log to a file here


def test_other_mujoco_warnings_reach_the_handler_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    mujoco = pytest.importorskip("mujoco")
    received: list[str] = []

    def compile_model(env_id: str) -> gym.Env:
        mujoco.get_mju_user_warning()("attribute 'x' is deprecated")
        mujoco.get_mju_user_warning()("Nan, Inf or huge value in QACC")
        return Steps()

    monkeypatch.setattr(gym, "make", compile_model)
    with pytest.warns(UserWarning, match="QACC"):
        make_env("Any-v0")
    handler = received.append
    mujoco.set_mju_user_warning(handler)
    try:
        make_env("Any-v0")
        assert mujoco.get_mju_user_warning() == handler
    finally:
        mujoco.set_mju_user_warning(None)
    assert received == ["Nan, Inf or huge value in QACC"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("MuJoCo is not installed", r'Any-v0 needs MuJoCo: pip install "sdw_fast\[mujoco\]"'),
        ("Box2D is not installed", "Any-v0 needs a package that is not installed: Box2D"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, said: str, message: str) -> None:
    def missing(env_id: str) -> None:
        raise gym.error.DependencyNotInstalled(said)

    monkeypatch.setattr(gym, "make", missing)
    with pytest.raises(ImportError, match=message):
        make_env("Any-v0")


def test_an_environment_is_named_in_any_way() -> None:
    """An id, a specification with other arguments, a function, a class, and an object, which stays open."""
    spec = gym.make("Steps-v0", length=2, bonus=10.0).spec
    given = TimeLimit(Steps(), 3)
    closed: list[int] = []
    given.close = lambda: closed.append(1)
    for env, name, length, pay in [
        ("Steps-v0", "Steps-v0", 4, 14.0),
        (spec, "Steps-v0", 2, 25.0),
        (lambda: TimeLimit(Steps(), 3), "Steps", 3, 9.0),
        (Steps, "Steps", 4, 14.0),
        (given, "Steps", 3, 9.0),
        (gym.make("Steps-v0"), "Steps-v0", 4, 14.0),
    ]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no time limit")
            result = sdw.evaluate(one, env, episodes=18)
        assert (result.env_id, *{*result.lengths}, *{*result.returns}) == (name, length, pay)
    assert not closed


def test_a_module_that_registers_an_environment_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "gym.register('Mine-v0', 'toys:Steps', max_episode_steps=9, disable_env_checker=True)"
    (tmp_path / "sdw_mine.py").write_text(f"import gymnasium as gym\n{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    named = dataclasses.replace(units(), env_id="sdw_mine:Mine-v0")  # as a file may say, which imports nothing
    with pytest.raises(ValueError, match=r"no environment 'sdw_mine:Mine-v0' here.*env='package:Mine-v0'"):
        check_environment(named)
    assert sdw.evaluate(one, "sdw_mine:Mine-v0", episodes=1).lengths == 4
    data = sdw.load_dataset(three_episodes(), env_id="sdw_mine:Mine-v0")
    assert (data.env_id, data.action_bounds[1]) == ("sdw_mine:Mine-v0", 2)
    assert make_env(check_environment(named)).spec.id == "Mine-v0"  # the caller has imported it
    gym.registry.pop("Mine-v0")
    with pytest.raises(ValueError, match="no environment 'sdw_nowhere:Mine-v0'"):
        sdw.evaluate(one, "sdw_nowhere:Mine-v0")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("Step-v0", "there is no environment 'Step-v0' here"),
        ("Steps-v7", "there is no environment 'Steps-v7' here"),
        (EnvSpec("Steps-v0", Steps, kwargs={"speed": 3}), "'Steps-v0' cannot be made: .*speed"),
        (3, "an environment is given as .* got 3"),
        (lambda: "Steps-v0", "got a function that returns str"),
        (lambda: SHARED, "must make a new environment at each call"),
        ("Goal-v0", "Goal-v0 has observation space Dict.*FlattenObservation"),
        ("FrozenLake-v1", "observation space Discrete"),
    ],
)
def test_what_cannot_be_used_gets_a_sentence(env: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sdw.evaluate(one, env)


def test_discrete_actions_are_taken() -> None:
    result = sdw.evaluate(lambda x: (x[:, 2] > 0).long(), "CartPole-v1", episodes=3)
    assert (result.returns == result.lengths).all()
    assert result.mean > 15


# --- with a dataset --------------------------------------------------------------------------------------------------


def test_a_dataset_takes_name_bounds_and_arguments_of_an_environment_in_any_form(tmp_path: Path) -> None:
    env = RescaleAction(gym.make("Steps-v0", bonus=5.0), -4.0, 4.0)
    for given in (env, env.spec, lambda: RescaleAction(gym.make("Steps-v0", bonus=5.0), -4.0, 4.0)):
        data = sdw.load_dataset(three_episodes(), env_id=given)
        assert (data.env_id, data.action_bounds) == ("Steps-v0", (-4, 4))
        syn = sdw.distill(data, **TINY, steps=1)
        syn = sdw.SyntheticDataset.load(syn.save(tmp_path / "set.npz"))
        assert syn.units == data.units
        assert sdw.evaluate_synthetic(syn, clones=1, episodes=1).returns > 25  # four times 5, and 10 by the steps
    nameless = sdw.load_dataset(three_episodes(), env_id=Steps)
    assert (nameless.env_id, nameless.action_bounds) == (None, (-2, 2))


def test_distillation_evaluates_in_the_environment_given() -> None:
    """An object that cannot be kept, for data that name none: bounds and returns are its own."""
    data = sdw.load_dataset(three_episodes())
    settings = {**TINY, "steps": 1, "eval_every": 1}
    seen: list[dict] = []
    env = TimeLimit(Steps(bonus=1000.0), 2)
    syn = sdw.distill(data, env=env, **settings, callback=lambda _, metrics: seen.append(metrics))
    assert 1999 < seen[-1]["return"] < 2007
    assert syn.units.action_bounds == (-2, 2)
    with pytest.raises(ValueError, match="names no environment: pass env"):
        sdw.distill(data, **settings)


def test_a_run_and_an_evaluation_share_no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[str, set[int]] = {"episodes": set(), "clones": set()}
    reset, clone = Steps.reset, sdw.evaluation.behavior_clone
    monkeypatch.setattr(
        Steps, "reset", lambda self, *, seed=None, options=None: seeds["episodes"].add(seed) or reset(self)
    )
    monkeypatch.setattr(
        "sdw_fast.evaluation.behavior_clone",
        lambda *args, seed, **options: seeds["clones"].add(seed) or clone(*args, seed=seed, **options),
    )
    data = sdw.load_dataset(three_episodes(), env_id="Steps-v0")
    settings = {**TINY, "steps": 1, "eval_every": 1}
    syn = sdw.distill(data, **settings, n_runs=2)[0]
    chosen = {kind: set(used) for kind, used in seeds.items()}
    assert {kind: len(used) for kind, used in chosen.items()} == {"episodes": 20, "clones": 10}
    assert all(0 <= seed < 2**31 for used in chosen.values() for seed in used)
    for used in seeds.values():
        used.clear()
    sdw.evaluate_synthetic(syn)
    for kind, used in seeds.items():
        assert len(used) == (10 if kind == "episodes" else 5)
        assert not used & chosen[kind]


def test_a_module_in_the_working_directory_registers_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was started with --env module:Id goes on with it, and its set asks for the module by name."""

    def shell(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        gym.registry.pop("Local-v0", None)  # as in a new process
        sys.modules.pop("sdw_local", None)
        return result.exit_code, result.output

    text = "gym.register('Local-v0', gym.spec('Steps-v0').entry_point, max_episode_steps=9, disable_env_checker=True)"
    (tmp_path / "sdw_local.py").write_text(f"import gymnasium as gym\n{text}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    np.savez("data.npz", **three_episodes())
    env = ["--env", "sdw_local:Local-v0"]
    options = ["--objective", "dbc", "--size", 3, "--hidden", 4, "--steps", 1, "--eval-every", 1, "--out", "run"]
    assert shell("distill", "data.npz", *options, *env)[0] == 0
    status, told = shell("evaluate", "run/best.npz")
    assert (status, "env='package:Local-v0'" in told) == (1, True)
    assert shell("distill", "--resume", "run")[0] == 0
    status, told = shell("evaluate", "run/best.npz", *env)
    assert (status, "Local-v0" in told) == (0, True)


# --- the check before a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "env", "message"),
    [
        ({}, None, "names no environment: pass env"),
        ({"states": 5}, "Steps-v0", r"Steps-v0 does not fit: its observations are Box.*\(2,\).*vectors of 5 numbers"),
        ({"states": 3}, "Hopper-v5", r"Hopper-v5 does not fit: its observations are Box.*\(11,\).*vectors of 3"),
        ({"states": 11}, "Hopper-v5", r"Hopper-v5 does not fit: its actions are Box.*\(3,\).*vectors of 1"),
        ({"states": 4}, "CartPole-v1", r"CartPole-v1 does not fit: its actions are Discrete\(2\).*vectors of 1"),
        ({"env_id": "Nowhere-v0"}, None, "there is no environment 'Nowhere-v0' here"),
    ],
)
def test_an_environment_that_does_not_fit_is_told_before_the_first_step(
    changes: dict[str, Any], env: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_environment(units(**changes), env)


def test_bounds_are_found_behind_a_wrapper_that_clips_and_their_lack_is_told() -> None:
    clipped = TimeLimit(ClipAction(gym.make("Steps-v0")), 5)
    assert sdw.load_dataset(three_episodes(), env_id=clipped).action_bounds == (-2, 2)
    unbounded = gym.make("Steps-v0")
    unbounded.action_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    with pytest.warns(UserWarning, match="'Steps-v0' does not bound 1 actions: action bounds are taken to be -1 and 1"):
        assert sdw.load_dataset(three_episodes(), env_id=unbounded).action_bounds == (-1, 1)


@pytest.mark.filterwarnings("error")
def test_an_environment_that_fits_is_passed_on() -> None:
    assert check_environment(units(env_id="Steps-v0")) == "Steps-v0"
    env = gym.make("Steps-v0")
    assert check_environment(units(env_id="Nowhere-v0"), env) is env
    unbounded = gym.make("Steps-v0")
    unbounded.action_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    check_environment(units(), unbounded)


def test_bounds_that_differ_are_told() -> None:
    with pytest.warns(UserWarning, match=r"Steps-v0 takes actions from \[-2.\] to \[2.\], where .* say \[-1.\] to"):
        check_environment(units(bound=1.0), "Steps-v0")


def test_an_environment_without_a_time_limit_is_cut_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "MAX_EPISODE_STEPS", 30)
    for env, name in (
        ("Endless-v0", "Endless-v0"),
        (lambda: Steps(length=None), "Steps"),
        (Steps(length=None), "Steps"),
    ):
        with pytest.warns(UserWarning, match=f"{name} sets no time limit: episodes are cut after 30 steps"):
            assert sdw.evaluate(one, env, episodes=2).lengths.tolist() == [30, 30]


@pytest.mark.filterwarnings("error:.*sets no time limit")
def test_a_time_limit_anywhere_among_the_wrappers_is_one() -> None:
    for env in (gym.make("Steps-v0"), RescaleAction(TimeLimit(Steps(), 5), -1.0, 1.0)):
        assert limited(env) is env
