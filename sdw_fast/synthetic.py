"""The synthetic set: some hundred state-action pairs, chosen among real ones to start from, saved, loaded, exported."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdw_fast import shipped
from sdw_fast.cards import Card, Shown, short_hash
from sdw_fast.config import INITIALIZATIONS, checked_seed
from sdw_fast.data import TransitionDataset
from sdw_fast.files import check_sum, read_npz, reading, to_json, write_npz
from sdw_fast.units import Affine, Discrete, Units
from sdw_fast.version import __version__

if TYPE_CHECKING:
    import minari

    from sdw_fast.teacher import Teacher

FORMAT = 2
_ARRAYS = ("observations", "actions", "mean", "scale")
_BOUNDS = ("action_low", "action_high")  # of actions that are not discrete
_LARGEST = 1e6  # in normalized units, where states and actions are about 1
_POOL = 100_000  # pairs looked at by the methods that rank or compare them
_BLOCK = 1_024  # points that k-means++ draws a center from


@dataclass(frozen=True, eq=False, repr=False)
class SyntheticDataset(Shown):
    """A synthetic set of N state-action pairs, in the environment's units.

    Two sets are equal where pairs and units are, whatever they were made of.

    Attributes:
        observations: (N, D) float32.
        actions: (N, A) float32. Distilled actions are free: they may lie outside the action bounds, as targets that
            pull the policy to a bound; the trained policy's actions never do. Of an environment with n discrete actions
            they are probabilities (N, n); action numbers (N,) are taken, and become probabilities 0 and 1.
        units: Those of the dataset distilled, with known action bounds.
        config: Everything the run was configured with (see DistillConfig).
        dataset_name, dataset_hash: What was distilled; the hash is TransitionDataset.content_hash.
        evaluation: What policies cloned on it return, if it was measured: `Evaluation.to_dict()` and what else was
            said about it, plain JSON values.
        version: Version of sdw_fast that wrote it.

    Raises:
        ValueError: shapes do not fit together, the set is empty, the action bounds are not known, a number is not
            finite or beyond a million in normalized units, or probabilities do not add up to 1.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    units: Units
    config: dict[str, Any] = field(default_factory=dict)
    dataset_name: str | None = None
    dataset_hash: str | None = None
    evaluation: dict[str, Any] | None = None
    version: str = __version__

    def __post_init__(self) -> None:
        if isinstance(self.units.actions, Discrete):
            object.__setattr__(self, "actions", self.units.actions.normalize(self.actions))
        if self.observations.ndim != 2 or self.actions.ndim != 2 or len(self.observations) != len(self.actions):
            raise ValueError(
                "a synthetic set needs observations (N, D) and actions (N, A) with the same N, got "
                f"{self.observations.shape} and {self.actions.shape}"
            )
        if len(self.observations) == 0:
            raise ValueError("a synthetic set needs at least one pair, got none")
        expected = {"states": self.observations.shape[1:], "actions": self.actions.shape[1:]}
        got = {"states": (self.units.states.width,), "actions": (self.units.require_actions().width,)}
        if expected != got:
            raise ValueError(f"a synthetic set and its units do not fit together: expected {expected}, got {got}")
        for name, normalized in zip(("observations", "actions"), self.normalized(), strict=True):
            if not (np.abs(normalized) <= _LARGEST).all():
                raise ValueError(
                    f"the synthetic {name} hold NaN or Inf, or numbers beyond {_LARGEST:.0e} in normalized units: the "
                    "distillation diverged, or the file is bad"
                )

    def __len__(self) -> int:
        return len(self.observations)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SyntheticDataset)
            and np.array_equal(self.observations, other.observations)
            and np.array_equal(self.actions, other.actions)
            and self.units == other.units
        )

    def __hash__(self) -> int:
        return hash((self.observations.tobytes(), self.actions.tobytes(), self.units))

    def card(self) -> Card:
        """What the set is, for people."""
        names = ("objective", "steps", "seed")
        return Card(
            "SyntheticDataset",
            {
                "environment": self.env_id,
                "pairs": len(self),
                "dimensions": f"{self.observations.shape[1]} → {self.actions.shape[1]}",
                "distilled from": self.dataset_name,
                **{name: self.config.get(name) for name in names},
                "return": self.evaluation and _measured(self.evaluation),
                "hash": short_hash(self.observations, self.actions),
            },
        )

    @property
    def env_id(self) -> str | None:
        """Gymnasium id of the environment, if known."""
        return self.units.env_id

    @property
    def gives_one_policy(self) -> bool:
        """Whether it was distilled for one initialization (`DistillConfig.fixed_initialization`)."""
        return self.config.get("fixed_initialization") is not None

    def normalized(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """States (N, D) as a policy's network sees them, and its targets (N, A)."""
        actions = self.units.require_actions()
        return self.units.states.normalize(self.observations), actions.normalize(self.actions)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the set as one `.npz` (arrays and a JSON header, no pickle), whole or not at all.

        Returns:
            The path written, ending in `.npz`.
        """
        path = Path(path)
        path = path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
        actions = self.units.require_actions()
        discrete = isinstance(actions, Discrete)
        bounds = {} if discrete else dict(zip(_BOUNDS, self.units.action_bounds, strict=True))
        header = {
            "format": FORMAT,
            "env_id": self.units.env_id,
            "env_spec": self.units.env_spec,
            "discrete": actions.to_dict() if discrete else None,
            "returns": self.units.returns and self.units.returns.to_dict(),
            "config": self.config,
            "dataset_name": self.dataset_name,
            "dataset_hash": self.dataset_hash,
            "evaluation": self.evaluation,
            "version": self.version,
        }
        write_npz(
            path,
            observations=self.observations,
            actions=self.actions,
            mean=self.units.states.offset.astype(np.float32),
            scale=self.units.states.scale.astype(np.float32),
            **bounds,
            header=np.array(to_json(header)),
        )
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SyntheticDataset:
        """Reads a set that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, is not a synthetic set, or is of another format.
        """
        path = Path(path)
        with reading(path, "synthetic set"):
            check_sum(path)
            content = read_npz(path)
            _refuse_missing(content, "header", *_ARRAYS)
            header = json.loads(str(content["header"]))
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']} (sdw_fast {header['version']}), not {FORMAT}")
            discrete = header.get("discrete")  # files of older versions do not say
            names = _ARRAYS if discrete else _ARRAYS + _BOUNDS
            _refuse_missing(content, *names)
            arrays = {name: np.ascontiguousarray(content[name], dtype=np.float32) for name in names}
            bounds = [] if discrete else [arrays[name] for name in _BOUNDS]
            units = Units(
                states=Affine(arrays["mean"], arrays["scale"]),
                actions=Discrete(**discrete) if discrete else Affine.between(*bounds),
                returns=header["returns"] and Affine(**header["returns"]),
                env_id=header["env_id"],
                env_spec=header.get("env_spec"),  # files of older versions hold the id alone
            )
            rest = {name: header[name] for name in ("config", "dataset_name", "dataset_hash", "version")}
            rest["evaluation"] = header.get("evaluation")
            return cls(arrays["observations"], arrays["actions"], units, **rest)

    @classmethod
    def pretrained(cls, name: str) -> SyntheticDataset:
        """Loads a set that comes with the package, by its dataset of the locomotion suite: "hopper/medium".

        `evaluation` says what policies cloned on it return.

        Raises:
            ValueError: there is none for that dataset; the message lists those that there are.
        """
        return cls.load(shipped.path("set", name, "use distill"))

    def dataset_card(self) -> str:
        """A page in Markdown that says what the set is, for the place where it is shared (see docs/howto/share.md).

        It holds what was distilled, by which settings, and what policies cloned on it return, if `evaluation` is known.
        """
        tags = "---\nlicense: mit\ntags: [offline-reinforcement-learning, dataset-distillation, sdw_fast]\n---\n\n"
        settings = Card("Settings", {name: "none" if value is None else value for name, value in self.config.items()})
        about = "Pairs made by offline behavior distillation: behavior cloning on them alone gives a policy."
        return (
            f"{tags}# Synthetic set of {self.env_id or 'an unnamed environment'}\n\n"
            f"{about}\n\n{self.card().markdown()}\n{settings.markdown() if self.config else ''}\n"
            "```python\nimport sdw_fast as sdw\n\n"
            'policy = sdw.behavior_clone(sdw.SyntheticDataset.load("set.npz"))\n```\n'
        )

    def to_minari(self, dataset_id: str) -> minari.MinariDataset:
        """Exports the set as a local Minari dataset of N one-step episodes, for tools that read only Minari.

        The pairs have no order, reward or successor: each episode's reward is 0, its next observation repeats the
        observation, and it ends by truncation. Actions are clipped to the bounds, as Minari's action space demands; of
        discrete actions the most probable is taken. Its description is `dataset_card()`, and the reference scores are
        written where they are known.

        Returns:
            The Minari dataset, as `minari.load_dataset(dataset_id)` would.

        Raises:
            ValueError: the set names an environment, and there is none of that id here.
        """
        import gymnasium
        import minari
        from minari.data_collector import EpisodeBuffer

        from sdw_fast.environments import recorded

        kind, actions = self.units.require_actions(), self.actions
        if isinstance(kind, Discrete):
            space: gymnasium.Space = gymnasium.spaces.Discrete(kind.n, start=kind.start)
            actions = actions.argmax(axis=1) + kind.start
        else:
            low, high = self.units.action_bounds
            space = gymnasium.spaces.Box(low, high, dtype=np.float32)
            actions = np.clip(actions, low, high)
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
        infinity = np.float32(np.inf)
        env = None if self.env_id is None else recorded(self.units)
        scores = {}
        if self.units.returns is not None:
            random, expert = self.units.returns.denormalize(np.array([0.0, 100.0])).tolist()
            scores = {"ref_min_score": random, "ref_max_score": expert}
        return minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            env=env,
            eval_env=env,
            author="sdw_fast",
            author_email="none",
            observation_space=gymnasium.spaces.Box(-infinity, infinity, self.observations.shape[1:], np.float32),
            action_space=space,
            algorithm_name=f"sdw_fast {self.version} {self.config.get('objective', 'synthetic set')}",
            description=self.dataset_card(),
            **scores,
        )


def _measured(evaluation: dict[str, Any]) -> str:
    """Mean and standard deviation of an evaluation."""
    text = f"{evaluation['mean']:.0f} ± {evaluation['std']:.0f} over {evaluation['episodes']} episodes"
    if evaluation.get("normalized_mean") is None:
        return text
    return f"{text} (normalized {evaluation['normalized_mean']:.1f} ± {evaluation['normalized_std']:.1f})"


def real_pairs(
    data: TransitionDataset, size: int, *, init: str = "random", teacher: Teacher | None = None, seed: int = 0
) -> SyntheticDataset:
    """Chooses real pairs of a dataset: what a synthetic set starts from, or what it is compared with.

    Args:
        data: The dataset, M transitions.
        size: How many, at most M.
        init: "random": uniformly without replacement. "kmeans++": spread over the normalized states, each new one
            drawn with probability proportional to its squared distance to the nearest one chosen (Arthur and
            Vassilvitskii 2007). "top-q": uniformly among the tenth of the pairs with the highest Q(s, a).
            The last two look at 100,000 random pairs of a larger dataset.
        teacher: Needed by "top-q".
        seed: Of the draw.

    Returns:
        The pairs, without a configuration.

    Raises:
        ValueError: size is not in 1 … M, the method is unknown, "top-q" has no teacher, or the dataset's action bounds
            are not known.
    """
    if not 1 <= size <= len(data):
        raise ValueError(f"size must be between 1 and the dataset's {len(data)} transitions, got {size}")
    rng = np.random.default_rng(checked_seed("seed", seed))
    if init == "random":
        rows = rng.choice(len(data), size, replace=False)
    elif init == "kmeans++":
        pool = rng.choice(len(data), min(len(data), max(_POOL, 10 * size)), replace=False)
        rows = pool[_kmeans_plus_plus(data.units.states.normalize(data.observations[pool]), size, rng)]
    elif init == "top-q":
        if teacher is None:
            raise ValueError("init='top-q' ranks pairs by the teacher's Q(s, a): pass a teacher with a critic")
        pool = rng.choice(len(data), min(len(data), max(_POOL, 10 * size)), replace=False)
        values = np.asarray(teacher.values(data.observations[pool], data.actions[pool]))
        rows = rng.choice(pool[np.argsort(-values, kind="stable")[: max(size, len(pool) // 10)]], size, replace=False)
    else:
        raise ValueError(f"init must be one of {list(INITIALIZATIONS)}, got {init!r}")
    return SyntheticDataset(
        observations=data.observations[rows],
        actions=data.actions[rows],
        units=data.units,
        dataset_name=data.name,
        dataset_hash=data.content_hash,
    )


def _refuse_missing(content: dict[str, Any], *names: str) -> None:
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"keys missing: {missing}")


def _kmeans_plus_plus(points: np.ndarray, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """One product of a vector with a matrix a center: ‖x − c‖² = ‖x‖² + ‖c‖² − 2 ⟨x, c⟩.

    By einsum, as a BLAS would wake its threads for it, who wait for each other where other processes keep the cores.
    The next center is drawn in two stages, a block of points by its sum and a point of the block, so that one pass in
    float is all that the weights of a center take.
    """
    n_points, n_dims = points.shape
    n_blocks = -(-n_points // _BLOCK)
    columns = np.zeros((n_dims, n_blocks * _BLOCK), np.float32)
    columns[:, :n_points] = points.T
    norms = np.square(columns).sum(axis=0)
    rounding = 1e-5 * norms  # what is left of a distance of zero is less
    nearest = np.full_like(norms, np.inf)
    nearest[n_points:] = 0.0
    squared, apart = np.empty_like(norms), np.empty_like(norms, bool)
    chosen = np.empty(size, dtype=np.int64)
    chosen[0] = rng.integers(n_points)
    for i in range(1, size):
        center = chosen[i - 1]
        np.einsum("d,dm->m", -2 * columns[:, center], columns, out=squared)
        squared += norms
        squared += norms[center]
        squared *= np.greater_equal(squared, rounding, out=apart)
        squared[center] = 0.0
        np.minimum(nearest, squared, out=nearest)
        blocks = nearest.reshape(n_blocks, _BLOCK)
        sums = blocks.sum(axis=1).astype(np.float64)
        if sums.any():
            block = rng.choice(n_blocks, p=sums / sums.sum())
            inside = blocks[block].astype(np.float64)
            chosen[i] = block * _BLOCK + rng.choice(_BLOCK, p=inside / inside.sum())
        else:  # every other point coincides with a chosen one
            chosen[i] = rng.choice(np.setdiff1d(np.arange(n_points), chosen[:i]))
    return chosen
