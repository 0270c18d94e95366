"""Readers: Minari datasets, D4RL files, `.npz` files and dicts of arrays → columns → one `TransitionDataset`.

Every source becomes `Columns`, as it holds them. They are completed and checked once, in `_dataset`, and the dataset is
constructed once. An array that already is contiguous float32 is taken over without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdw_fast.data import TransitionDataset
from sdw_fast.files import read_npz
from sdw_fast.units import Affine, Units, d4rl_returns

if TYPE_CHECKING:
    import minari

_ROW_BLOCK = 16_384  # rows looked at together where a whole-array temporary would double the memory
_METADATA_CACHE = 1 << 20  # bytes of HDF5's metadata kept while reading a Minari dataset
_REQUIRED = ("observations", "actions", "rewards", "terminations")
_OPTIONAL = ("truncations", "next_observations", "action_low", "action_high", "env_id")
_D4RL_NAMES = {"terminations": "terminals", "truncations": "timeouts"}


@dataclass
class Columns:
    """What a source holds, under Gymnasium's names, unchecked.

    Attributes:
        arrays: observations, actions, rewards, terminations, and truncations and next_observations where it has them.
        jumps: where the source itself knows them, (rows, next observations) of the rows whose next observation is not
            the following row's; None: found by comparing next_observations, or derived without them.
        action_bounds: (low, high), or None where the source does not say them.
        reference_scores: (random, expert) returns that the source carries.
        env_id, name, path: as in `TransitionDataset`.
    """

    arrays: dict[str, Any]
    jumps: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    action_bounds: tuple[Any, Any] | None = None
    reference_scores: tuple[float, float] | None = None
    env_id: str | None = None
    name: str | None = None
    path: Path | None = None


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
            following row's observation. A last row that ends no episode is marked truncated.
        env_id: Gymnasium id of the environment, where the source does not say it (D4RL files) or another is wanted; an
            .npz or a dict may also hold it under "env_id", and action bounds under "action_low" and "action_high".
            Where the source does not say the bounds they are −1 and 1 if every action lies there, else unknown, and
            such a dataset cannot be distilled.

    Raises:
        FileNotFoundError: if there is no such file or dataset.
        ValueError: on missing keys, Dict, Discrete or image spaces, wrong shapes, discrete actions, values that are not
            finite in float32, an empty dataset, or a damaged file.
        TypeError: if `source` is none of the above.
    """
    if isinstance(source, Mapping):
        columns = _from_arrays(source, "the dict of arrays")
    elif isinstance(source, (str, Path)) and Path(source).suffix in _FILE_READERS:
        path = Path(source).expanduser().absolute()
        if not path.is_file():
            raise FileNotFoundError(f"no dataset file at {path}")
        columns = _from_arrays(_FILE_READERS[path.suffix](path), path.name)
        columns.name, columns.path = path.stem, path
    elif isinstance(source, (str, Path)):
        columns = _from_minari(_open_minari(str(source)))
    elif hasattr(source, "iterate_episodes") and hasattr(source, "storage"):
        columns = _from_minari(source)
    else:
        raise TypeError(
            f"cannot load a dataset from {type(source).__name__}: expected a Minari id or dataset, a path to an .hdf5 "
            "or .npz file, or a dict of arrays"
        )
    columns.env_id = env_id or columns.env_id
    return _dataset(columns)


