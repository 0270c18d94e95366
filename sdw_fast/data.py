"""Offline RL data: Minari datasets, D4RL files, .npz files and plain arrays, all as one `TransitionDataset`."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch

if TYPE_CHECKING:
    import minari

Array = TypeVar("Array", np.ndarray, torch.Tensor)

# Returns of a uniformly random policy and of an expert, from D4RL (Fu et al., arXiv 2004.07219).
REFERENCE_SCORES: dict[str, tuple[float, float]] = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
}

_SCALE_FLOOR = 1e-3  # added to the standard deviation, as D4RL code does: a constant column stays finite
_ROW_BLOCK = 16_384  # rows looked at together where a whole-array temporary would double the memory
_METADATA_CACHE = 1 << 20  # bytes of HDF5's metadata kept while reading a Minari dataset
_REQUIRED = ("observations", "actions", "rewards", "terminations")
_D4RL_NAMES = {"terminations": "terminals", "truncations": "timeouts"}


@dataclass(frozen=True)
class Normalizer:
    """An affine map of states to zero mean and about unit scale: (x − mean) / scale.

    Attributes:
        mean: (D,) float32.
        scale: (D,) float32, positive; `fit` sets it to the standard deviation + 1e-3.
    """

    mean: np.ndarray
    scale: np.ndarray

    def __post_init__(self) -> None:
        for name in ("mean", "scale"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=np.float32))
        if self.mean.ndim != 1 or self.mean.shape != self.scale.shape:
            raise ValueError(f"mean and scale must both have shape (D,), got {self.mean.shape} and {self.scale.shape}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError("mean must be finite, and scale finite and positive")

    @classmethod
    def fit(cls, observations: np.ndarray) -> Normalizer:
        """Fits mean and standard deviation + 1e-3 to observations (M, D), accumulated in float64."""
        mean = observations.mean(axis=0, dtype=np.float64)
        squares = np.zeros_like(mean)
        for start in range(0, len(observations), _ROW_BLOCK):
            centered = observations[start : start + _ROW_BLOCK] - mean
            squares += np.einsum("ij,ij->j", centered, centered)
        return cls(mean, np.sqrt(squares / len(observations)) + _SCALE_FLOOR)

    def normalize(self, x: Array) -> Array:
        """Maps x (..., D) in environment units to normalized units; NumPy array or tensor, same type, dtype, device."""
        mean, scale = self._constants(x)
        y = x - mean
        y /= scale
        return cast("Array", y)

    def denormalize(self, x: Array) -> Array:
        """Maps x (..., D) in normalized units back to environment units; the inverse of `normalize`."""
        mean, scale = self._constants(x)
        y = x * scale
        y += mean
        return cast("Array", y)

    def _constants(self, x: np.ndarray | torch.Tensor) -> tuple[Any, Any]:
        if x.shape[-1:] != self.mean.shape:
            raise ValueError(f"expected observations of {len(self.mean)} numbers, got shape {tuple(x.shape)}")
        if isinstance(x, torch.Tensor):
            return torch.from_numpy(self.mean).to(x), torch.from_numpy(self.scale).to(x)
        if np.issubdtype(x.dtype, np.floating):
            return self.mean.astype(x.dtype, copy=False), self.scale.astype(x.dtype, copy=False)
        return self.mean, self.scale


@dataclass(eq=False)
class TransitionDataset:
    """Transitions (s, a, r, s') of whole episodes, one after another, in environment units.

    An episode ends at a row whose termination or truncation is set. A last row that sets neither is marked truncated:
    every row belongs to an episode that ends.

    Attributes:
        observations: (M, D) float32.
        actions: (M, A) float32.
        rewards: (M,) float32.
        terminations: (M,) bool, true ends of an episode (nothing follows).
        truncations: (M,) bool, episodes cut short, by a time limit or by the end of the data.
        next_observations: (M, D) float32, or None where the source cannot tell.
        env_id: Gymnasium id, such as "Hopper-v5", or None.
        name: where the data came from, for people.
        normalizer: the affine map that the package optimizes and measures in; fitted to the observations if not given.
        reference_scores: (random, expert) returns that the dataset itself carries, else None.
        path: the folder (Minari) or file that the data came from; caches are kept beside it.
        action_low, action_high: the environment's action bounds, (A,) float32. Where the source does not say them they
            are −1 and 1 if every action lies there, else None, and such a dataset cannot be distilled.

    Raises:
        ValueError: on an empty dataset, wrong shapes, discrete actions, or values that are not finite in float32.
    """

    observations: np.ndarray = field(repr=False)
    actions: np.ndarray = field(repr=False)
    rewards: np.ndarray = field(repr=False)
    terminations: np.ndarray = field(repr=False)
    truncations: np.ndarray = field(repr=False)
    next_observations: np.ndarray | None = field(default=None, repr=False)
    env_id: str | None = None
    name: str | None = None
    normalizer: Normalizer = field(default=cast("Normalizer", None), repr=False)
    reference_scores: tuple[float, float] | None = None
    path: Path | None = None
    action_low: np.ndarray | None = field(default=None, repr=False)
    action_high: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if np.asarray(self.actions).dtype.kind in "iub":
            raise ValueError(
                f"actions have dtype {np.asarray(self.actions).dtype}: discrete actions are not supported, "
                "behavior distillation matches continuous actions (M, A)"
            )
        self.observations = _matrix("observations", self.observations)
        rows, width = self.observations.shape
        if rows == 0:
            raise ValueError("the dataset is empty: observations has no rows")
        self.actions = _matrix("actions", self.actions, rows)
        self._set_action_bounds()
        self.rewards = _column("rewards", self.rewards, rows, np.float32)
        self.terminations = _column("terminations", self.terminations, rows, np.bool_)
        self.truncations = _column("truncations", self.truncations, rows, np.bool_)
        if self.next_observations is not None:
            self.next_observations = _matrix("next_observations", self.next_observations, rows, width)
        if not (self.terminations[-1] or self.truncations[-1]):
            self.truncations = self.truncations.copy()
            self.truncations[-1] = True
        if self.normalizer is None:
            self.normalizer = Normalizer.fit(self.observations)
        elif self.normalizer.mean.shape != (width,):
            raise ValueError(f"the normalizer is for {len(self.normalizer.mean)} numbers, observations have {width}")

    def _set_action_bounds(self) -> None:
        width = self.actions.shape[1]
        if self.action_low is None and self.action_high is None:
            if max(-self.actions.min(), self.actions.max()) > 1:
                return
            self.action_low, self.action_high = np.full(width, -1.0), np.full(width, 1.0)
        if self.action_low is None or self.action_high is None:
            raise ValueError("action bounds need both action_low and action_high, got one of them")
        self.action_low, self.action_high = (
            np.array(np.broadcast_to(bound, width), dtype=np.float32) for bound in (self.action_low, self.action_high)
        )
        finite = np.isfinite(self.action_low).all() and np.isfinite(self.action_high).all()
        if not finite or (self.action_low >= self.action_high).any():
            raise ValueError(f"action bounds must be finite and low < high, got {self.action_low}, {self.action_high}")

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def action_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(action_low, action_high). Raises ValueError where they are not known."""
        if self.action_low is None or self.action_high is None:
            largest = np.abs(self.actions).max()
            raise ValueError(
                f"the actions reach {largest:.4g} and the dataset does not say the environment's action bounds: "
                "set data.action_low and data.action_high, or hold them in the file under these names"
            )
        return self.action_low, self.action_high

    @cached_property
    def normalized_observations(self) -> np.ndarray:
        """Observations (M, D) float32 in normalized units; computed once and kept."""
        return self.normalizer.normalize(self.observations)

    @cached_property
    def content_hash(self) -> str:
        """32 hexadecimal digits that name the arrays' content (shapes and bits), whatever their source."""
        digest = hashlib.blake2b(digest_size=16)
        for name in (*_REQUIRED, "truncations", "next_observations"):
            array = getattr(self, name)
            if array is not None:
                digest.update(f"{name}{array.shape}{array.dtype.str}".encode())
                digest.update(array.data)
        return digest.hexdigest()

    @property
    def episode_ends(self) -> np.ndarray:
        """Row of each episode's last transition, (E,) int64, ascending; the last is M − 1."""
        return np.flatnonzero(self.terminations | self.truncations)

    @property
    def episode_returns(self) -> np.ndarray:
        """Undiscounted return of each episode, (E,) float64."""
        starts = np.concatenate([[0], self.episode_ends[:-1] + 1])
        return np.add.reduceat(self.rewards, starts, dtype=np.float64)

    def subset(self, indices: Sequence[int] | np.ndarray | slice) -> TransitionDataset:
        """Takes rows, in the given order, as a new dataset with this one's normalizer.

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
        cut = np.append(rows[1:] != rows[:-1] + 1, True) & ~self.terminations[rows]
        return TransitionDataset(
            self.observations[rows],
            self.actions[rows],
            self.rewards[rows],
            self.terminations[rows],
            self.truncations[rows] | cut,
            None if self.next_observations is None else self.next_observations[rows],
            env_id=self.env_id,
            name=self.name,
            normalizer=self.normalizer,
            reference_scores=self.reference_scores,
            path=self.path,
            action_low=self.action_low,
            action_high=self.action_high,
        )

    def summary(self) -> dict[str, Any]:
        """Describes the dataset in plain values (JSON-serializable).

        Returns:
            name, env_id, transitions, episodes, observation_dim, action_dim, mean_episode_length, return_mean,
            return_std, return_min, return_max (over episodes, the cut ones included) and normalized_return_mean, which
            is None where neither the dataset nor D4RL gives reference scores.
        """
        returns = self.episode_returns
        scores = self.reference_scores or find_reference_scores(self.env_id)
        return {
            "name": self.name,
            "env_id": self.env_id,
            "transitions": len(self),
            "episodes": len(returns),
            "observation_dim": self.observations.shape[1],
            "action_dim": self.actions.shape[1],
            "mean_episode_length": len(self) / len(returns),
            "return_mean": float(returns.mean()),
            "return_std": float(returns.std()),
            "return_min": float(returns.min()),
            "return_max": float(returns.max()),
            "normalized_return_mean": float(normalized_return(self.env_id, returns.mean(), scores)) if scores else None,
        }


def concatenate(datasets: Sequence[TransitionDataset]) -> TransitionDataset:
    """Joins datasets, in order, into one whose normalizer is fitted to all observations.

    Episodes stay apart, because each dataset's last row ends one. The environment id and the reference scores are kept
    where all agree; next observations are kept if every dataset has them.

    Raises:
        ValueError: if there is no dataset, or if observation or action widths differ.
    """
    if not datasets:
        raise ValueError("concatenate needs at least one dataset")
    widths = {(d.observations.shape[1], d.actions.shape[1]) for d in datasets}
    if len(widths) > 1:
        raise ValueError(f"datasets differ in (observation, action) widths: {sorted(widths)}")
    first = datasets[0]
    bounds = {
        (d.action_low.tobytes(), d.action_high.tobytes())
        for d in datasets
        if d.action_low is not None and d.action_high is not None
    }
    if len(bounds) > 1:
        raise ValueError("datasets differ in their action bounds")
    next_observations = [d.next_observations for d in datasets]
    return TransitionDataset(
        np.concatenate([d.observations for d in datasets]),
        np.concatenate([d.actions for d in datasets]),
        np.concatenate([d.rewards for d in datasets]),
        np.concatenate([d.terminations for d in datasets]),
        np.concatenate([d.truncations for d in datasets]),
        None if any(n is None for n in next_observations) else np.concatenate(cast("list", next_observations)),
        env_id=first.env_id if len({d.env_id for d in datasets}) == 1 else None,
        name=" + ".join(d.name or "unnamed" for d in datasets),
        reference_scores=first.reference_scores if len({d.reference_scores for d in datasets}) == 1 else None,
        action_low=first.action_low,
        action_high=first.action_high,
    )


def normalize_actions(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Maps actions linearly so that [low, high] becomes [−1, 1]; shape kept, float32."""
    return ((actions - (high + low) / 2) / ((high - low) / 2)).astype(np.float32, copy=False)


def denormalize_actions(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Inverse of `normalize_actions`."""
    return (actions * ((high - low) / 2) + (high + low) / 2).astype(np.float32, copy=False)


def find_reference_scores(env_id: str | None) -> tuple[float, float] | None:
    """Returns D4RL's (random, expert) returns for a Gymnasium id of any version, or None where D4RL has none."""
    return REFERENCE_SCORES.get(env_id.rsplit("-v", 1)[0]) if env_id else None


def normalized_return(
    env_id: str | None, returns: float | np.ndarray, reference_scores: tuple[float, float] | None = None
) -> np.ndarray:
    """D4RL-normalized return, 100 · (R − random) / (expert − random), of the same shape as `returns`, float64.

    Args:
        env_id: Gymnasium id; its D4RL reference scores are used where none are given.
        returns: undiscounted episode returns.
        reference_scores: (random, expert) returns that take precedence.

    Raises:
        ValueError: if there are no reference scores for the environment.
    """
    scores = reference_scores or find_reference_scores(env_id)
    if scores is None:
        raise ValueError(
            f"no reference scores for environment {env_id!r}: D4RL's are known for {', '.join(REFERENCE_SCORES)}; "
            "for others pass (random, expert) returns"
        )
    random, expert = scores
    return 100.0 * (np.asarray(returns, dtype=np.float64) - random) / (expert - random)


def load_dataset(
    source: str | Path | Mapping[str, Any] | minari.MinariDataset, *, env_id: str | None = None
) -> TransitionDataset:
    """Loads an offline RL dataset.

    Args:
        source: one of
            a Minari id ("mujoco/hopper/medium-v0"), local or else downloaded; the ids of `collect` may drop their
            "sdw/" and "-v0" ("hopper/medium");
            a Minari dataset object, of which only the episodes it selects are read;
            a D4RL-style file (.hdf5, .h5) or an .npz file;
            a dict of arrays.
            Files and dicts hold observations (M, D), actions (M, A), rewards (M,), terminations or terminals (M,),
            truncations or timeouts (M,), and may hold next_observations (M, D). Without next observations they are the
            following row's; at a truncated end nothing is known to follow, so that row is left out and its predecessor
            marked truncated (D4RL's own rule). Without truncations they are found where a next observation is not the
            following row's observation.
        env_id: Gymnasium id of the environment, where the source does not say it (D4RL files) or another is wanted; an
            .npz or a dict may also hold it under "env_id", and action bounds under "action_low" and "action_high".

    Raises:
        FileNotFoundError: if there is no such file or dataset.
        ValueError: on missing keys, Dict, Discrete or image spaces, wrong shapes, values that are not finite, an empty
            dataset, or a damaged file.
        TypeError: if `source` is none of the above.
    """
    if isinstance(source, Mapping):
        data = _from_arrays(source, "the dict of arrays")
    elif isinstance(source, (str, Path)) and Path(source).suffix in _READERS:
        path = Path(source).expanduser().absolute()
        if not path.is_file():
            raise FileNotFoundError(f"no dataset file at {path}")
        data = _from_arrays(_READERS[path.suffix](path), path.name)
        data.name, data.path = path.stem, path
    elif isinstance(source, (str, Path)):
        data = _from_minari(_open_minari(str(source)))
    elif hasattr(source, "iterate_episodes") and hasattr(source, "storage"):
        data = _from_minari(source)
    else:
        raise TypeError(
            f"cannot load a dataset from {type(source).__name__}: expected a Minari id or dataset, a path to an .hdf5 "
            "or .npz file, or a dict of arrays"
        )
    data.env_id = env_id or data.env_id
    return data


def _matrix(name: str, values: Any, rows: int | None = None, width: int | None = None) -> np.ndarray:
    """Checks and converts to contiguous finite float32 (rows, width)."""
    array = _numeric(name, values)
    if array.ndim != 2:
        hint = "; encode images to vectors first" if array.ndim > 2 else ""
        raise ValueError(f"{name} must have shape (M, dim), got {array.shape}{hint}")
    if array.shape[1] == 0:
        raise ValueError(f"{name} has no columns: shape {array.shape}")
    if rows not in (None, array.shape[0]) or width not in (None, array.shape[1]):
        expected = f"({rows}, {'dim' if width is None else width})"
        raise ValueError(f"{name} must have shape {expected} to match observations, got {array.shape}")
    return _finite(name, array)


def _column(name: str, values: Any, rows: int, dtype: type) -> np.ndarray:
    """Checks and converts to contiguous (rows,); a single column (rows, 1) is taken as well."""
    array = _numeric(name, values)
    if array.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"{name} must have shape ({rows},) to match observations, got {array.shape}")
    array = array.reshape(rows)
    if array.dtype.kind == "f" or dtype is np.float32:
        array = _finite(name, array)
    return np.ascontiguousarray(array, dtype=dtype)


def _numeric(name: str, values: Any) -> np.ndarray:
    if isinstance(values, Mapping):
        raise ValueError(
            f"{name} is a dict: Dict spaces are not supported, concatenate their parts to one vector first"
        )
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be an array of numbers, got dtype {array.dtype}")
    return array


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # an overflow becomes an infinity, reported below with its row
        array = np.ascontiguousarray(array, dtype=np.float32)
    for start in range(0, len(array), _ROW_BLOCK):
        finite = np.isfinite(array[start : start + _ROW_BLOCK])
        if not finite.all():
            row = start + int(np.argmin(finite.reshape(len(finite), -1).all(axis=1)))
            raise ValueError(f"{name} has a value that is NaN or infinite in float32, first in row {row}: {array[row]}")
    return array


def _from_arrays(arrays: Mapping[str, Any], where: str) -> TransitionDataset:
    """Builds a dataset from arrays under Gymnasium's or D4RL's names, and completes what can be derived."""
    found = {}
    for name in (*_REQUIRED, "truncations", "next_observations", "env_id", "action_low", "action_high"):
        key = name if name in arrays else _D4RL_NAMES.get(name, name)
        if key in arrays:
            found[name] = arrays[key]
    needed = _REQUIRED if "next_observations" in found else (*_REQUIRED, "truncations")
    missing = [f"{n} (or {_D4RL_NAMES[n]})" if n in _D4RL_NAMES else n for n in needed if n not in found]
    if missing:
        keys = list(arrays)
        held = ", ".join(map(str, keys[:12])) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "")
        note = "; truncations can be left out only beside next_observations" if "truncations" not in found else ""
        raise ValueError(f"{where} lacks {', '.join(missing)}{note}. It holds: {held or 'nothing'}")
    env_id = str(np.asarray(found.pop("env_id"))) if "env_id" in found else None
    derive_truncations = "truncations" not in found
    if derive_truncations:
        found["truncations"] = np.zeros(len(found["rewards"]), dtype=bool)
    data = TransitionDataset(**found, env_id=env_id)
    if derive_truncations and data.next_observations is not None:
        jumps = (data.next_observations[:-1] != data.observations[1:]).any(axis=1)
        data.truncations[:-1] = jumps & ~data.terminations[:-1]
    return data if data.next_observations is not None else _with_next_observations(data)


