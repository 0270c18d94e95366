"""Rollouts: seeds and ends of episodes side by side, and actions and modules handled as promised."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from sdw_fast.environments import make_env
from sdw_fast.rollout import BATCH, SeededEnvs, act, acting

SPACE = gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 5]))


def test_environments_run_their_seeds_and_then_idle() -> None:
    """Pendulum episodes last 200 steps: the first member runs two of them, the second one, then rests."""
    envs = SeededEnvs("Pendulum-v1", [[5, 6], [7]])
    alone = make_env("Pendulum-v1")
    np.testing.assert_array_equal(envs.observations, [alone.reset(seed=seed)[0] for seed in (5, 7)])
    assert envs.observations.dtype == np.float32
    action, ended = np.zeros((2, 1), np.float32), []
    for step in range(1, 501):
        following, rewards, terminations, truncations = envs.step(action)
        ended += [(step, member) for member in np.flatnonzero(terminations | truncations)]
        if step == 199:
            np.testing.assert_array_equal(following, envs.observations)
        if step == 200:
            np.testing.assert_array_equal(envs.observations[0], alone.reset(seed=6)[0])
            last, rested = following.copy(), envs.observations[1].copy()
            assert not np.array_equal(last[0], envs.observations[0])
            np.testing.assert_array_equal(last[1], rested)
        if step > 200:
            assert rewards[1] == 0
            np.testing.assert_array_equal(envs.observations[1], rested)
    envs.close()
    assert ended == [(200, 0), (200, 1), (400, 0)]
    np.testing.assert_array_equal(last[1], _last_observation(7))


def _last_observation(seed: int) -> np.ndarray:
    env, ended = make_env("Pendulum-v1"), False
    env.reset(seed=seed)
    while not ended:
        observation, _, _, ended, _ = env.step(np.zeros(1, np.float32))
    return observation


def test_actions_are_clipped_to_the_space_bound_by_bound() -> None:
    observations = np.arange(6.0).reshape(3, 2)
    given = torch.tensor([[-3.0, -3.0], [0.5, 4.5], [3.0, 9.0]])
    actions = act(lambda x: torch.cat([given, torch.full((BATCH - 3, 2), torch.nan)]), observations, SPACE)
    np.testing.assert_array_equal(actions, np.float32([[-1, 0], [0.5, 4.5], [1, 5]]))  # the padding is not looked at
    assert actions.dtype == np.float32


@pytest.mark.parametrize("start", [0, -1])
def test_actions_of_a_discrete_space_are_its_numbers(start: int) -> None:
    space = gym.spaces.Discrete(3, start=start)
    padding = torch.full((BATCH - 3,), 99)  # is not looked at
    given = torch.tensor([0, 2, 1]) + start
    actions = act(lambda x: torch.cat([given, padding]), np.zeros((3, 2)), space)
    np.testing.assert_array_equal(actions, given)
    for wrong, message in [
        (torch.zeros(BATCH), r"actions \(16,\) of float32, expected \(16,\) integers"),
        (torch.zeros(BATCH, 3), r"actions \(16, 3\) of float32, expected \(16,\) integers"),
        (torch.full((BATCH,), 3 + start), r"not all in Discrete\(3"),
    ]:
        with pytest.raises(ValueError, match=message):
            act(lambda x, wrong=wrong: wrong, np.zeros((3, 2)), space)


def test_a_policy_of_another_width_is_told_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"the policy failed on observations of shape \(16, 2\): mat1 and mat2"):
        act(nn.Linear(5, 2), np.zeros((1, 2)), SPACE)


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
