"""Evaluation: exact counts, seeds, bounds, normalization and errors. CountingEnv's returns are worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from sdw_fast.environments import make_env
from sdw_fast.evaluation import evaluate, evaluate_synthetic
from sdw_fast.policy import behavior_clone
from sdw_fast.rollout import BATCH
from sdw_fast.synthetic import SyntheticDataset
from sdw_fast.units import Affine, Units

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
    ids = ("Counting-v3", "Counting-v0", "Walker2d-v77")  # D4RL knows the last one's name
    for env_id in ids:
        gym.register(env_id, CountingEnv, disable_env_checker=True)
    yield
    for env_id in ids:
        gym.registry.pop(env_id)


def zero(observations: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(observations), 1)


@pytest.mark.parametrize("episodes", [1, 5, BATCH, BATCH + 1, 3 * BATCH + 2])
def test_returns_and_lengths_by_hand(episodes: int) -> None:
    result = evaluate(zero, "Counting-v3", episodes=episodes, seed=20)
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

    result = evaluate(policy, "Counting-v3", episodes=5)
    steps = np.array([sum(range(n)) for n in LENGTHS]) / 10
    np.testing.assert_allclose(result.returns, np.arange(5) * np.array(LENGTHS) + steps, rtol=1e-6)


def test_actions_are_clipped_to_the_action_space() -> None:
    result = evaluate(lambda observations: np.full((len(observations), 1), 9.0), "Counting-v3", episodes=2)
    np.testing.assert_array_equal(result.returns, [3.0, 2.0])  # each step pays seed + 1


def test_statistics_and_dict_follow_the_reference_scores() -> None:
    result = evaluate(zero, "Counting-v3", episodes=3, returns=Affine.scores(2.0, 12.0))
    returns = np.array([0.0, 1.0, 14.0])
    np.testing.assert_allclose(result.normalized, 10 * (returns - 2))
    assert result.mean == returns.mean()
    assert result.std == returns.std()
    assert result.normalized_mean == pytest.approx(10 * (returns.mean() - 2))
    assert result.normalized_std == pytest.approx(10 * returns.std())
    assert json.loads(json.dumps(result.to_dict())) == {
        "env_id": "Counting-v3",
        "seed": 0,
        "episodes": 3,
        "mean": result.mean,
        "std": result.std,
        "normalized_mean": result.normalized_mean,
        "normalized_std": result.normalized_std,
        "returns": returns.tolist(),
        "lengths": [3, 1, 7],
        "normalized": result.normalized.tolist(),
    }
    assert "30.0" in str(result)  # 10 · (5 − 2)


def test_without_reference_scores_nothing_is_normalized() -> None:
    result = evaluate(zero, "Counting-v3", episodes=3)
    assert (result.normalized, result.normalized_mean, result.normalized_std) == (None, None, None)
    assert result.to_dict()["normalized"] is None
    assert str(result) == "Counting-v3: return 5.0 ± 6.4 over 3 episodes"


def test_d4rl_scores_go_by_the_environments_name_and_give_way_to_those_given() -> None:
    returns = np.array([0.0, 1.0, 14.0])
    by_name = evaluate(zero, "Walker2d-v77", episodes=3)
    np.testing.assert_allclose(by_name.normalized, 100 * (returns - 1.629008) / (4592.3 - 1.629008))
    given = evaluate(zero, "Walker2d-v77", episodes=3, returns=Affine.scores(0, 100))
    np.testing.assert_allclose(given.normalized, returns)


def test_module_is_evaluated_without_dropout_and_left_as_it_was() -> None:
    policy = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Tanh())
    policy[0].eval()
    threads = torch.get_num_threads()
    first, second = (evaluate(policy, "Counting-v3", episodes=7).returns for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert policy.training
    assert policy[1].training
    assert not policy[0].training
    assert torch.get_num_threads() == threads
    assert all(p.grad is None for p in policy.parameters())


def test_a_method_of_a_module_is_evaluated_as_the_module_is() -> None:
    policy = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Tanh())
    expected = evaluate(policy, "Counting-v3", episodes=7).returns
    np.testing.assert_array_equal(evaluate(policy.forward, "Counting-v3", episodes=7).returns, expected)
    assert policy[1].training


def test_episodes_end_and_begin_apart() -> None:
    """More episodes than environments: each is counted under its own seed, whichever environment ran it."""
    many = evaluate(zero, "Counting-v3", episodes=2 * BATCH, seed=3)
    for episode in (0, BATCH - 1, BATCH, 2 * BATCH - 1):
        one = evaluate(zero, "Counting-v3", episodes=1, seed=3 + episode)
        assert (one.returns[0], one.lengths[0]) == (many.returns[episode], many.lengths[episode])


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
        evaluate(policy, "Counting-v3", episodes=1)


def test_unsupported_environments_and_arguments_are_reported() -> None:
    with pytest.raises(ValueError, match="observation space Discrete"):
        evaluate(zero, "FrozenLake-v1", episodes=1)
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(zero, "Counting-v3", episodes=0)


# Bounds other than ±1


@pytest.mark.parametrize(("action", "reached"), [(1.7, 1.7), (-5.0, -2.0)])
def test_pendulum_return_matches_a_plain_loop(action: float, reached: float) -> None:
    env, total, done = make_env("Pendulum-v1"), 0.0, False
    env.reset(seed=7)
    while not done:
        _, reward, terminated, truncated, _ = env.step(np.float32([reached]))
        total, done = total + float(reward), terminated or truncated
    result = evaluate(lambda o: torch.full((len(o), 1), action), "Pendulum-v1", episodes=1, seed=7)
    assert result.returns[0] == pytest.approx(total, rel=1e-12)
    assert result.lengths[0] == 200
    assert result.normalized is None


def pendulum_set(torque: float) -> SyntheticDataset:
    """Pairs that ask for one torque whatever the state; the bounds are Pendulum's, ±2."""
    observations = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    return SyntheticDataset(
        observations=observations,
        actions=np.full((20, 1), torque, np.float32),
        units=Units(Affine.fit(observations), Affine.between([-2.0], [2.0]), env_id="Pendulum-v1"),
        config={"hidden": [8], "inner_steps": 300},
    )


