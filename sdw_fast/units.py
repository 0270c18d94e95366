"""Units: the maps between an environment's own numbers and the normalized ones that the package computes with.

Environment units are what a user sees: datasets, synthetic sets, files, inputs and outputs of policies and teachers.
Inside, a state has mean 0 and about unit deviation, a return is D4RL's score, and an action lies in [−1, 1], or is the
probabilities of a finite number of actions. Which of the two decides the head of the policy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = TypeVar("Array", np.ndarray, torch.Tensor)

# Returns of a uniformly random policy and of an expert, from D4RL (Fu et al., arXiv 2004.07219).
REFERENCE_SCORES: dict[str, tuple[float, float]] = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
}

SCALE_FLOOR = 1e-3  # added to the standard deviation, as D4RL code does: a constant column stays finite
_ROW_BLOCK = 16_384  # rows looked at together where a whole-array temporary would double the memory


@dataclass(frozen=True, eq=False)
class Affine:
    """The map x ↦ (x − offset) / scale to normalized units, column by column.

    Attributes:
        offset: (n,) float64, or () for a single number.
        scale: of the same shape, positive.

    Raises:
        ValueError: shapes differ, a number is not finite, or a scale is not positive.
    """

    offset: NDArray[np.floating]
    scale: NDArray[np.floating]

    def __post_init__(self) -> None:
        for name in ("offset", "scale"):
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.float64))
        if self.offset.shape != self.scale.shape or self.offset.ndim > 1:
            raise ValueError(
                f"offset and scale must both have shape (n,) or (), got {self.offset.shape} and {self.scale.shape}"
            )
        if not (np.isfinite(self.offset).all() and np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError(f"offset must be finite, and scale finite and positive, got {self.offset}, {self.scale}")

    @classmethod
    def fit(cls, observations: NDArray[np.float32]) -> Affine:
        """Mean and scale of the columns of (M, D), accumulated in float64, rounded to float32.

        The scale is the standard deviation + 1e-3, as D4RL code has it, but for two kinds of columns. What hardly
        varies (deviation below two roundings of float32 at its largest magnitude, or below 1e-4 and a thousandth of
        that magnitude) is centered, and divided by the magnitude only where that is above 1: neither its noise nor
        what a policy meets elsewhere is blown up. What varies in tiny units (deviation below 1e-3 and above a
        hundredth of the magnitude) is divided by twice its deviation, which at 1e-3 is the same as D4RL's.
        """
        mean = observations.mean(axis=0, dtype=np.float64)
        squares = np.zeros_like(mean)
        for start in range(0, len(observations), _ROW_BLOCK):
            centered = observations[start : start + _ROW_BLOCK] - mean
            squares += np.einsum("ij,ij->j", centered, centered)
        deviation = np.sqrt(squares / len(observations))
        magnitude = np.maximum(observations.max(axis=0), -observations.min(axis=0)).astype(np.float64)
        scale = deviation + SCALE_FLOOR
        tiny = (deviation < SCALE_FLOOR) & (deviation > 0.01 * magnitude)
        scale[tiny] = 2 * deviation[tiny]
        rounding = 2 * np.finfo(np.float32).eps
        idle = (deviation <= rounding * magnitude) | ((deviation < 1e-4) & (deviation < 1e-3 * magnitude))
        scale[idle] = np.maximum(magnitude[idle], 1.0)
        return cls(mean.astype(np.float32), scale.astype(np.float32))

    @classmethod
    def between(cls, low: ArrayLike, high: ArrayLike) -> Affine:
        """The map that takes [low, high] to [−1, 1]; bounds are rounded to float32, as Gymnasium's spaces hold them.

        Raises:
            ValueError: the bounds are not finite numbers with low < high, of one shape (A,).
        """
        try:
            with np.errstate(over="ignore"):  # an overflow becomes an infinity, refused below
                lower, upper = (np.asarray(bound, dtype=np.float32).astype(np.float64) for bound in (low, high))
        except (TypeError, ValueError) as error:
            raise ValueError(f"action bounds must be arrays of numbers, got {low!r} and {high!r}") from error
        finite = np.isfinite(lower).all() and np.isfinite(upper).all()
        if lower.shape != upper.shape or lower.ndim != 1 or not finite or (lower >= upper).any():
            raise ValueError(f"action bounds must be finite (A,) arrays with low < high, got {low!r}, {high!r}")
        return cls((upper + lower) / 2, (upper - lower) / 2)

    @classmethod
    def scores(cls, random: float, expert: float) -> Affine:
        """The map of returns that takes the random policy's to 0 and the expert's to 100, as D4RL does.

        Raises:
            ValueError: they are not finite numbers with random < expert.
        """
        if not -np.inf < random < expert < np.inf:
            raise ValueError(f"reference scores must be finite with random < expert, got {random} and {expert}")
        return cls(np.array(random), np.array((expert - random) / 100))

    @property
    def bounds(self) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """(low, high), float64: what is mapped to −1 and to 1."""
        return self.offset - self.scale, self.offset + self.scale

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Affine)
            and np.array_equal(self.offset, other.offset)
            and np.array_equal(self.scale, other.scale)
        )

    def __hash__(self) -> int:
        return hash((self.offset.tobytes(), self.scale.tobytes()))

    def normalize(self, x: Array) -> Array:
        """Maps x (…, n) to normalized units: array or tensor, of the same type, device and, where floating, dtype."""
        offset, scale = self._constants(x)
        y = x - offset
        y /= scale
        return cast("Array", y)

    def denormalize(self, x: Array) -> Array:
        """Maps x (…, n) back to environment units; the inverse of `normalize`."""
        offset, scale = self._constants(x)
        y = x * scale
        y += offset
        return cast("Array", y)

    def _constants(self, x: Any) -> tuple[Any, Any]:
        if self.offset.ndim and x.shape[-1:] != self.offset.shape:
            raise ValueError(f"expected rows of {len(self.offset)} numbers, got shape {tuple(x.shape)}")
        if isinstance(x, torch.Tensor):
            kind = x.dtype if x.is_floating_point() else torch.get_default_dtype()
            return torch.from_numpy(self.offset).to(x.device, kind), torch.from_numpy(self.scale).to(x.device, kind)
        dtype = x.dtype if np.issubdtype(x.dtype, np.floating) else np.float64
        return self.offset.astype(dtype), self.scale.astype(dtype)

    @property
    def width(self) -> int:
        """Numbers of a row, n."""
        return self.offset.size

    def to_dict(self) -> dict[str, Any]:
        """Offset and scale as plain JSON values."""
        return {"offset": self.offset.tolist(), "scale": self.scale.tolist()}


@dataclass(frozen=True)
class Discrete:
    """A finite number of actions, numbered as Gymnasium's Discrete space does; normalized they are probabilities.

    Attributes:
        n: How many, at least 1.
        start: The number of the first.

    Raises:
        ValueError: n is not a positive integer, or start not an integer.
    """

    n: int
    start: int = 0

    def __post_init__(self) -> None:
        for name in ("n", "start"):
            value = getattr(self, name)
            if np.ndim(value) or int(value) != value:
                raise ValueError(f"{name} of discrete actions must be an integer, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.n < 1:
            raise ValueError(f"there must be at least 1 discrete action, got {self.n}")

    @property
    def width(self) -> int:
        """Numbers of a row of probabilities, n."""
        return self.n

    def normalize(self, actions: NDArray[Any]) -> NDArray[np.float32]:
        """Maps action numbers (M,) to probabilities (M, n), one-hot; probabilities (M, n) are returned as they are.

        Raises:
            ValueError: they are neither, a number is not one of the actions, or probabilities are not from 0 on or do
                not add up to 1.
        """
        if actions.ndim == 2 and actions.shape[1] == self.n and actions.dtype.kind == "f":
            if not ((actions >= 0).all() and (np.abs(actions.sum(axis=1) - 1) < 1e-3).all()):
                raise ValueError(
                    "probabilities of discrete actions must not be negative or NaN, and add up to 1 (of logits take "
                    f"the softmax), got rows such as {actions[0]}"
                )
            return actions.astype(np.float32, copy=False)
        if actions.ndim != 1 or actions.dtype.kind not in "iu":
            raise ValueError(
                f"discrete actions are integers (M,), or probabilities (M, {self.n}); got {actions.dtype} of shape "
                f"{actions.shape}"
            )
        places = actions.astype(np.int64) - self.start
        if ((places < 0) | (places >= self.n)).any():
            raise ValueError(
                f"discrete actions must be numbers from {self.start} to {self.start + self.n - 1}, got "
                f"{actions.min()} to {actions.max()}"
            )
        probabilities = np.zeros((len(actions), self.n), dtype=np.float32)
        probabilities[np.arange(len(actions)), places] = 1
        return probabilities

    def denormalize(self, probabilities: Array) -> Array:
        """Returns probabilities (…, n) as they are: a synthetic set shows and keeps them."""
        return probabilities

    def chosen(self, outputs: Tensor) -> Tensor:
        """The numbers (…,) int64 of the most probable actions, by probabilities or logits (…, n); numbers stay."""
        return outputs.argmax(dim=-1) + self.start if outputs.is_floating_point() else outputs.long()

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {"n": self.n, "start": self.start}


@dataclass(frozen=True)
class Units:
    """The units of an environment: how its states, actions and returns are normalized, and which one it is.

    Attributes:
        states: to mean 0 and about unit deviation, (D,).
        actions: the environment's bounds to [−1, 1], (A,), or its `Discrete` actions; None where they are not known.
        returns: the random policy's return to 0, the expert's to 100; None where they are not known.
        env_id: Gymnasium id, such as "Hopper-v5", or "module:Env-v0" where a module registers it, or None.
        env_spec: the environment as it was recorded, with arguments, wrappers and time limit: Gymnasium's JSON of its
            EnvSpec without entry points. None: it is the one registered under the id.

    Raises:
        ValueError: the specification is of another id.
    """

    states: Affine
    actions: Affine | Discrete | None = None
    returns: Affine | None = None
    env_id: str | None = None
    env_spec: str | None = None

    def __post_init__(self) -> None:
        if self.env_spec is not None and json.loads(self.env_spec)["id"] != (self.env_id or "").rpartition(":")[2]:
            raise ValueError(
                f"the recorded environment is not {self.env_id!r}: give env_spec=None beside another env_id, or its own"
            )

    @property
    def head(self) -> str:
        """What policies in these units make of their last layer: "softmax" of discrete actions, "tanh" of others."""
        return "softmax" if isinstance(self.actions, Discrete) else "tanh"

    def require_actions(self) -> Affine | Discrete:
        """The map of the actions. Raises ValueError where the bounds are not known."""
        if self.actions is None:
            raise ValueError(
                "the environment's action bounds are not known, because the dataset does not say them and its actions "
                "leave [-1, 1]: give them as action_low and action_high, load_dataset({..., 'action_low': low, "
                "'action_high': high}), or hold them in the file under these names"
            )
        return self.actions

    @property
    def action_bounds(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(low, high), each (A,) float32. Raises ValueError where they are not known, or the actions are discrete."""
        actions = self.require_actions()
        if isinstance(actions, Discrete):
            raise ValueError(
                f"{actions.n} discrete actions have no bounds: this needs an environment with a Box of actions"
            )
        low, high = actions.bounds
        return low.astype(np.float32), high.astype(np.float32)

    def returns_in(self, env_id: str) -> Affine | None:
        """The map of the returns in an environment: these units' own in theirs, D4RL's by its name in another."""
        own = self.env_id is not None and _family(self.env_id) == _family(env_id)
        return self.returns if own and self.returns else d4rl_returns(env_id)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, which hold every bit."""
        maps = {name: getattr(self, name) for name in ("states", "actions", "returns")}
        values = {**{name: map_ and map_.to_dict() for name, map_ in maps.items()}, "env_id": self.env_id}
        return values if self.env_spec is None else {**values, "env_spec": self.env_spec}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Units:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError for something else."""
        maps = {name: values[name] and Affine(**values[name]) for name in ("states", "returns")}
        actions = values["actions"]
        maps["actions"] = actions and (Discrete if "n" in actions else Affine)(**actions)
        return cls(**maps, env_id=values["env_id"], env_spec=values.get("env_spec"))


def d4rl_scores(env_id: str | None) -> tuple[float, float] | None:
    """D4RL's (random, expert) returns for a Gymnasium id of any version, or None where D4RL has none."""
    return REFERENCE_SCORES.get(_family(env_id)) if env_id else None


def d4rl_returns(env_id: str | None) -> Affine | None:
    """D4RL's map of returns for a Gymnasium id, or None."""
    scores = d4rl_scores(env_id)
    return Affine.scores(*scores) if scores else None


def _family(env_id: str) -> str:
    """What an id has in common with those of its other versions, and with it after the module that registers it."""
    return env_id.rpartition(":")[2].rsplit("-v", 1)[0]
