"""Readers: Minari datasets, D4RL files, `.npz` files, tables and arrays → columns → one `TransitionDataset`."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdw_fast.columns import Columns, build_dataset
from sdw_fast.data import TransitionDataset
from sdw_fast.files import check_memory, damage_named, read_folder, read_npz, reading, room, unsealed
from sdw_fast.tables import episodes_of, join_episodes, known_names, lacks, read_table, select, table_of
from sdw_fast.units import Discrete

if TYPE_CHECKING:
    import minari

    from sdw_fast.environments import Environment

METADATA, EPISODES = Path("data/metadata.json"), Path("data/main_data.hdf5")  # of a Minari dataset's folder
_METADATA_CACHE = 1 << 20  # bytes of HDF5's metadata kept while reading a Minari dataset


def load_dataset(
    source: Any,
    *,
    env_id: Environment | None = None,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    mapped: bool = False,
) -> TransitionDataset:
    """Loads an offline RL dataset.

    Args:
        source: one of
            a Minari id ("mujoco/hopper/medium-v0"), local or else downloaded; the ids of `collect` may drop their
            "sdw/" and "-v0" ("hopper/medium");
            a Minari dataset object, of which only the episodes it selects are read;
            a D4RL-style file (.hdf5, .h5) or an .npz file;
            a folder of .npy files, one a column, named as it: memory maps, whatever their size;
            a table: a .parquet, .csv or .arrow file, a pyarrow or pandas table, a Hugging Face or LeRobot dataset
            (`pip install "sdw_fast[tables]"`);
            a dict of arrays;
            a list of episodes, or an object that holds one as d3rlpy's datasets do: dicts or objects of observations
            (T, D) or (T + 1, D), actions (T, A) and maybe rewards (T,), and whether the episode terminated.
            All hold observations (M, D) and actions (M, A), or integers (M,) where these are discrete, and, to train a
            teacher on, rewards (M,), terminations or terminals (M,), truncations or timeouts (M,); they may hold
            next_observations (M, D). Without next observations they are the following row's; at a truncated end nothing
            is known to follow, so that row is left out and its predecessor marked truncated (D4RL's own rule). Without
            truncations they are found where a next observation is not the following row's observation, or where
            episode_index changes or frame_index does not go on by one; rows out of order are sorted by the two. A last
            row that ends no episode is marked truncated. Observations and actions alone are demonstrations: every pair
            is kept.
        env_id: the environment, where the source does not say it (D4RL files) or another is wanted: a Gymnasium id
            ("Hopper-v5", or "module:Env-v0" to import the module first), an EnvSpec, an environment, or a function
            that makes one. Its id and its EnvSpec are kept with the data. A Minari dataset says its own, with
            arguments, wrappers and time limit, and the one to evaluate in comes first; a file or a dict may hold an id
            under "env_id".
            Action bounds are the environment's, if it is known and can be made here, with a warning where the source
            says others (a file or a dict under "action_low" and "action_high"); else the source's; else −1 and 1 if
            every action lies there, else unknown, and such a dataset cannot be distilled. How many discrete actions
            there are is said by the environment, too, or under "n_actions".
        columns: names of the source's columns where they are others: {"observations": "state", "actions": ["u", "v"]}.
            A list stands for columns side by side, a name also for those numbered under it (state_0, state_1, …).
        mapped: the arrays of a Minari dataset or a D4RL-style file, too, are memory maps: of temporary files beside it,
            as large as the arrays and gone with them (docs/scale.md).

    Raises:
        FileNotFoundError: if there is no such file or dataset.
        ImportError: if a table's file is read without pyarrow.
        ValueError: on missing keys, Dict or image spaces, wrong shapes, discrete actions of unknown number, values
            that are not finite in float32, an empty dataset, or a damaged file.
        OSError: if there is no room for the temporary files.
        TypeError: if `source` is none of the above.
    """
    is_path = isinstance(source, (str, Path))
    if isinstance(source, Mapping):
        held = _from_arrays(source, "the dict of arrays", columns)
    elif is_path and (folder := Path(source).expanduser().absolute()).is_dir() and any(folder.glob("*.npy")):
        with damage_named(folder, "folder of .npy files"):
            arrays = read_folder(folder, known_names(columns))
        held = _from_arrays(arrays, folder.name, columns)
        held.name, held.path, held.scratch = folder.name, folder, folder
    elif is_path and Path(source).suffix in _FILE_READERS:
        path = Path(source).expanduser().absolute()
        if not path.is_file():
            raise FileNotFoundError(f"no dataset file at {path}")
        scratch = path.parent if mapped else None
        held = _from_arrays(_FILE_READERS[path.suffix](path, columns, scratch), path.name, columns)
        held.name, held.path, held.scratch = path.stem, path, scratch
    elif is_path or (hasattr(source, "iterate_episodes") and hasattr(source, "storage")):
        if columns is not None:
            raise ValueError("a Minari dataset names its columns itself; columns is for tables, files and arrays")
        held = _from_minari(_open_minari(str(source)) if is_path else source, mapped)
    elif (table := table_of(source)) is not None:
        held = _from_arrays(table, f"the {type(source).__name__}", columns)
    elif (episodes := episodes_of(source)) is not None:
        arrays, jumps = join_episodes(episodes, columns)
        held = _from_arrays(arrays, "the list of episodes")
        held.jumps = jumps
    else:
        raise TypeError(
            f"cannot load a dataset from {type(source).__name__}: expected a Minari id or dataset, a path to an .hdf5, "
            ".npz, .parquet, .csv or .arrow file or to a folder of .npy files, a dict of arrays, a table, or a list of "
            "episodes"
        )
    held.env = env_id
    try:
        return build_dataset(held)
    except ValueError as error:
        if held.path is None:
            raise
        raise ValueError(f"{held.path}: {error}") from error


def _from_arrays(arrays: Mapping[str, Any], where: str, columns: Mapping[str, Any] | None = None) -> Columns:
    """Columns of arrays under their usual names, or those that `columns` says."""
    found = select(arrays, where, columns)
    needed = ["observations", "actions"]
    if "rewards" in found and "episode_index" not in found:
        needed += ["terminations"] if "next_observations" in found else ["terminations", "truncations"]
    if sentence := lacks(found, needed, arrays, where):
        raise ValueError(sentence)
    low, high = found.pop("action_low", None), found.pop("action_high", None)
    if (low is None) != (high is None):
        raise ValueError(f"{where}: action bounds need both action_low and action_high, got one of them")
    env_id = np.asarray(found.pop("env_id")).item() if "env_id" in found else None
    env_id = env_id.decode() if isinstance(env_id, bytes) else env_id
    if env_id is not None and not isinstance(env_id, str):
        raise ValueError(f"{where}: env_id must be a Gymnasium id such as 'Hopper-v5', got {env_id!r}")
    bounds = None if low is None else (low, high)
    n = found.pop("n_actions", None)
    return Columns(found, action_bounds=bounds, discrete=None if n is None else Discrete(n), env_id=env_id)


def _read_hdf5(path: Path, columns: Mapping[str, Any] | None, scratch: Path | None) -> dict[str, Any]:
    """Reads the known arrays of a D4RL file; HDF5 converts to float32 on the way, without a second copy.

    A column may lie in a group: columns={"observations": "data/states"}.
    """
    import h5py

    wanted = known_names(columns)
    with reading(path, "HDF5 file"), h5py.File(path, "r") as file:
        arrays: dict[str, Any] = {}
        size = 0
        for key in {**dict.fromkeys(file), **{name: None for name in wanted if name in file}}:
            if key not in wanted:
                arrays[key] = None  # for the message that lists what the file holds
                continue
            item = file[key]
            if not hasattr(item, "shape"):
                raise ValueError(f"{key} is a group (a Dict space); only vectors are supported")
            _refuse_foreign(item.id, path)
            size += item.nbytes
            if scratch is None:
                check_memory(size)
            dtype = np.float32 if item.dtype.kind == "f" else item.dtype
            if key == "env_id":
                arrays[key] = item[()]
                continue
            arrays[key] = room(item.shape, dtype, scratch)
            if item.size:
                item.read_direct(arrays[key])
        return arrays


def _refuse_foreign(stored: Any, path: Path) -> None:
    """Raises ValueError where an HDF5 dataset's numbers lie in another file: behind a link, mapped, or stored there."""
    import h5py

    if h5py.h5f.get_name(stored) == os.fsencode(path):
        if stored.get_offset() is not None:  # one piece of this file: the usual case, found out quickly
            return
        created = stored.get_create_plist()
        if created.get_layout() != h5py.h5d.VIRTUAL and not created.get_external_count():
            return
    name = h5py.h5i.get_name(stored).decode(errors="replace")
    raise ValueError(f"the numbers of {name} lie in another file (a link or a virtual dataset), which is not followed")


def _read_npz(path: Path, _: Any, scratch: Path | None) -> dict[str, Any]:
    _refuse_maps(path, scratch)
    with reading(path, ".npz file"):
        return read_npz(path)


def _read_table(path: Path, _: Any, scratch: Path | None) -> Mapping[str, Any]:
    _refuse_maps(path, scratch)
    return read_table(path)


def _refuse_maps(path: Path, scratch: Path | None) -> None:
    if scratch is not None:
        raise ValueError(
            f"mapped=True takes Minari datasets, .hdf5 files and folders of .npy files, not {path.name}: write its "
            "columns as .npy files to a folder"
        )


_FILE_READERS: dict[str, Callable[[Path, Mapping[str, Any] | None, Path | None], Mapping[str, Any]]] = {
    **dict.fromkeys((".hdf5", ".h5"), _read_hdf5),
    ".npz": _read_npz,
    **dict.fromkeys((".parquet", ".csv", ".arrow", ".feather"), _read_table),
}


def _open_minari(dataset_id: str) -> minari.MinariDataset:
    """Finds a Minari dataset: this id, then the locomotion suite's short form of it, then a download."""
    import minari

    suite_id = f"sdw/{dataset_id}" if dataset_id.rsplit("-v", 1)[-1].isdigit() else f"sdw/{dataset_id}-v0"
    for candidate in (dataset_id, suite_id):
        with contextlib.suppress(FileNotFoundError), damage_named(candidate, "Minari dataset", FileNotFoundError):
            _check_seal(candidate)
            return minari.load_dataset(candidate)
    try:
        return minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # no network, no such dataset, not an id: each backend raises its own kind
        raise FileNotFoundError(
            f"no dataset {dataset_id!r}: not a file, not among the local Minari datasets "
            f"({', '.join(minari.list_local_datasets()) or 'there are none'}), and the download failed ({error}). "
            "`sdw-fast collect hopper/medium` makes one of the locomotion suite"
        ) from error


def _check_seal(dataset_id: str) -> None:
    """Raises ValueError where a local Minari dataset that `collect` made is not as it left it. Others have no seal."""
    from minari.storage.datasets_root_dir import get_dataset_path

    folder = get_dataset_path(dataset_id)
    if (folder / METADATA).is_file():
        metadata = json.loads((folder / METADATA).read_text())
        if "checksum" in metadata:
            unsealed(metadata, folder / EPISODES)


def _from_minari(dataset: minari.MinariDataset, mapped: bool) -> Columns:
    """Copies every selected episode into columns allocated once: the peak is the columns plus one episode."""
    for kind, space in (("observation", dataset.observation_space), ("action", dataset.action_space)):
        vector = type(space).__name__ == "Box" and len(space.shape) == 1
        if not vector and (kind, type(space).__name__) != ("action", "Discrete"):
            raise ValueError(
                f"Minari dataset {dataset.id!r} has {kind} space {space}; observations must be a one-dimensional Box, "
                "and actions one, or Discrete (flatten Dict spaces and encode images first)"
            )
    with damage_named(dataset.id, "Minari dataset", ValueError):
        return _columns_of(dataset, mapped)


def _columns_of(dataset: minari.MinariDataset, mapped: bool) -> Columns:
    total, width = int(dataset.total_steps), dataset.observation_space.shape[0]
    space = dataset.action_space
    discrete = Discrete(space.n, space.start) if type(space).__name__ == "Discrete" else None
    folder = Path(dataset.storage.data_path).parent
    scratch = folder if mapped else None
    if not mapped:
        with damage_named(dataset.id, "Minari dataset"):
            check_memory(4 * total * (width + (2 if discrete else space.shape[0]) + 1))
    observations = room((total, width), np.float32, scratch)
    actions = room((total, *space.shape), np.int64 if discrete else np.float32, scratch)
    rewards, terminations, truncations = (room((total,), kind, scratch) for kind in (np.float32, bool, bool))
    ends, last_observations = [], []
    start = 0
    for index, (states, acts, rews, terminated, truncated) in zip(
        dataset.episode_indices, _minari_episodes(dataset), strict=True
    ):
        steps = len(rews)
        rows = slice(start, start + steps)
        shapes = [array.shape for array in (states, acts, rews, terminated, truncated)]
        expected = [(steps + 1, width), (steps, *space.shape), (steps,), (steps,), (steps,)]
        if shapes != expected or start + steps > total:
            raise ValueError(
                f"Minari dataset {dataset.id!r}, episode {index}: its arrays have shapes {shapes}, expected {expected} "
                f"(one observation more than rewards) and {total} steps in all; the dataset is damaged"
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
    bounded = discrete is None and np.isfinite(space.low).all() and np.isfinite(space.high).all()
    return Columns(
        {
            "observations": observations,
            "actions": actions,
            "rewards": rewards,
            "terminations": terminations,
            "truncations": truncations,
        },
        jumps=(np.array(ends, dtype=np.int64), np.array(last_observations, np.float32).reshape(-1, width)),
        action_bounds=(space.low, space.high) if bounded else None,
        discrete=discrete,
        reference_scores=None if random is None or expert is None else (float(random), float(expert)),
        **_recorded_environment(metadata),
        name=dataset.id,
        path=folder,
        scratch=scratch,
    )


def _recorded_environment(metadata: Mapping[str, Any]) -> dict[str, str | None]:
    """The environment of a Minari dataset: the one to evaluate in, or else the one that it was recorded in."""
    text = metadata.get("eval_env_spec") or metadata.get("env_spec")
    if text is None:
        return {}
    from sdw_fast.environments import specification

    return {"env_id": json.loads(text)["id"], "env_spec": specification(text)}


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
        _refuse_foreign(stored, path)
        size = math.prod(stored.shape) * stored.dtype.itemsize
        if size > stored.get_storage_size():  # compressed, or never written
            check_memory(size)
        array = np.empty(stored.shape, stored.dtype)
        stored.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
        return array

    with reading(path, "HDF5 file"):
        file = h5py.File(path, "r")
    with file:
        config = file.id.get_mdc_config()  # else the cache of metadata, each read once, grows with the episodes
        config.set_initial_size, config.initial_size = True, _METADATA_CACHE
        config.min_size = config.max_size = _METADATA_CACHE
        file.id.set_mdc_config(config)
        for index in indices:
            with damage_named(f"episode {index} in {path}", "part of an HDF5 file"):
                arrays = tuple(read(f"episode_{index}/{key}") for key in keys)
            yield arrays