def _dataset(columns: Columns) -> TransitionDataset:
    """Checks and completes the columns, each once, and constructs the dataset."""
    arrays = columns.arrays
    observations = _matrix("observations", arrays.pop("observations"))
    rows = len(observations)
    actions = arrays.pop("actions")
    if np.asarray(actions).dtype.kind in "iub":
        raise ValueError(
            f"actions have dtype {np.asarray(actions).dtype}: discrete actions are not supported, behavior "
            "distillation matches continuous actions (M, A)"
        )
    actions = _matrix("actions", actions, rows)
    rewards = _column("rewards", arrays.pop("rewards"), rows, np.float32)
    terminations = _column("terminations", arrays.pop("terminations"), rows, np.bool_)
    truncations = arrays.pop("truncations", None)
    truncations = None if truncations is None else _column("truncations", truncations, rows, np.bool_)

    jumps = columns.jumps
    following = arrays.pop("next_observations", None)
    if following is not None:
        jumps = _jumps(observations, _numeric("next_observations", following))
    if truncations is None:
        assert jumps is not None  # a source has truncations or next observations
        truncations = np.zeros(rows, bool)
        truncations[jumps[0]] = ~terminations[jumps[0]]
    if not (terminations[-1] or truncations[-1]):
        truncations = truncations.copy()
        truncations[-1] = True
    if jumps is None:
        kept = ~(truncations & ~terminations)
        if not kept.any():
            raise ValueError("every row is a truncated end without next_observations: no transition is left")
        jumps, truncations = _without_successors(observations, terminations, kept)
        observations = observations[kept]  # one after the other, so that the peak is the data and one column of it
        actions = actions[kept]
        rewards, terminations = rewards[kept], terminations[kept]
    bounds = columns.action_bounds
    if bounds is None and max(-actions.min(), actions.max()) <= 1:
        bounds = -1.0, 1.0
    own = columns.reference_scores
    return TransitionDataset(
        observations=observations,
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        jumps=jumps[0],
        jump_observations=_finite("next_observations", jumps[1], numbers=jumps[0]),
        units=Units(
            states=Affine.fit(observations),
            actions=None if bounds is None else Affine.between(*_per_action(bounds, actions.shape[1])),
            returns=d4rl_returns(columns.env_id) if own is None else Affine.scores(*own),
            env_id=columns.env_id,
        ),
        name=columns.name,
        path=columns.path,
    )


def _jumps(observations: np.ndarray, following: np.ndarray) -> tuple[NDArray[np.int64], np.ndarray]:
    """The rows whose next observation is not the following row's observation, the last included, and theirs."""
    if following.shape != observations.shape:
        raise ValueError(
            f"next_observations must have shape {observations.shape} to match observations, got {following.shape}"
        )
    jumping = np.ones(len(observations), bool)
    for start in range(0, len(observations) - 1, _ROW_BLOCK):
        block = slice(start, min(start + _ROW_BLOCK, len(observations) - 1))
        after = observations[block.start + 1 : block.stop + 1]
        jumping[block] = (following[block].astype(np.float32, copy=False) != after).any(axis=1)
    rows = np.flatnonzero(jumping)
    return rows, following[rows]


def _without_successors(
    observations: np.ndarray, terminations: np.ndarray, kept: np.ndarray
) -> tuple[tuple[NDArray[np.int64], np.ndarray], np.ndarray]:
    """Jumps and truncations of the kept rows where truncated rows are left out, as nothing is known to follow them.

    The row before one that is left out now ends its episode, and the left-out observation follows it. After a
    termination the row's own observation stands for what is never used.
    """
    before = np.append(~kept[1:], False) & kept & ~terminations
    own = kept & terminations
    rows = np.flatnonzero(before | own)
    sources = np.where(own[rows], rows, rows + 1)
    places = np.cumsum(kept) - 1
    return (places[rows], observations[sources]), before[kept]


def _per_action(bounds: tuple[Any, Any], width: int) -> list[np.ndarray]:
    try:
        return [np.broadcast_to(np.asarray(bound, dtype=np.float32), width) for bound in bounds]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"action_low and action_high must be numbers or ({width},) arrays, got {bounds[0]!r} and {bounds[1]!r}"
        ) from error


def _matrix(name: str, values: Any, rows: int | None = None, width: int | None = None) -> NDArray[np.float32]:
    """Checks and converts to contiguous finite float32 (rows, width)."""
    array = _numeric(name, values)
    if array.ndim != 2:
        hint = "; encode images to vectors first" if array.ndim > 2 else ""
        raise ValueError(f"{name} must have shape (M, dim), got {array.shape}{hint}")
    if array.shape[1] == 0:
        raise ValueError(f"{name} has no columns: shape {array.shape}")
    if rows is None and array.shape[0] == 0:
        raise ValueError(f"the dataset is empty: {name} has no rows")
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


def _finite(name: str, array: np.ndarray, *, numbers: np.ndarray | None = None) -> NDArray[np.float32]:
    """Contiguous float32, or the error in it; `numbers` are the dataset's rows that the array's rows belong to."""
    with np.errstate(over="ignore"):  # an overflow becomes an infinity, reported below with its row
        array = np.ascontiguousarray(array, dtype=np.float32)
    for start in range(0, len(array), _ROW_BLOCK):
        finite = np.isfinite(array[start : start + _ROW_BLOCK])
        if not finite.all():
            row = start + int(np.argmin(finite.reshape(len(finite), -1).all(axis=1)))
            number = row if numbers is None else numbers[row]
            raise ValueError(
                f"{name} has a value that is NaN or infinite in float32, first in row {number}: {array[row]}"
            )
    return array


