"""Environments: MuJoCo's notes stay silent, and spaces, actions and modules are handled as promised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import sdw_fast as sdw
from sdw_fast import rollout
from sdw_fast.rollout import BATCH, act, acting, make_env, make_vector_env

SPACE = gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 5]))


def test_mujoco_deprecation_notes_stay_silent(tmp_path: Path) -> None:
    script = "from sdw_fast.rollout import make_env; make_env('HalfCheetah-v5'); print('made')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    command = [sys.executable, "-W", "always", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert run.stdout == "made\n"
    assert "deprecated" not in run.stderr
    assert not list(tmp_path.iterdir())  # MuJoCo would log to a file here


def test_other_mujoco_warnings_reach_the_handler_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    mujoco = pytest.importorskip("mujoco")
    received: list[str] = []

    def compile_model(env_id: str) -> None:
        mujoco.get_mju_user_warning()("attribute 'x' is deprecated")
        mujoco.get_mju_user_warning()("Nan, Inf or huge value in QACC")

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


def test_a_missing_mujoco_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(env_id: str) -> None:
        raise gym.error.DependencyNotInstalled("no mujoco")

    monkeypatch.setattr(gym, "make", missing)
    with pytest.raises(ImportError, match=r'Hopper-v5 needs MuJoCo: pip install "sdw_fast\[mujoco\]"'):
        make_env("Hopper-v5")


def test_environments_run_their_seeds_and_then_idle() -> None:
    """Pendulum episodes last 200 steps: the first member runs two of them, the second one, then rests."""
    envs = make_vector_env("Pendulum-v1", [[5, 6], [7]])
    alone = make_env("Pendulum-v1")
    observations, _ = envs.reset()
    np.testing.assert_array_equal(observations, [alone.reset(seed=seed)[0] for seed in (5, 7)])
    action, ended = np.zeros((2, 1), np.float32), []
    for step in range(1, 501):
        observations, rewards, terminations, truncations, infos = envs.step(action)
        ended += [(step, member) for member in np.flatnonzero(terminations | truncations)]
        if step == 200:
            np.testing.assert_array_equal(observations[0], alone.reset(seed=6)[0])
            assert not np.array_equal(infos["final_obs"][0], observations[0])
        if step > 200:
            assert rewards[1] == 0
    envs.close()
    assert ended == [(200, 0), (200, 1), (400, 0)]


def test_actions_are_clipped_to_the_space_bound_by_bound() -> None:
    observations = np.arange(6.0).reshape(3, 2)
    given = torch.tensor([[-3.0, -3.0], [0.5, 4.5], [3.0, 9.0]])
    actions = act(lambda x: torch.cat([given, torch.full((BATCH - 3, 2), torch.nan)]), observations, SPACE)
    np.testing.assert_array_equal(actions, np.float32([[-1, 0], [0.5, 4.5], [1, 5]]))  # the padding is not looked at
    assert actions.dtype == np.float32


def test_every_batch_has_the_same_shape() -> None:
    seen = []

    def policy(x: torch.Tensor) -> np.ndarray:
        seen.append((x.dtype, x.shape, x[:3].tolist()))
        return np.zeros((len(x), 2))

    act(policy, np.arange(6.0).reshape(3, 2), SPACE)
    assert seen == [(torch.float32, (BATCH, 2), [[0, 1], [2, 3], [4, 5]])]


def test_acting_puts_mode_and_threads_back_even_after_an_error() -> None:
    policy = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    policy[0].eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)

    def interrupted(function: Any) -> None:
        with acting(function):
            assert torch.get_num_threads() == 1
            assert not policy[1].training
            raise KeyboardInterrupt

    try:
        for function in (policy, policy.forward):
            with pytest.raises(KeyboardInterrupt):
                interrupted(function)
            assert torch.get_num_threads() == 2
            assert [part.training for part in policy.modules()] == [True, False, True]
    finally:
        torch.set_num_threads(threads)


def test_an_environment_without_a_time_limit_is_cut_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (3,))
        action_space = gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            return np.zeros(3, np.float32), {}

        def step(self, action):
            return np.zeros(3, np.float32), 1.0, False, False, {}

    gym.register("Endless-v0", entry_point=Endless)
    monkeypatch.setattr(rollout, "MAX_EPISODE_STEPS", 30)
    try:
        with pytest.warns(UserWarning, match="Endless-v0 sets no time limit: episodes are cut after 30 steps"):
            result = sdw.evaluate(lambda x: torch.zeros(len(x), 1), "Endless-v0", episodes=2)
    finally:
        gym.registry.pop("Endless-v0")
    assert result.lengths.tolist() == [30, 30]
