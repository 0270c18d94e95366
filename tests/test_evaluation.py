"""Rollouts: exact counts, seeds, normalization and errors. CountingEnv's returns can be worked out by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import sdw_fast as sdw
from sdw_fast import evaluate
from sdw_fast.evaluate import BATCH, make_env

LENGTHS = (3, 1, 7, 4, 2)


class CountingEnv(gym.Env):
    """Episode of seed s lasts LENGTHS[s mod 5] steps, each paying s plus the action; even seeds terminate."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        assert seed is not None, "every episode has its own seed"
        self.seed, self.steps = seed, 0
        return np.array([seed, 0.0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.steps < LENGTHS[self.seed % 5], "an episode was stepped past its end"
        self.steps += 1
        over = self.steps == LENGTHS[self.seed % 5]
        observation = np.array([self.seed, float(self.steps)])
        return observation, self.seed + float(action[0]), over and self.seed % 2 == 0, over and self.seed % 2 == 1, {}


@pytest.fixture(autouse=True)
def counting_env() -> Iterator[None]:
    gym.register("Counting-v0", CountingEnv, disable_env_checker=True)
    yield
    gym.registry.pop("Counting-v0")


def zero(observations: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(observations), 1)


@pytest.mark.parametrize("episodes", [1, 5, BATCH, BATCH + 1, 3 * BATCH + 2])
def test_returns_and_lengths_by_hand(episodes: int) -> None:
    result = evaluate(zero, "Counting-v0", episodes=episodes, seed=20)
    seeds = 20 + np.arange(episodes)
    lengths = np.array(LENGTHS)[seeds % 5]
    np.testing.assert_array_equal(result.lengths, lengths)
    np.testing.assert_array_equal(result.returns, seeds * lengths)
    assert result.normalized is None
    assert result.normalized_mean is None


def test_policy_sees_the_current_observation_as_float32() -> None:
    def policy(observations: torch.Tensor) -> torch.Tensor:
        assert observations.dtype == torch.float32
        assert observations.shape == (BATCH, 2)
        return observations[:, 1:] / 10  # pays the step number / 10

    result = evaluate(policy, "Counting-v0", episodes=5)
    steps = np.array([sum(range(n)) for n in LENGTHS]) / 10
    np.testing.assert_allclose(result.returns, np.arange(5) * np.array(LENGTHS) + steps, rtol=1e-6)


def test_actions_are_clipped_to_the_action_space() -> None:
    result = evaluate(lambda observations: np.full((len(observations), 1), 9.0), "Counting-v0", episodes=2)
    np.testing.assert_array_equal(result.returns, [3.0, 2.0])  # each step pays seed + 1


def test_statistics_and_dict_follow_the_reference_scores() -> None:
    result = evaluate(zero, "Counting-v0", episodes=3, reference_scores=(2.0, 12.0))
    returns = np.array([0.0, 1.0, 14.0])
    np.testing.assert_allclose(result.normalized, 10 * (returns - 2))
    assert result.mean == returns.mean()
    assert result.std == returns.std()
    assert result.normalized_mean == pytest.approx(10 * (returns.mean() - 2))
    assert result.normalized_std == pytest.approx(10 * returns.std())
    assert result.to_dict()["returns"] == returns.tolist()
    assert result.to_dict()["episodes"] == 3
    assert "30.0" in str(result)  # 10 · (5 − 2)


def test_module_is_evaluated_without_dropout_and_left_as_it_was() -> None:
    policy = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Tanh())
    policy[0].eval()
    threads = torch.get_num_threads()
    first, second = (evaluate(policy, "Counting-v0", episodes=7).returns for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert policy.training
    assert policy[1].training
    assert not policy[0].training
    assert torch.get_num_threads() == threads
    assert all(p.grad is None for p in policy.parameters())


def test_hopper_episode_depends_on_its_seed_alone_bit_for_bit() -> None:
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(11, 64), nn.ReLU(), nn.Linear(64, 3), nn.Tanh())
    few = evaluate(policy, "Hopper-v5", episodes=3, seed=100)
    many = evaluate(policy, "Hopper-v5", episodes=BATCH + 4, seed=100)
    later = evaluate(policy, "Hopper-v5", episodes=3, seed=100 + BATCH + 1)
    np.testing.assert_array_equal(few.returns, many.returns[:3])
    np.testing.assert_array_equal(later.lengths, many.lengths[-3:])
    assert len(set(many.returns)) == BATCH + 4  # different seeds, different episodes
    assert many.normalized is not None
    np.testing.assert_allclose(many.normalized, 100 * (many.returns + 20.272305) / (3234.3 + 20.272305))


def test_hopper_return_matches_a_plain_loop() -> None:
    policy = nn.Linear(11, 3)
    nn.init.zeros_(policy.weight)
    nn.init.constant_(policy.bias, 0.3)
    env, total, done = make_env("Hopper-v5"), 0.0, False
    env.reset(seed=7)
    while not done:
        _, reward, terminated, truncated, _ = env.step(np.full(3, 0.3, np.float32))
        total, done = total + float(reward), terminated or truncated
    assert evaluate(policy, "Hopper-v5", episodes=1, seed=7).returns[0] == pytest.approx(total, rel=1e-12)


def test_mujoco_deprecation_notes_stay_silent(tmp_path: Path) -> None:
    script = "from sdw_fast.evaluate import make_env; make_env('HalfCheetah-v5'); print('made')"
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


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda o: torch.zeros(len(o), 2), r"expected \(16, 1\)"),
        (lambda o: torch.zeros(len(o)), r"expected \(16, 1\)"),
        (lambda o: torch.full((len(o), 1), float("nan")), "NaN"),
    ],
)
def test_bad_actions_are_reported(policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(policy, "Counting-v0", episodes=1)


def test_unsupported_environments_and_arguments_are_reported() -> None:
    with pytest.raises(ValueError, match="action space Discrete"):
        evaluate(zero, "CartPole-v1", episodes=1)
    with pytest.raises(ValueError, match="observation space Discrete"):
        evaluate(zero, "FrozenLake-v1", episodes=1)
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(zero, "Counting-v0", episodes=0)


def test_evaluate_synthetic_shares_episodes_among_clones() -> None:
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(20, 11)).astype(np.float32)
    synthetic = sdw.SyntheticDataset(
        observations=observations,
        actions=np.tanh(observations[:, :3]),
        normalizer=sdw.Normalizer.fit(observations),
        action_low=-np.ones(3, np.float32),
        action_high=np.ones(3, np.float32),
        env_id="Hopper-v5",
        config={"hidden": [8], "inner_steps": 5},
    )
    together = sdw.evaluate_synthetic(synthetic, clones=2, episodes=3, seed=7)
    first = sdw.evaluate(sdw.behavior_clone(synthetic, seed=7), "Hopper-v5", episodes=2, seed=7)
    second = sdw.evaluate(sdw.behavior_clone(synthetic, seed=8), "Hopper-v5", episodes=1, seed=9)
    np.testing.assert_array_equal(together.returns, [*first.returns, *second.returns])
    assert together.normalized_mean is not None
    with pytest.raises(ValueError, match="clones must be between"):
        sdw.evaluate_synthetic(synthetic, clones=4, episodes=3)
