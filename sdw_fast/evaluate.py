"""Rollouts: a policy's undiscounted returns in a Gymnasium environment, raw and D4RL-normalized."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn
from tqdm import tqdm

from sdw_fast.data import find_reference_scores, normalized_return
from sdw_fast.policy import behavior_clone

if TYPE_CHECKING:
    from sdw_fast.synthetic import SyntheticDataset

Policy = Callable[[torch.Tensor], Any]

# Rows in every batch that a policy sees. The last bits of a matrix product may depend on its shape, and contacts
# amplify them; with one shape for all, an episode's return depends on its seed alone.
BATCH = 16


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Returns of a policy's episodes.

    Attributes:
        env_id: Gymnasium id.
        seed: episode i was reset with seed + i.
        returns: (E,) float64, undiscounted.
        lengths: (E,) int64, steps.
        normalized: (E,) float64, D4RL-normalized, or None where no reference scores are known.
    """

    env_id: str
    seed: int
    returns: np.ndarray
    lengths: np.ndarray
    normalized: np.ndarray | None

    @property
    def mean(self) -> float:
        """Mean return over episodes."""
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the return over episodes (population)."""
        return float(self.returns.std())

    @property
    def normalized_mean(self) -> float | None:
        """Mean D4RL-normalized return, or None."""
        return None if self.normalized is None else float(self.normalized.mean())

    @property
    def normalized_std(self) -> float | None:
        """Standard deviation of the D4RL-normalized return over episodes, or None."""
        return None if self.normalized is None else float(self.normalized.std())

    def to_dict(self) -> dict[str, Any]:
        """Plain values (JSON-serializable): the fields and the four statistics."""
        return {
            "env_id": self.env_id,
            "seed": self.seed,
            "episodes": len(self.returns),
            "mean": self.mean,
            "std": self.std,
            "normalized_mean": self.normalized_mean,
            "normalized_std": self.normalized_std,
            "returns": self.returns.tolist(),
            "lengths": self.lengths.tolist(),
            "normalized": None if self.normalized is None else self.normalized.tolist(),
        }

    def __str__(self) -> str:
        text = f"{self.env_id}: return {self.mean:.1f} ± {self.std:.1f} over {len(self.returns)} episodes"
        if self.normalized is None:
            return text
        return f"{text} (D4RL-normalized {self.normalized_mean:.1f} ± {self.normalized_std:.1f})"


def evaluate(
    policy: Policy,
    env_id: str,
    *,
    episodes: int = 10,
    seed: int = 0,
    reference_scores: tuple[float, float] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Runs a policy for whole episodes in a vectorized environment.

    Episode i is reset with seed + i, and its return does not depend on how many others are run: the first 5 of 20
    episodes are the 5 of a shorter evaluation, bit for bit, for a deterministic policy.

    Args:
        policy: maps raw observations (B, D), a float32 tensor, to actions (B, A), a tensor or array. An nn.Module is
            put in evaluation mode for the duration and gets its input on its own device. Every call gets the same B;
            rows beyond the running episodes are padding. Actions are clipped to the action space.
        env_id: Gymnasium id with one-dimensional Box observations and actions, such as "Hopper-v5".
        episodes: number of episodes, at least 1.
        seed: of the first episode.
        reference_scores: (random, expert) returns for normalization, before D4RL's.
        progress: show a progress bar over episodes.

    Raises:
        ValueError: if the environment's spaces do not fit, or actions have a wrong shape or are not finite.
        ImportError: if the environment needs MuJoCo and it is not installed.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    slots = min(episodes, BATCH)
    envs = make_vector_env(env_id, [range(seed + slot, seed + episodes, slots) for slot in range(slots)])
    returns = np.zeros(episodes)
    lengths = np.zeros(episodes, dtype=np.int64)
    current = np.arange(slots)  # the episode that each environment is in; past the last, it idles
    with closing(envs), acting(policy), tqdm(total=episodes, desc="evaluate", disable=not progress) as bar:
        observations, _ = envs.reset()
        while (running := current < episodes).any():
            actions = act(policy, observations, envs.single_action_space)
            observations, rewards, terminations, truncations, _ = envs.step(actions)
            returns[current[running]] += rewards[running]
            lengths[current[running]] += 1
            ended = running & (terminations | truncations)
            current[ended] += slots
            bar.update(int(ended.sum()))
    return Evaluation(env_id, seed, returns, lengths, _normalize(env_id, returns, reference_scores))


def evaluate_synthetic(
    synthetic: SyntheticDataset,
    env_id: str | None = None,
    *,
    clones: int = 5,
    episodes: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Clones several policies on a synthetic set and runs each for its share of the episodes.

    Policies cloned on one set from different initializations can differ more than the sets that one wants to compare,
    so one clone says little.

    Args:
        synthetic: the set; clones are trained with its own settings, from the seeds seed, seed + 1, …
        env_id: Gymnasium id; None: the set's own.
        clones: policies, at most `episodes`.
        episodes: in all; episode i is reset with seed + i.
        seed: of the first clone and the first episode.
        progress: show a progress bar for each clone.

    Raises:
        ValueError: no environment is known, or clones is not in 1 … episodes.
    """
    env_id = env_id or synthetic.env_id
    if env_id is None:
        raise ValueError("the synthetic set names no environment: pass env_id, such as 'Hopper-v5'")
    if not 1 <= clones <= episodes:
        raise ValueError(f"clones must be between 1 and episodes = {episodes}, got {clones}")
    results = [
        evaluate(
            behavior_clone(synthetic, seed=seed + clone),
            env_id,
            episodes=len(share),
            seed=seed + int(share[0]),
            reference_scores=synthetic.reference_scores,
            progress=progress,
        )
        for clone, share in enumerate(np.array_split(np.arange(episodes), clones))
    ]
    returns, lengths = (np.concatenate([getattr(r, name) for r in results]) for name in ("returns", "lengths"))
    return Evaluation(env_id, seed, returns, lengths, _normalize(env_id, returns, synthetic.reference_scores))


