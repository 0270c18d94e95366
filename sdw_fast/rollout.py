"""Environments: make one, or several in step, and act in them. Imports gymnasium; nothing imports it at start-up."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from sdw_fast.networks import ask, evaluating

Policy = Callable[[torch.Tensor], Any]

# Rows in every batch that a policy sees. The last bits of a matrix product may depend on its shape, and contacts
# amplify them; with one shape for all, an episode's return depends on its seed alone.
BATCH = 16
MAX_EPISODE_STEPS = 10_000  # of an environment that sets no time limit of its own


def make_env(env_id: str) -> gym.Env:
    """Makes an environment, without MuJoCo's notes that Gymnasium's own model files use deprecated attributes.

    MuJoCo prints them to standard error and to a file in the working directory when it compiles a model, and a user can
    do nothing about them. Its other warnings pass.

    Raises:
        ImportError: if the environment needs MuJoCo and it is not installed.
        ValueError: if there is no environment of that id.
    """
    if importlib.util.find_spec("mujoco") is None:
        return _make(env_id)
    import mujoco

    previous = mujoco.get_mju_user_warning()

    def forward(message: str) -> None:
        if "deprecated" not in message:
            (previous or warnings.warn)(message)

    mujoco.set_mju_user_warning(forward)
    try:
        return _make(env_id)
    finally:
        mujoco.set_mju_user_warning(previous)


def make_vector_env(env_id: str, seeds: Iterable[Iterable[int]]) -> SyncVectorEnv:
    """Makes a vectorized environment whose i-th member runs one episode for each seed in seeds[i], then idles.

    A step that ends an episode returns the first observation of the next (`final_obs` in the infos holds the last one),
    so every step is a transition. Episodes of an environment without a time limit are cut after 10,000 steps, with a
    warning. Stepping in one process beats one process for each environment: a MuJoCo step takes
    0.1 ms, less than passing its result between processes.

    Raises:
        ValueError: if observations or actions are not one-dimensional Box spaces.
    """
    envs = SyncVectorEnv(
        [lambda s=s: _SeededEpisodes(_limited(make_env(env_id)), s) for s in seeds],  # type: ignore[misc]
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    for kind, space in (("observation", envs.single_observation_space), ("action", envs.single_action_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            envs.close()
            raise ValueError(f"{env_id} has {kind} space {space}; only one-dimensional Box spaces are supported")
    return envs


def _limited(env: gym.Env) -> gym.Env:
    """An environment whose episodes end, by their own time limit or else by ours."""
    if env.spec is None or env.spec.max_episode_steps is not None:
        return env
    warnings.warn(
        f"{env.spec.id} sets no time limit: episodes are cut after {MAX_EPISODE_STEPS:,} steps. Register it with "
        "max_episode_steps to choose another",
        stacklevel=2,
    )
    return gym.wrappers.TimeLimit(env, MAX_EPISODE_STEPS)


class _SeededEpisodes(gym.Wrapper):
    """Gives each episode its own seed. After the last, it repeats the last observation at no cost and never ends."""

    def __init__(self, env: gym.Env, seeds: Iterable[int]) -> None:
        super().__init__(env)
        self._seeds = iter(seeds)
        self._observation: Any = None
        self._idle = False

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        seed = next(self._seeds, None)
        self._idle = seed is None
        if not self._idle:
            self._observation, _info = self.env.reset(seed=seed)
        return self._observation, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self._idle:
            return self._observation, 0.0, False, False, {}
        self._observation, reward, terminated, truncated, _info = self.env.step(action)
        return self._observation, reward, terminated, truncated, {}  # infos are unused and dear to gather


@contextmanager
def acting(policy: Policy) -> Iterator[None]:
    """Puts an nn.Module in evaluation mode and PyTorch on one thread, and each back as it was.

    A product of 16 rows is too small to share: waiting for a second thread costs more than it computes, many times more
    on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with evaluating(policy):
            yield
    finally:
        torch.set_num_threads(threads)


def act(policy: Policy, observations: np.ndarray, space: Any) -> np.ndarray:
    """Asks the policy for the actions of observations (n, D), n ≤ BATCH, and checks them."""
    rows = len(observations)
    batch = torch.zeros(BATCH, observations.shape[1])
    batch[:rows] = torch.from_numpy(observations)
    with torch.no_grad():
        actions = torch.as_tensor(ask(policy, batch)).cpu().numpy()
    if actions.shape != (BATCH, *space.shape):
        raise ValueError(
            f"the policy maps observations {tuple(batch.shape)} to actions {actions.shape}, "
            f"expected {(BATCH, *space.shape)}"
        )
    if not np.isfinite(actions[:rows]).all():
        raise ValueError("the policy returned actions that are NaN or infinite")
    return np.clip(actions[:rows], space.low, space.high).astype(space.dtype, copy=False)


def action_bounds(env_id: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(low, high) of an environment's actions, or None where they are not a bounded vector.

    Raises:
        ImportError: the environment needs MuJoCo and it is not installed.
        gymnasium.error.Error: there is no such environment here.
    """
    env = make_env(env_id)
    space = env.action_space
    env.close()
    bounded = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.is_bounded()
    return (space.low, space.high) if bounded else None  # type: ignore[attr-defined]


def _make(env_id: str) -> gym.Env:
    try:
        return gym.make(env_id)
    except gym.error.DependencyNotInstalled as error:
        raise ImportError(f'{env_id} needs MuJoCo: pip install "sdw_fast[mujoco]" ({error})') from error
    except gym.error.Error as error:  # an unknown name or version, a malformed id
        raise ValueError(f"there is no environment {env_id!r}: {error}") from error