def _from_arrays(arrays: Mapping[str, Any], where: str) -> Columns:
    """Columns of arrays under Gymnasium's or D4RL's names."""
    found = {}
    for name in (*_REQUIRED, *_OPTIONAL):
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
    low, high = found.pop("action_low", None), found.pop("action_high", None)
    if (low is None) != (high is None):
        raise ValueError(f"{where}: action bounds need both action_low and action_high, got one of them")
    env_id = str(np.asarray(found.pop("env_id"))) if "env_id" in found else None
    return Columns(found, action_bounds=None if low is None else (low, high), env_id=env_id)


def _read_hdf5(path: Path) -> dict[str, Any]:
    """Reads the known arrays of a D4RL file; HDF5 converts to float32 on the way, without a second copy."""
    wanted = (*_REQUIRED, *_OPTIONAL, *_D4RL_NAMES.values())
    with _open_hdf5(path) as file:
        arrays: dict[str, Any] = {}
        for key, item in file.items():
            if key not in wanted or key == "env_id":
                arrays[key] = None  # for the message that lists what the file holds
            elif not hasattr(item, "shape"):
                raise ValueError(f"{path.name}: {key} is a group (a Dict space); only vectors are supported")
            else:
                dtype = np.float32 if item.dtype.kind == "f" else item.dtype
                arrays[key] = np.empty(item.shape, dtype)
                if item.size:
                    item.read_direct(arrays[key])
        arrays.pop("env_id", None)
        return arrays


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        return read_npz(path)
    except Exception as error:  # zipfile, zlib and numpy each raise their own on a damaged file
        hint = "save arrays of numbers, not of objects" if "pickle" in str(error) else "damaged or truncated?"
        raise ValueError(f"cannot read {path} as an .npz file ({hint}): {error}") from error


_FILE_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".hdf5": _read_hdf5,
    ".h5": _read_hdf5,
    ".npz": _read_npz,
}


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


def _from_minari(dataset: minari.MinariDataset) -> Columns:
    """Copies every selected episode into columns allocated once: the peak is the columns plus one episode."""
    for kind, space in (("observation", dataset.observation_space), ("action", dataset.action_space)):
        if type(space).__name__ != "Box" or len(space.shape) != 1:
            raise ValueError(
                f"Minari dataset {dataset.id!r} has {kind} space {space}; only one-dimensional Box spaces are "
                "supported (flatten Dict spaces and encode images first; discrete actions have no matching loss here)"
            )
    total, width = int(dataset.total_steps), dataset.observation_space.shape[0]
    observations = np.empty((total, width), np.float32)
    actions = np.empty((total, dataset.action_space.shape[0]), np.float32)
    rewards = np.empty(total, np.float32)
    terminations, truncations = np.empty(total, bool), np.empty(total, bool)
    ends, last_observations = [], []
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
        observations[rows], actions[rows], rewards[rows] = states[:-1], acts, rews
        terminations[rows], truncations[rows] = terminated, truncated
        start += steps
        if steps:
            ends.append(start - 1)
            last_observations.append(states[-1])
            truncations[start - 1] |= not terminated[-1]  # an episode is over where its record is
    if start != total:
        raise ValueError(f"Minari dataset {dataset.id!r} holds {start} steps, but its metadata say {total}")
    metadata = dataset.storage.metadata
    random, expert = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    low, high = dataset.action_space.low, dataset.action_space.high
    bounded = np.isfinite(low).all() and np.isfinite(high).all()
    return Columns(
        {
            "observations": observations,
            "actions": actions,
            "rewards": rewards,
            "terminations": terminations,
            "truncations": truncations,
        },
        jumps=(np.array(ends, dtype=np.int64), np.array(last_observations, np.float32).reshape(-1, width)),
        action_bounds=(low, high) if bounded else None,
        reference_scores=None if random is None or expert is None else (float(random), float(expert)),
        env_id=dataset.env_spec.id if dataset.env_spec else None,
        name=dataset.id,
        path=Path(dataset.storage.data_path).parent,
    )


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
