"""Offline RL data: one frozen `TransitionDataset`, whatever file it came from (see `sdw_fast.readers`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdw_fast.cards import Card, Shown
from sdw_fast.units import Affine, Units

if TYPE_CHECKING:
    from sdw_fast.environments import Environment

_ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations", "jumps", "jump_observations")


@dataclass(frozen=True, eq=False, repr=False)
class TransitionDataset(Shown):
    """Transitions (s, a, r, s') of whole episodes, one after another, in environment units; made by `load_dataset`.

    An episode ends at a row whose termination or truncation is set; the last row sets one of them. The arrays are the
    only copy of the data: nothing normalized is kept, and a next observation is stored only where it is not the
    following row's observation. They may be memory maps (docs/scale.md).

    Attributes:
        observations: (M, D) float32.
        actions: (M, A) float32; discrete ones (M,) int64, the environment's numbers.
        rewards: (M,) float32; None of demonstrations, which are observations and actions alone.
        terminations: (M,) bool, true ends of an episode (nothing follows).
        truncations: (M,) bool, episodes cut short, by a time limit or by the end of the data.
        jumps: (J,) int64, ascending: rows whose next observation is not the following row's observation.
        jump_observations: (J, D) float32, the next observations of those rows.
        units: how states, actions and returns are normalized, and the environment.
        name: where the data came from, for people.
        path: the folder (Minari) or file that the data came from; caches are kept beside it.
    """

    observations: NDArray[np.float32] = field(repr=False)
    actions: NDArray[Any] = field(repr=False)
    rewards: NDArray[np.float32] | None = field(repr=False)
    terminations: NDArray[np.bool_] = field(repr=False)
    truncations: NDArray[np.bool_] = field(repr=False)
    jumps: NDArray[np.int64] = field(repr=False)
    jump_observations: NDArray[np.float32] = field(repr=False)
    units: Units = field(repr=False)
    name: str | None = None
    path: Path | None = None

    def __eq__(self, other: object) -> bool:
        """Whether transitions and units are the same, wherever they came from."""
        return isinstance(other, TransitionDataset) and (
            self is other
            or (self.units == other.units and all(np.array_equal(getattr(self, n), getattr(other, n)) for n in _ARRAYS))
        )

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def card(self) -> Card:
        """What the dataset is, for people."""
        return Card(
            "TransitionDataset",
            {
                "name": self.name,
                "environment": self.env_id,
                "transitions": len(self),
                "episodes": len(self.episode_ends),
                "dimensions": f"{self.observations.shape[1]} → {self.actions.shape[1]}",
                "return": self._shown_returns(),
                "hash": self.content_hash[:8],
            },
        )

    def _shown_returns(self) -> str:
        if self.rewards is None:
            return "unknown: no rewards"
        returns, scores = self.episode_returns, self.units.returns
        shown = f"{returns.mean():.0f} ± {returns.std():.0f}"
        return shown if scores is None else f"{shown} (normalized {scores.normalize(returns).mean():.1f})"

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def env_id(self) -> str | None:
        """Gymnasium id of the environment, if known."""
        return self.units.env_id

    @property
    def action_bounds(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(low, high) of the environment's actions, each (A,). Raises ValueError where they are not known."""
        return self.units.action_bounds

    def in_environment(self, env: Environment) -> TransitionDataset:
        """The same data in another environment, as `load_dataset` takes it: its name, its bounds, its returns.

        Raises:
            ImportError, ValueError: it cannot be made here.
        """
        from sdw_fast.environments import place

        return dataclasses.replace(self, units=place(self.units, self.actions.shape[1], env))

    def normalized_observations(self) -> NDArray[np.float32]:
        """A new array of all observations in normalized units, (M, D) float32."""
        return self.units.states.normalize(self.observations)

    def next_observations(self, rows: ArrayLike | None = None) -> NDArray[np.float32]:
        """A new array of the observations that follow, (len(rows), D); of all rows where none are given.

        What follows a termination is never used, its value being zero; where the source does not say it, as at an end
        of a demonstration, it is the row's own observation.

        Raises:
            IndexError: `rows` are not row numbers in 0 … M − 1.
        """
        wanted = np.arange(len(self)) if rows is None else np.asarray(rows)
        if wanted.dtype.kind not in "iu" or ((wanted < 0) | (wanted >= len(self))).any():
            raise IndexError(f"next_observations takes row numbers from 0 to {len(self) - 1}, got {wanted}")
        following = self.observations[np.minimum(wanted + 1, len(self) - 1)]
        place = np.minimum(np.searchsorted(self.jumps, wanted), len(self.jumps) - 1)
        jumping = self.jumps[place] == wanted
        following[jumping] = self.jump_observations[place[jumping]]
        return following

    @property
    def content_hash(self) -> str:
        """32 hexadecimal digits that name the arrays' content and the units, whatever their source.

        Computed anew at each call (a second for 10⁷ rows), so that it is never that of arrays changed since.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name in _ARRAYS:
            array = getattr(self, name)
            if array is None:
                continue
            digest.update(f"{name}{array.shape}{array.dtype.str}".encode())
            digest.update(array.data if array.size else b"")
        digest.update(json.dumps(self.units.to_dict()).encode())
        return digest.hexdigest()

    @property
    def episode_ends(self) -> NDArray[np.int64]:
        """Row of each episode's last transition, (E,) int64, ascending; the last is M − 1."""
        return np.flatnonzero(self.terminations | self.truncations)

    @property
    def episode_returns(self) -> NDArray[np.float64]:
        """Undiscounted return of each episode, (E,) float64. Raises ValueError where there are no rewards."""
        starts = np.concatenate([[0], self.episode_ends[:-1] + 1])
        return np.add.reduceat(self.require_rewards(), starts, dtype=np.float64)

    def require_rewards(self) -> NDArray[np.float32]:
        """The rewards, (M,) float32. Raises ValueError where there are none."""
        if self.rewards is None:
            raise ValueError(
                "this dataset is of demonstrations, observations and actions alone: returns and the training of a "
                "teacher need rewards; objective 'dbc' needs none, nor do the others with a teacher trained elsewhere"
            )
        return self.rewards

    def subset(self, indices: Sequence[int] | np.ndarray | slice) -> TransitionDataset:
        """Takes rows, in the given order, as a new dataset in this one's units.

        Args:
            indices: row numbers, a boolean mask (M,), or a slice. Where rows that do not follow each other become
                neighbors, the earlier is marked truncated: the pieces of episodes stay apart.

        Raises:
            IndexError: if a row is out of range or a mask has the wrong length.
            ValueError: if no row is left.
        """
        rows = np.arange(len(self))[indices]
        if rows.ndim != 1 or rows.size == 0:
            raise ValueError(f"subset takes a non-empty list of rows, got indices that select shape {rows.shape}")
        apart = np.append(rows[1:] != rows[:-1] + 1, True)
        jumping = apart.copy()
        jumping[np.isin(rows, self.jumps)] = True
        return TransitionDataset(
            observations=self.observations[rows],
            actions=self.actions[rows],
            rewards=None if self.rewards is None else self.rewards[rows],
            terminations=self.terminations[rows],
            truncations=self.truncations[rows] | (apart & ~self.terminations[rows]),
            jumps=np.flatnonzero(jumping),
            jump_observations=self.next_observations(rows[jumping]),
            units=self.units,
            name=self.name,
            path=self.path,
        )

    def summary(self) -> dict[str, Any]:
        """Describes the dataset in plain values (JSON-serializable).

        Returns:
            name, env_id, transitions, episodes, observation_dim, action_dim (how many there are, of discrete actions),
            mean_episode_length, return_mean, return_std, return_min, return_max (over episodes, the cut ones included)
            and normalized_return_mean, which is None where neither the dataset nor D4RL gives reference scores.
            All of returns is None without rewards.
        """
        returns, scores = None if self.rewards is None else self.episode_returns, self.units.returns
        episodes = len(self.episode_ends)
        return {
            "name": self.name,
            "env_id": self.env_id,
            "transitions": len(self),
            "episodes": episodes,
            "observation_dim": self.observations.shape[1],
            "action_dim": _width(self),
            "mean_episode_length": len(self) / episodes,
            **{
                f"return_{name}": None if returns is None else float(getattr(returns, name)())
                for name in ("mean", "std", "min", "max")
            },
            "normalized_return_mean": (
                None if scores is None or returns is None else float(scores.normalize(returns.mean()))
            ),
        }


def concatenate(datasets: Sequence[TransitionDataset]) -> TransitionDataset:
    """Joins datasets, in order, into one whose states are normalized by all observations.

    Episodes stay apart, because each dataset's last row ends one. The environment and the reference scores are kept
    where all agree; a warning tells where they agree on the environment's id, but not on its arguments or wrappers.

    Raises:
        ValueError: there is no dataset, or widths or action bounds differ.
    """
    if not datasets:
        raise ValueError("concatenate needs at least one dataset")
    widths = {(d.observations.shape[1], _width(d)) for d in datasets}
    if len(widths) > 1:
        raise ValueError(f"datasets differ in (observation, action) widths: {sorted(widths)}")
    units = [d.units for d in datasets]
    first = units[0]
    if any(u.actions != first.actions for u in units):
        known = [u.actions for u in units]
        raise ValueError(f"datasets differ in their action bounds: {known}; load them with the same bounds")
    rewards = [d.rewards for d in datasets if d.rewards is not None]
    if 0 < len(rewards) < len(datasets):
        raise ValueError("some datasets have rewards and some are demonstrations without: leave the rewards out of all")
    env_id = first.env_id if all(u.env_id == first.env_id for u in units) else None
    records = {u.env_spec for u in units if env_id and u.env_spec}
    if len(records) > 1:
        warnings.warn(
            f"the datasets were recorded in {env_id} with different arguments, wrappers or time limits: the "
            "environment of the joined dataset is the one registered under that id",
            stacklevel=2,
        )
    observations = np.concatenate([d.observations for d in datasets])
    starts = np.cumsum([0, *map(len, datasets[:-1])])
    return TransitionDataset(
        observations=observations,
        actions=np.concatenate([d.actions for d in datasets]),
        rewards=np.concatenate(rewards) if len(rewards) == len(datasets) else None,
        terminations=np.concatenate([d.terminations for d in datasets]),
        truncations=np.concatenate([d.truncations for d in datasets]),
        jumps=np.concatenate([d.jumps + start for d, start in zip(datasets, starts, strict=True)]),
        jump_observations=np.concatenate([d.jump_observations for d in datasets]),
        units=Units(
            states=Affine.fit(observations),
            actions=first.actions,
            returns=first.returns if all(u.returns == first.returns for u in units) else None,
            env_id=env_id,
            env_spec=records.pop() if len(records) == 1 else None,
        ),
        name=" + ".join(d.name or "unnamed" for d in datasets),
    )


def _width(data: TransitionDataset) -> int:
    """Numbers of an action, or how many discrete ones there are."""
    return data.actions.shape[1] if data.units.actions is None else data.units.actions.width