def test_a_cloned_policy_acts_between_the_sets_bounds() -> None:
    synthetic = pendulum_set(1.8)
    policy = behavior_clone(synthetic)
    env, total, done = make_env("Pendulum-v1"), 0.0, False
    observation, _ = env.reset(seed=0)
    while not done:
        action = policy(torch.from_numpy(observation)).detach().numpy()
        assert 1.2 < action[0] <= 2
        observation, reward, terminated, truncated, _ = env.step(action)
        total, done = total + float(reward), terminated or truncated
    result = evaluate_synthetic(synthetic, clones=1, episodes=1)
    assert result.returns[0] == pytest.approx(total, rel=1e-3)


# Synthetic sets


def counting_set(**units: Any) -> SyntheticDataset:
    observations = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    return SyntheticDataset(
        observations=observations,
        actions=np.tanh(observations[:, :1]),
        units=Units(Affine.fit(observations), Affine.between([-1.0], [1.0]), **units),
        config={"hidden": [8], "inner_steps": 5},
    )


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_a_set_is_normalized_by_its_own_returns_in_its_environment_and_by_d4rls_in_another() -> None:
    synthetic = counting_set(env_id="Counting-v3", returns=Affine.scores(1, 201))
    for env_id in (None, "Counting-v3", "Counting-v0"):  # another version is the same environment
        result = evaluate_synthetic(synthetic, env_id, clones=1, episodes=3)
        assert result.env_id == (env_id or "Counting-v3")
        np.testing.assert_allclose(result.normalized, (result.returns - 1) / 2)
    other = evaluate_synthetic(synthetic, "Walker2d-v77", clones=1, episodes=3)
    assert other.env_id == "Walker2d-v77"
    np.testing.assert_array_equal(other.returns, result.returns)
    np.testing.assert_allclose(other.normalized, 100 * (other.returns - 1.629008) / (4592.3 - 1.629008))
    walker = counting_set(env_id="Walker2d-v77", returns=Affine.scores(1, 201))
    own = evaluate_synthetic(walker, clones=1, episodes=3)
    np.testing.assert_allclose(own.normalized, (own.returns - 1) / 2)
    assert evaluate_synthetic(walker, "Counting-v3", clones=1, episodes=3).normalized is None


def test_a_set_of_no_environment_needs_one() -> None:
    with pytest.raises(ValueError, match="names no environment: pass env"):
        evaluate_synthetic(counting_set(), clones=1)
    assert evaluate_synthetic(counting_set(), "Counting-v3", clones=1, episodes=2).env_id == "Counting-v3"


def test_five_clones_share_ten_episodes_unless_asked_otherwise() -> None:
    synthetic = counting_set(env_id="Counting-v3")
    result = evaluate_synthetic(synthetic)
    assert (result.seed, len(result.returns)) == (0, 10)
    expected = [
        evaluate(behavior_clone(synthetic, seed=clone), "Counting-v3", episodes=2, seed=2 * clone).returns
        for clone in range(5)
    ]
    np.testing.assert_array_equal(result.returns, np.concatenate(expected))
    np.testing.assert_array_equal(evaluate(zero, "Counting-v3").lengths, 2 * LENGTHS)


def test_evaluate_synthetic_shares_episodes_among_clones() -> None:
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(20, 11)).astype(np.float32)
    synthetic = SyntheticDataset(
        observations=observations,
        actions=np.tanh(observations[:, :3]),
        units=Units(Affine.fit(observations), Affine.between(-np.ones(3), np.ones(3)), env_id="Hopper-v5"),
        config={"hidden": [8], "inner_steps": 5},
    )
    together = evaluate_synthetic(synthetic, clones=2, episodes=3, seed=7)
    first = evaluate(behavior_clone(synthetic, seed=7), "Hopper-v5", episodes=2, seed=7)
    second = evaluate(behavior_clone(synthetic, seed=8), "Hopper-v5", episodes=1, seed=9)
    np.testing.assert_array_equal(together.returns, [*first.returns, *second.returns])
    np.testing.assert_array_equal(together.lengths, [*first.lengths, *second.lengths])
    assert together.normalized_mean is not None
    for clones in (0, 4):
        with pytest.raises(ValueError, match=f"clones must be between 1 and episodes = 3, got {clones}"):
            evaluate_synthetic(synthetic, clones=clones, episodes=3)