def _with_next_observations(data: TransitionDataset) -> TransitionDataset:
    """Takes the following row's observation; leaves out truncated rows, whose next observation is in no row.

    What follows a termination is never used (its value is zero), so such a row keeps its own observation there.
    """
    following = np.empty_like(data.observations)
    following[:-1] = data.observations[1:]
    following[data.terminations] = data.observations[data.terminations]
    dropped = data.truncations & ~data.terminations
    if dropped.all():
        raise ValueError("every row is a truncated end without next_observations: no transition is left")
    ends = np.append(dropped[1:], False) & ~data.terminations  # the row before a dropped one now ends its episode
    keep = ~dropped
    return TransitionDataset(
        data.observations[keep],
        data.actions[keep],
        data.rewards[keep],
        data.terminations[keep],
        (data.truncations | ends)[keep],
        following[keep],
        env_id=data.env_id,
        action_low=data.action_low,
        action_high=data.action_high,
    )


def _read_hdf5(path: Path) -> dict[str, Any]:
    """Reads the known arrays of a D4RL file; HDF5 converts to float32 on the way, without a second copy."""
    wanted = (*_REQUIRED, "truncations", "next_observations", "action_low", "action_high", *_D4RL_NAMES.values())
    with _open_hdf5(path) as file:
        arrays: dict[str, Any] = {}
        for key, item in file.items():
            if key not in wanted:
                arrays[key] = None  # for the message that lists what the file holds
            elif not hasattr(item, "shape"):
                raise ValueError(f"{path.name}: {key} is a group (a Dict space); only vectors are supported")
            else:
                dtype = np.float32 if item.dtype.kind == "f" else item.dtype
                arrays[key] = np.empty(item.shape, dtype)
                if item.size:
                    item.read_direct(arrays[key])
        return arrays


