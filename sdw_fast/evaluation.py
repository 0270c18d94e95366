"""Evaluation: a policy's undiscounted returns in a Gymnasium environment, raw and D4RL-normalized; those of a set."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdw_fast.config import checked_seed
from sdw_fast.policy import behavior_clone
from sdw_fast.progress import progress_bar
from sdw_fast.ranks import Ranks
from sdw_fast.units import Affine, Units, d4rl_returns

if TYPE_CHECKING:
    from sdw_fast.environments import Environment
    from sdw_fast.synthetic import SyntheticDataset

# The seeds of clones and episodes by which a run chooses its best set begin at this number plus the run's own seed, so
# that an evaluation, whose seeds begin at 0, repeats none of them. Every environment takes seeds below 2^31.
SELECTION_SEED = 1 << 30


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Returns of a policy's episodes.

    Attributes:
        env_id: Gymnasium id; of an environment that has none, the name of its class.
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
    policy: Callable[[torch.Tensor], Any],
    env: Environment | None = None,
    *,
    episodes: int = 10,
    seed: int = 0,
    returns: Affine | None = None,
    progress: bool = False,
) -> Evaluation:
    """Runs a policy for whole episodes, up to 16 side by side.

    Episode i is reset with seed + i, and its return does not depend on how many others are run: the first 5 of 20
    episodes are the 5 of a shorter evaluation, bit for bit, for a deterministic policy. Seeds from 2³⁰ on are those by
    which `distill` chooses its best set: episodes of smaller seeds were never seen by a run.

    Args:
        policy: maps raw observations (B, D), a float32 tensor, to actions (B, A), a tensor or array, or to the numbers
            of classes (B,), integers, where the action space is Discrete. An nn.Module is put in evaluation mode for
            the duration and gets its input on its own device. Every call gets the same B; rows beyond the running
            episodes are padding. Actions are clipped to the bounds of the action space.
        env: the environment, with one-dimensional Box observations and Box or Discrete actions: a Gymnasium id such as
            "Hopper-v5", or "module:Env-v0" to import the module first; an EnvSpec; a function without arguments that
            makes a new environment; or an environment, which runs one episode after the other and is not closed.
            Episodes of one without a time limit are cut after 10,000 steps, with a warning. None: the one that a policy
            of this package was cloned for, as it was recorded.
        episodes: number of episodes, at least 1.
        seed: of the first episode.
        returns: how returns are normalized, as a dataset's `units.returns`; None: as the policy's units say, else as
            D4RL does, where it knows the environment.
        progress: show a progress bar over episodes.

    Raises:
        ValueError: the environment cannot be made, its spaces do not fit, or actions have a wrong shape or are not
            finite.
        ImportError: a package that the environment needs, such as MuJoCo, is not installed.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    seed = checked_seed("seed", seed)
    from sdw_fast.environments import check_environment
    from sdw_fast.rollout import SeededEnvs, act, acting, side_by_side

    units = getattr(getattr(policy, "__self__", policy), "units", None)
    if isinstance(units, Units):  # a policy or a teacher of this package
        env = check_environment(units, env)
    elif env is None:
        raise ValueError("the policy names no environment: pass env, such as 'Hopper-v5'")
    slots = min(episodes, side_by_side(env))
    envs = SeededEnvs(env, [range(seed + slot, seed + episodes, slots) for slot in range(slots)])
    totals = np.zeros(episodes)
    lengths = np.zeros(episodes, dtype=np.int64)
    current = np.arange(slots)  # the episode that each environment is in; past the last, it idles
    with closing(envs), acting(policy), progress_bar(total=episodes, desc="evaluate", show=progress) as bar:
        while (running := current < episodes).any():
            actions = act(policy, envs.observations, envs.action_space)
            _, rewards, terminations, truncations = envs.step(actions)
            totals[current[running]] += rewards[running]
            lengths[current[running]] += 1
            ended = terminations | truncations
            current[ended] += slots
            bar.update(int(ended.sum()))
    scores = returns or (units.returns_in(envs.name) if isinstance(units, Units) else d4rl_returns(envs.name))
    return Evaluation(envs.name, seed, totals, lengths, None if scores is None else scores.normalize(totals))


def evaluate_synthetic(
    synthetic: SyntheticDataset,
    env: Environment | None = None,
    *,
    clones: int = 5,
    ensemble: int = 1,
    episodes: int = 10,
    seed: int = 0,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Clones several policies on a synthetic set and runs each for its share of the episodes.

    Policies cloned on one set from different initializations can differ more than the sets that one wants to compare,
    so one clone says little. Seeds from 2³⁰ on are those of the clones and episodes by which `distill` chooses its best
    set, which flatter it; an evaluation with smaller seeds repeats none of them.

    Args:
        synthetic: the set; clones are trained with its own settings, from the seeds seed, seed + 1, …
        env: the environment, as `evaluate` takes it; None: the set's own, as it was recorded, with its arguments,
            wrappers and time limit.
        clones: policies, at most `episodes`; a set distilled for one initialization has one, which runs all episodes.
        ensemble: members of each policy, which acts by their mean (see `behavior_clone`).
        episodes: in all; episode i is reset with seed + i.
        seed: of the first clone and the first episode.
        progress: show a progress bar for each clone.
        ranks: of a process group, all of which call this: they share out the clones, and all return the same.

    Raises:
        ValueError: no environment is known, it does not fit the set, or clones is not in 1 … episodes.
    """
    from sdw_fast.environments import check_environment

    if not 1 <= clones <= episodes:
        raise ValueError(f"clones must be between 1 and episodes = {episodes}, got {clones}")
    seed = checked_seed("seed", seed)
    env = check_environment(synthetic.units, env)
    if one_policy := synthetic.gives_one_policy:
        clones = 1
    shares = np.array_split(np.arange(episodes), clones)

    def results_of(own: range) -> dict[int, Evaluation]:
        return {
            clone: evaluate(
                behavior_clone(synthetic, ensemble=ensemble, seed=None if one_policy else seed + clone * ensemble),
                env,
                episodes=len(shares[clone]),
                seed=seed + int(shares[clone][0]),
                progress=progress,
            )
            for clone in own
        }

    if ranks:
        every = ranks.gather(ranks.together(lambda: results_of(range(ranks.rank, clones, ranks.size))))
        found = {clone: result for part in every for clone, result in part.items()}
    else:
        found = results_of(range(clones))
    results = [found[clone] for clone in range(clones)]
    env_id = results[0].env_id
    scores = synthetic.units.returns_in(env_id)
    returns, lengths = (np.concatenate([getattr(r, name) for r in results]) for name in ("returns", "lengths"))
    return Evaluation(env_id, seed, returns, lengths, None if scores is None else scores.normalize(returns))
