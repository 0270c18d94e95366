"""The product of a distillation: a few hundred synthetic state-action pairs and how they came about."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdw_fast.data import Normalizer, TransitionDataset, normalize_actions
from sdw_fast.version import __version__

if TYPE_CHECKING:
    import minari

    from sdw_fast.teacher import Teacher

FORMAT = 1
INITIALIZATIONS = ("random", "kmeans++", "top-q")
_ARRAYS = ("observations", "actions", "mean", "scale", "action_low", "action_high")


@dataclass(frozen=True)
class SyntheticDataset:
    """A synthetic set of N state-action pairs, in the environment's units.

    Attributes:
        observations: (N, D) float32.
        actions: (N, A) float32. Distilled actions are free: they may lie outside the action bounds, as targets that
            pull the policy to a bound; the trained policy's actions never do.
        normalizer: Normalization of the observations, that of the dataset distilled.
        action_low, action_high: Action bounds of the environment, (A,) float32.
        env_id: Gymnasium id of the environment, if known.
        reference_scores: (random, expert) returns for normalized scores, if the dataset carries its own.
        config: Everything the run was configured with (see DistillConfig).
        dataset_name, dataset_hash: What was distilled; the hash is TransitionDataset.content_hash.
        version: Version of sdw_fast that wrote it.

    Raises:
        ValueError: shapes do not fit together, the set is empty, or a number is not finite.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    normalizer: Normalizer
    action_low: NDArray[np.float32]
    action_high: NDArray[np.float32]
    env_id: str | None = None
    reference_scores: tuple[float, float] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    dataset_name: str | None = None
    dataset_hash: str | None = None
    version: str = __version__

    def __post_init__(self) -> None:
        if self.observations.ndim != 2 or self.actions.ndim != 2 or len(self.observations) != len(self.actions):
            raise ValueError(
                "a synthetic set needs observations (N, D) and actions (N, A) with the same N, got "
                f"{self.observations.shape} and {self.actions.shape}"
            )
        if len(self.observations) == 0:
            raise ValueError("a synthetic set needs at least one pair, got none")
        expected = {"mean": self.observations.shape[1:], "action_low": self.actions.shape[1:]}
        got = {"mean": self.normalizer.mean.shape, "action_low": self.action_low.shape}
        if expected != got:
            raise ValueError(f"a synthetic set's arrays do not fit together: expected {expected}, got {got}")
        for name in ("observations", "actions"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"the synthetic {name} hold NaN or Inf: the distillation diverged, or the file is bad")

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def normalized_observations(self) -> NDArray[np.float32]:
        """Observations as the policy's network sees them, (N, D) float32."""
        return self.normalizer.normalize(self.observations)

    @property
    def normalized_actions(self) -> NDArray[np.float32]:
        """Actions scaled so that the bounds are −1 and 1, (N, A) float32."""
        return normalize_actions(self.actions, self.action_low, self.action_high)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the set as one `.npz` (arrays and a JSON header, no pickle), under a temporary name first.

        Returns:
            The path written, ending in `.npz`.
        """
        path = Path(path)
        path = path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "format": FORMAT,
            "env_id": self.env_id,
            "reference_scores": self.reference_scores,
            "config": self.config,
            "dataset_name": self.dataset_name,
            "dataset_hash": self.dataset_hash,
            "version": self.version,
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez(
                    file,
                    observations=self.observations,
                    actions=self.actions,
                    mean=self.normalizer.mean,
                    scale=self.normalizer.scale,
                    action_low=self.action_low,
                    action_high=self.action_high,
                    header=np.array(json.dumps(header)),
                )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SyntheticDataset:
        """Reads a set that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, is not a synthetic set, or comes from a newer format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no synthetic set at {path}")
        try:
            with np.load(path, allow_pickle=False) as file:
                missing = [name for name in (*_ARRAYS, "header") if name not in file]
                if missing:
                    raise ValueError(f"keys missing: {missing}")
                arrays: dict[str, Any] = {name: np.ascontiguousarray(file[name], dtype=np.float32) for name in _ARRAYS}
                header = json.loads(str(file["header"]))
        except Exception as error:  # zipfile, json and numpy each raise their own on a damaged file
            raise ValueError(
                f"{path} is not a readable synthetic set (truncated, or another kind of file?): {error}"
            ) from error
        if header.pop("format") > FORMAT:
            raise ValueError(f"{path} was written by a newer sdw_fast ({header['version']}); this is {__version__}")
        if header["reference_scores"] is not None:
            header["reference_scores"] = tuple(header["reference_scores"])
        normalizer = Normalizer(arrays.pop("mean"), arrays.pop("scale"))
        return cls(normalizer=normalizer, **arrays, **header)

    def to_minari(self, dataset_id: str) -> minari.MinariDataset:
        """Exports the set as a local Minari dataset of N one-step episodes, for tools that read only Minari.

        The pairs have no order, reward or successor: each episode's reward is 0, its next observation repeats the
        observation, and it ends by truncation. Actions are clipped to the bounds, as Minari's action space demands.

        Returns:
            The Minari dataset, as `minari.load_dataset(dataset_id)` would.
        """
        import gymnasium
        import minari
        from minari.data_collector import EpisodeBuffer

        actions = np.clip(self.actions, self.action_low, self.action_high)
        buffers = [
            EpisodeBuffer(
                id=i,
                observations=np.stack([observation, observation]),
                actions=action[None],
                rewards=np.zeros(1),
                terminations=np.zeros(1, dtype=bool),
                truncations=np.ones(1, dtype=bool),
            )
            for i, (observation, action) in enumerate(zip(self.observations, actions, strict=True))
        ]
        low, high = np.float32(-np.inf), np.float32(np.inf)
        return minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            env=self.env_id,
            eval_env=self.env_id,
            author="sdw_fast",
            author_email="none",
            observation_space=gymnasium.spaces.Box(low, high, self.observations.shape[1:], np.float32),
            action_space=gymnasium.spaces.Box(self.action_low, self.action_high, dtype=np.float32),
            algorithm_name=f"sdw_fast {self.version} {self.config.get('objective', 'synthetic set')}",
            description=json.dumps({"dataset": self.dataset_name, "dataset_hash": self.dataset_hash, **self.config}),
        )