def _read_npz(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file (damaged or truncated?)")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"cannot read {path} (damaged or truncated?): {error}") from error
    except ValueError as error:
        raise ValueError(f"cannot read {path}: save arrays of numbers, not of objects ({error})") from error


_READERS = {".hdf5": _read_hdf5, ".h5": _read_hdf5, ".npz": _read_npz}


def _open_hdf5(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"cannot read {path} as an HDF5 file (damaged or truncated?): {error}") from error


def _open_minari(dataset_id: str) -> minari.MinariDataset:
    """Finds a Minari dataset: this id, then the locomotion suite's short form of it, then a download."""
    import minari

    suite_id = f"sdw/{dataset_id}" if dataset_id.rsplit("-v", 1)[-1].isdigit() else f"sdw/{dataset_id}-v0"
    for candidate in (dataset_id, suite_id):
        try:
            return minari.load_dataset(candidate)
        except FileNotFoundError:
            continue
    try:
        return minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # no network, no such dataset, not an id: each backend raises its own kind
        raise FileNotFoundError(
            f"no dataset {dataset_id!r}: not a file, not among the local Minari datasets "
            f"({', '.join(minari.list_local_datasets()) or 'there are none'}), and the download failed ({error}). "
            "`sdw-fast collect hopper/medium` makes one of the locomotion suite"
        ) from error


def _from_minari(dataset: minari.MinariDataset) -> TransitionDataset:
    """Copies every selected episode into arrays allocated once: the peak is the arrays plus one episode."""
    for kind, space in (("observation", dataset.observation_space), ("action", dataset.action_space)):
        if type(space).__name__ != "Box" or len(space.shape) != 1:
            raise ValueError(
                f"Minari dataset {dataset.id!r} has {kind} space {space}; only one-dimensional Box spaces are "
                "supported (flatten Dict spaces and encode images first; discrete actions have no matching loss here)"
            )
    total = int(dataset.total_steps)
    width, action_width = dataset.observation_space.shape[0], dataset.action_space.shape[0]
    observations = np.empty((total, width), np.float32)
    next_observations = np.empty((total, width), np.float32)
    actions = np.empty((total, action_width), np.float32)
    rewards = np.empty(total, np.float32)
    terminations = np.empty(total, bool)
    truncations = np.empty(total, bool)
    start = 0
    for index, (states, acts, rews, terminated, truncated) in zip(
        dataset.episode_indices, _minari_episodes(dataset), strict=True
    ):
        steps = len(rews)
        rows = slice(start, start + steps)
        if len(states) != steps + 1 or start + steps > total:
            raise ValueError(
                f"Minari dataset {dataset.id!r}, episode {index}: {len(states)} observations and {steps} rewards, "
                f"expected one observation more than rewards and {total} steps in all; the dataset is damaged"
            )
        observations[rows], next_observations[rows] = states[:-1], states[1:]
        actions[rows], rewards[rows] = acts, rews
        terminations[rows], truncations[rows] = terminated, truncated
        if steps and not terminated[-1]:  # an episode is over where its record is
            truncations[start + steps - 1] = True
        start += steps
    if start != total:
        raise ValueError(f"Minari dataset {dataset.id!r} holds {start} steps, but its metadata say {total}")
    metadata = dataset.storage.metadata
    random, expert = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return TransitionDataset(
        observations,
        actions,
        rewards,
        terminations,
        truncations,
        next_observations,
        env_id=dataset.env_spec.id if dataset.env_spec else None,
        name=dataset.id,
        reference_scores=None if random is None or expert is None else (float(random), float(expert)),
        path=Path(dataset.storage.data_path).parent,
        **_bounds(dataset.action_space),
    )


def _bounds(space: Any) -> dict[str, Any]:
    bounded = np.isfinite(space.low).all() and np.isfinite(space.high).all()
    return {"action_low": space.low, "action_high": space.high} if bounded else {}


def _minari_episodes(dataset: minari.MinariDataset) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields (observations, actions, rewards, terminations, truncations) of each selected episode."""
    keys = ("observations", "actions", "rewards", "terminations", "truncations")
    if dataset.storage.FORMAT == "hdf5":
        yield from _hdf5_episodes(Path(dataset.storage.data_path) / "main_data.hdf5", dataset.episode_indices, keys)
    else:
        for episode in dataset.iterate_episodes():
            yield tuple(np.asarray(getattr(episode, key)) for key in keys)


def _hdf5_episodes(path: Path, indices: Iterable[int], keys: Sequence[str]) -> Iterator[tuple[np.ndarray, ...]]:
    """Reads episodes through h5py's low-level interface: a dataset of 5,000 episodes is 25,000 small reads."""
    import h5py

    def read(name: str) -> np.ndarray:
        stored = h5py.h5d.open(file.id, name.encode())
        array = np.empty(stored.shape, stored.dtype)
        stored.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
        return array

    with _open_hdf5(path) as file:
        config = file.id.get_mdc_config()  # else the cache of metadata, each read once, grows with the episodes
        config.set_initial_size, config.initial_size = True, _METADATA_CACHE
        config.min_size = config.max_size = _METADATA_CACHE
        file.id.set_mdc_config(config)
        for index in indices:
            try:
                yield tuple(read(f"episode_{index}/{key}") for key in keys)
            except (KeyError, OSError) as error:
                raise ValueError(f"{path}: cannot read episode {index} (damaged or truncated?): {error}") from error