def make_env(env_id: str) -> gym.Env:
    """Makes an environment, without MuJoCo's notes that Gymnasium's own model files use deprecated attributes.

    MuJoCo prints them to standard error and to a file in the working directory when it compiles a model, and a user can
    do nothing about them. Its other warnings pass.

    Raises:
        ImportError: if the environment needs MuJoCo and it is not installed.
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
    so every step is a transition. Stepping in one process beats one process for each environment: a MuJoCo step takes
    0.1 ms, less than passing its result between processes.

    Raises:
        ValueError: if observations or actions are not one-dimensional Box spaces.
    """
    envs = SyncVectorEnv(
        [lambda s=s: _SeededEpisodes(make_env(env_id), s) for s in seeds],  # type: ignore[misc]
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    for kind, space in (("observation", envs.single_observation_space), ("action", envs.single_action_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            envs.close()
            raise ValueError(f"{env_id} has {kind} space {space}; only one-dimensional Box spaces are supported")
    return envs


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
    modes = [(m, m.training) for m in policy.modules()] if isinstance(policy, nn.Module) else []
    threads = torch.get_num_threads()
    for module, _ in modes:
        module.training = False
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for module, training in modes:
            module.training = training


def act(policy: Policy, observations: np.ndarray, space: Any) -> np.ndarray:
    """Asks the policy for the actions of observations (n, D), n ≤ BATCH, and checks them."""
    rows = len(observations)
    batch = torch.zeros(BATCH, observations.shape[1])
    batch[:rows] = torch.from_numpy(observations)
    parameter = next(policy.parameters(), None) if isinstance(policy, nn.Module) else None
    with torch.no_grad():
        actions = torch.as_tensor(policy(batch if parameter is None else batch.to(parameter.device))).cpu().numpy()
    if actions.shape != (BATCH, *space.shape):
        raise ValueError(
            f"the policy maps observations {tuple(batch.shape)} to actions {actions.shape}, "
            f"expected {(BATCH, *space.shape)}"
        )
    if not np.isfinite(actions[:rows]).all():
        raise ValueError("the policy returned actions that are NaN or infinite")
    return np.clip(actions[:rows], space.low, space.high).astype(space.dtype, copy=False)


def _make(env_id: str) -> gym.Env:
    try:
        return gym.make(env_id)
    except gym.error.DependencyNotInstalled as error:
        raise ImportError(f'{env_id} needs MuJoCo: pip install "sdw_fast[mujoco]" ({error})') from error


def _normalize(env_id: str, returns: np.ndarray, scores: tuple[float, float] | None) -> np.ndarray | None:
    if scores is None and find_reference_scores(env_id) is None:
        return None
    return normalized_return(env_id, returns, scores)