def real_pairs(data: TransitionDataset, rows: NDArray[np.int64], config: dict[str, Any]) -> SyntheticDataset:
    """Puts real pairs of a dataset into the container of distilled ones, to be cloned with the settings in config."""
    low, high = data.action_bounds
    return SyntheticDataset(
        observations=data.observations[rows],
        actions=data.actions[rows],
        normalizer=data.normalizer,
        action_low=low,
        action_high=high,
        env_id=data.env_id,
        reference_scores=data.reference_scores,
        config=config,
    )


def choose_pairs(
    data: TransitionDataset,
    size: int,
    *,
    method: str = "random",
    teacher: Teacher | None = None,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Chooses the real pairs that a synthetic set starts from.

    Args:
        data: The dataset, M transitions.
        size: How many, at most M.
        method: "random": uniformly without replacement. "kmeans++": spread over the normalized states, each new one
            drawn with probability proportional to its squared distance to the nearest one chosen (Arthur and
            Vassilvitskii 2007). "top-q": uniformly among the tenth of the pairs with the highest Q(s, a).
            The last two look at 100,000 random pairs of a larger dataset.
        teacher: Needed by "top-q".
        rng: Source of the draw.

    Returns:
        Row indices, (size,) int64, distinct.

    Raises:
        ValueError: size is not in 1 … M, the method is unknown, or "top-q" has no teacher.
    """
    if not 1 <= size <= len(data):
        raise ValueError(f"size must be between 1 and the dataset's {len(data)} transitions, got {size}")
    if method == "random":
        return rng.choice(len(data), size, replace=False)
    pool = rng.choice(len(data), min(len(data), max(100_000, 10 * size)), replace=False)
    if method == "kmeans++":
        return pool[_kmeans_plus_plus(data.normalized_observations[pool], size, rng)]
    if method == "top-q":
        if teacher is None:
            raise ValueError("init='top-q' ranks pairs by the teacher's Q(s, a): pass a teacher with a critic")
        values = np.asarray(teacher.values(data.observations[pool], data.actions[pool]))
        best = pool[np.argsort(-values, kind="stable")[: max(size, len(pool) // 10)]]
        return rng.choice(best, size, replace=False)
    raise ValueError(f"init must be one of {list(INITIALIZATIONS)}, got {method!r}")


def _kmeans_plus_plus(points: np.ndarray, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    chosen = np.empty(size, dtype=np.int64)
    chosen[0] = rng.integers(len(points))
    nearest = np.full(len(points), np.inf)
    for i in range(1, size):
        nearest = np.minimum(nearest, np.square(points - points[chosen[i - 1]]).sum(axis=1, dtype=np.float64))
        nearest[chosen[:i]] = 0.0
        total = nearest.sum()
        if total > 0:
            chosen[i] = rng.choice(len(points), p=nearest / total)
        else:  # every other point coincides with a chosen one
            chosen[i] = rng.choice(np.setdiff1d(np.arange(len(points)), chosen[:i]))
    return chosen
