"""Rollouts: several environments stepped together, each episode with its own seed, and a policy that acts in them.

Imports gymnasium; nothing imports it at start-up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from sdw_fast.environments import Environment, check_spaces, limited, make_env, name_of
from sdw_fast.networks import ask, evaluating
from sdw_fast.ops._backend import one_thread

Policy = Callable[[torch.Tensor], Any]

# Rows in every batch that a policy sees. The last bits of a matrix product may depend on its shape, and contacts
# amplify them; with one shape for all, an episode's return depends on its seed alone.
BATCH = 16


def episode_seed(*numbers: int) -> int:
    """The seed of an episode, from a seed and the numbers of the episode and of what it is part of."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def episodes_of(
    seeds: Iterable[int],
    observations: np.ndarray,
    actions: np.ndarray,
    following: np.ndarray,
    rewards: np.ndarray,
    terminations: np.ndarray,
    truncations: np.ndarray,
) -> list[dict[str, Any]]:
    """Transitions (n, ·) in order as Minari's episodes; the last one is truncated where it has not ended."""
    truncations = truncations.copy()
    truncations[-1] |= not terminations[-1]
    ends = map(int, np.flatnonzero(terminations | truncations) + 1)
    return [
        {
            "seed": seed,
            "observations": np.concatenate([observations[start:end], following[end - 1 : end]]),
            "actions": actions[start:end],
            "rewards": rewards[start:end],
            "terminations": terminations[start:end],
            "truncations": truncations[start:end],
            "infos": {},
        }
        for seed, (start, end) in zip(seeds, itertools.pairwise([0, *ends]), strict=False)
    ]


def side_by_side(env: Environment) -> int:
    """How many of an environment can be run at once: one, if it is an object, else BATCH."""
    return 1 if isinstance(env, gym.Env) else BATCH


class SeededEnvs:
    """Environments stepped together in this process: the i-th runs one episode for each seed in seeds[i], then idles.

    A MuJoCo step takes 0.1 ms, less than passing its result between processes. Episodes of an environment without a
    time limit are cut after 10,000 steps, with a warning.

    Args:
        env: what to make them by; an environment object can only be one of them, and is not closed.
        seeds: of the episodes, for each environment.

    Attributes:
        name: the environment's id, or the name of its class.
        action_space: of one environment.
        observations: (n, D), what to act on; of an idle environment, the last.

    Raises:
        ImportError, ValueError: as `make_env`; the spaces are not supported; there is one environment for many.
    """

    def __init__(self, env: Environment, seeds: Sequence[Iterable[int]]) -> None:
        made = [make_env(env) for _ in seeds]
        self._own = [one for one in made if one is not env]
        try:
            if len({id(one) for one in made}) < len(made):
                raise ValueError("the function must make a new environment at each call: pass the environment itself")
            check_spaces(made[0])
            self._envs = [limited(one) for one in made]
        except ValueError:
            self.close()
            raise
        self.name = name_of(made[0])
        self.action_space: Any = made[0].action_space
        space = made[0].observation_space
        self.observations = np.zeros((len(made), *(space.shape or ())), space.dtype)
        self._seeds = [iter(own) for own in seeds]
        self._idle = [False] * len(made)
        for number in range(len(made)):
            self._begin(number)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Takes a step in every environment, and begins the next episode where one ended.

        Returns:
            Next observations (n, D), rewards (n,) float64, terminations and truncations (n,) bool of the steps. Where
            no episode ended the next observations are the new `observations`. An idle environment gives zeros.
        """
        following = self.observations.copy()
        rewards = np.zeros(len(self._envs))
        terminations, truncations = (np.zeros(len(self._envs), dtype=bool) for _ in range(2))
        for i, env in enumerate(self._envs):
            if not self._idle[i]:
                following[i], rewards[i], terminations[i], truncations[i], _info = env.step(actions[i])
        self.observations = following.copy()
        for i in np.flatnonzero(terminations | truncations).tolist():
            self._begin(i)
        return following, rewards, terminations, truncations

    def _begin(self, number: int) -> None:
        seed = next(self._seeds[number], None)
        self._idle[number] = seed is None
        if seed is not None:
            observation, _info = self._envs[number].reset(seed=seed)
            if np.shape(observation) != self.observations.shape[1:]:
                raise ValueError(
                    f"{self.name} returns observations of shape {np.shape(observation)}, and its observation space "
                    f"says {self.observations.shape[1:]}"
                )
            self.observations[number] = observation

    def close(self) -> None:
        """Closes the environments that were made here."""
        for env in self._own:
            env.close()


@contextmanager
def acting(policy: Policy) -> Iterator[None]:
    """Puts an nn.Module in evaluation mode and PyTorch on one thread, and each back as it was.

    A product of 16 rows is too small to share: waiting for a second thread costs more than it computes, many times more
    on a busy machine.
    """
    with one_thread(), evaluating(policy):
        yield


def act(policy: Policy, observations: np.ndarray, space: Any) -> np.ndarray:
    """Asks the policy for the actions of observations (n, D), n ≤ BATCH, and checks them.

    Returns:
        Actions (n, A), clipped to the bounds of a Box; numbers of classes (n,) of a Discrete space.

    Raises:
        ValueError: the policy cannot take the observations, or its actions do not fit the space.
    """
    rows = len(observations)
    batch = torch.zeros(BATCH, observations.shape[1])
    batch[:rows] = torch.from_numpy(observations)
    with torch.no_grad():
        try:
            answer = ask(policy, batch)
        except RuntimeError as error:  # what PyTorch says of shapes that do not fit
            raise ValueError(f"the policy failed on observations of shape {tuple(batch.shape)}: {error}") from error
    actions = torch.as_tensor(answer).cpu().numpy()
    discrete = isinstance(space, gym.spaces.Discrete)
    if actions.shape != (BATCH, *space.shape) or (discrete and actions.dtype.kind not in "iu"):
        raise ValueError(
            f"the policy maps observations {tuple(batch.shape)} to actions {actions.shape} of {actions.dtype}, "
            f"expected {(BATCH, *space.shape)}{' integers, the numbers of classes' if discrete else ''}"
        )
    actions = actions[:rows]
    if discrete:
        if not all(map(space.contains, actions)):
            raise ValueError(f"the policy returned actions {actions}, which are not all in {space}")
        return actions
    if not np.isfinite(actions).all():
        raise ValueError("the policy returned actions that are NaN or infinite")
    return np.clip(actions, space.low, space.high).astype(space.dtype, copy=False)
