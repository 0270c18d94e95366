"""A toy environment with arguments, registered for the tests of environments, and a policy and units that fit it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from sdw_fast.units import Affine, Units


class Steps(gym.Env):
    """Pays its first action, the number of the step and `bonus`; ends after `length` steps, never if None."""

    observation_space: gym.Space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space: gym.Space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, length: int | None = 4, bonus: float = 0.0, render_mode: str | None = None) -> None:
        self.length, self.bonus, self.render_mode = length, bonus, render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        self.taken = 0
        return np.zeros(2), {}  # float64, though the space says float32

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.taken += 1
        pay = float(np.ravel(action)[0]) + self.taken + self.bonus
        return np.full(2, self.taken, np.float32), pay, self.taken == self.length, False, {}


class Goal(Steps):
    observation_space = gym.spaces.Dict({"goal": gym.spaces.Box(-1, 1, (2,)), "state": gym.spaces.Box(-1, 1, (2,))})


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gym.register("Steps-v0", Steps, max_episode_steps=100, disable_env_checker=True)
    gym.register("Endless-v0", Steps, kwargs={"length": None}, disable_env_checker=True)
    gym.register("Goal-v0", Goal, max_episode_steps=100, disable_env_checker=True)
    yield
    for env_id in ("Steps-v0", "Endless-v0", "Goal-v0"):
        gym.registry.pop(env_id)


def one(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(x), 1)


def units(states: int = 2, bound: float = 2.0, **names: Any) -> Units:
    return Units(Affine(np.zeros(states), np.ones(states)), Affine.between([-bound], [bound]), **names)
