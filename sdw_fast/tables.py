"""Tables and lists of episodes, as other libraries hold them → arrays under Gymnasium's names.

Tables are pyarrow's, pandas' and Hugging Face's objects, and parquet, csv and arrow files, which pyarrow reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdw_fast.files import check_memory, reading

# Each column with the names that it goes by: Gymnasium's first, then D4RL's, LeRobot's and imitation's.
NAMES: dict[str, tuple[str, ...]] = {
    "observations": ("observations", "observation.state", "obs"),
    "actions": ("actions", "action", "acts"),
    "rewards": ("rewards", "next.reward", "rews"),
    "terminations": ("terminations", "terminals", "terminated", "next.done", "terminal"),
    "truncations": ("truncations", "timeouts", "truncated"),
    "next_observations": ("next_observations",),
    "episode_index": ("episode_index",),
    "frame_index": ("frame_index",),
    "action_low": ("action_low",),
    "action_high": ("action_high",),
    "n_actions": ("n_actions",),
    "env_id": ("env_id",),
}
_FLAGS = ("terminations", "truncations")
_VECTORS = ("observations", "actions", "next_observations")
_OF_THE_WHOLE = ("action_low", "action_high", "n_actions", "env_id", "episode_index", "frame_index")
Columns = Mapping[str, str | Sequence[str]]  # which of the source's columns each of ours is


def select(arrays: Mapping[str, Any], where: str, columns: Columns | None = None) -> dict[str, Any]:
    """The known columns of a source, under their first names; `columns` says others.

    A name also stands for numbered columns (`obs_0`, `obs_1`, …), and a list of names for the columns side by side.

    Raises:
        ValueError: a column of `columns` is none of ours, or not in the source; columns do not fit side by side.
    """
    columns = columns or {}
    unknown = sorted(set(columns) - set(NAMES))
    if unknown:
        raise ValueError(f"columns names {unknown}, which a dataset does not have; it has {list(NAMES)}")
    found = {}
    for name, aliases in NAMES.items():
        for wanted in [columns[name]] if name in columns else aliases:
            value = _value(name, arrays, wanted)
            if value is not None:
                found[name] = value
                break
        else:
            if name in columns:
                raise ValueError(f"{where} has no column {columns[name]!r} for {name}. It holds: {_listed(arrays)}")
    return found


def known_names(columns: Columns | None) -> set[str]:
    """Every name that a column goes by, or that `columns` says it does."""
    others = [[names] if isinstance(names, str) else names for names in (columns or {}).values()]
    return {name for names in (*NAMES.values(), *others) for name in names}


def lacks(found: Mapping[str, Any], needed: Sequence[str], arrays: Mapping[str, Any], where: str) -> str | None:
    """A sentence that says what a source lacks, or None."""
    missing = [f"{n} (or {NAMES[n][1]})" if n in _FLAGS else n for n in needed if n not in found]
    if not missing:
        return None
    beside = "; truncations can be left out only beside next_observations or episode_index"
    note = beside if "truncations" in set(needed) - set(found) else ""
    return (
        f"{where} lacks {', '.join(missing)}{note}. It holds: {_listed(arrays)}. Columns of other names are said by "
        "load_dataset(source, columns={'observations': name, …})"
    )


def _listed(arrays: Mapping[str, Any]) -> str:
    keys = list(map(str, arrays))
    return ", ".join(keys[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "") or "nothing"


def _value(name: str, arrays: Mapping[str, Any], wanted: str | Sequence[str]) -> Any:
    """What a source holds under a name, under names listed or numbered, side by side; None where it has none."""
    if isinstance(wanted, str):
        if arrays.get(wanted) is not None:
            value = _converted(name, arrays[wanted])
            one = _is_column(arrays[wanted]) and name in _VECTORS and value.ndim == 1 and value.dtype.kind == "f"
            return value[:, None] if one else value
        pattern = re.compile(rf"{re.escape(wanted)}[._ \[]?(\d+)\]?")
        numbers = {key: int(match[1]) for key in arrays if (match := pattern.fullmatch(str(key)))}
        wanted = sorted(numbers, key=lambda key: numbers[key])
    if not wanted or any(arrays.get(key) is None for key in wanted):
        return None
    parts = [np.asarray(_converted(name, arrays[key])) for key in wanted]
    if len({len(part) for part in parts}) > 1:
        raise ValueError(f"the columns {list(wanted)} for {name} have different numbers of rows")
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _is_column(value: Any) -> bool:
    """Whether it is a column of a table: pyarrow's, or pandas'."""
    return hasattr(value, "to_pylist") or hasattr(value, "iloc")


def _converted(name: str, column: Any) -> Any:
    """A column of a table as an array; anything else as it is."""
    if hasattr(column, "to_pylist"):
        return _of_arrow(name, column.combine_chunks() if hasattr(column, "combine_chunks") else column)
    if not hasattr(column, "iloc"):
        return column
    array = column.to_numpy()
    if array.dtype != object or not len(array) or np.ndim(array[0]) == 0:
        return array
    if len({np.shape(row) for row in array}) > 1:
        raise ValueError(f"{name} has rows of different lengths; every row must be a vector of the same numbers")
    return np.stack(list(map(np.asarray, array)))


def _of_arrow(name: str, column: Any) -> np.ndarray:
    """An arrow array of numbers, or of lists of them, of any depth."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = getattr(column, "storage", column)  # Hugging Face's own types
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) > 1 or lengths == [None]:
        raise ValueError(f"{name} has rows of different lengths; every row must be a vector of the same numbers")
    inner = _of_arrow(name, column.flatten())
    return inner.reshape(len(column), *(lengths or [0]), *inner.shape[1:])


# --- objects ----------------------------------------------------------------------------------------------------------


def table_of(source: Any) -> Mapping[str, Any] | None:
    """The columns of a table by their names, or None of something else."""
    source = getattr(source, "hf_dataset", source)  # a LeRobotDataset holds one of Hugging Face's
    if hasattr(source, "with_format") and hasattr(source, "column_names"):
        source = source.with_format("arrow")[:]
    if hasattr(source, "column_names") and hasattr(source, "column"):
        return {name: source.column(name) for name in source.column_names}
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        return {str(name): source[name] for name in source.columns}
    return None


def episodes_of(source: Any) -> list[Any] | None:
    """The episodes of a list, or of an object that holds one (d3rlpy's datasets), or None of something else."""
    source = getattr(source, "episodes", source)
    return list(source) if isinstance(source, (list, tuple)) and len(source) else None


def join_episodes(
    episodes: Sequence[Any], columns: Columns | None = None
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray] | None]:
    """Arrays of all episodes one after another, and, where each holds one observation more than actions, the jumps.

    An episode is a dict, or an object with attributes, of observations (T, D) or (T + 1, D), actions (T, A), and maybe
    rewards (T,); whether it terminated is a flag, or flags (T,). Every episode is over where its record is.

    Raises:
        ValueError: an episode lacks what others have, or its arrays do not fit each other.
    """
    parts: list[dict[str, Any]] = []
    jumps: list[tuple[int, np.ndarray]] = []
    start = 0
    for number, episode in enumerate(episodes):
        values = dict(episode) if isinstance(episode, Mapping) else _attributes(episode, columns)
        where = f"episode {number}"
        found = select(values, where, columns)
        if sentence := lacks(found, ("observations", "actions"), values, where):
            raise ValueError(sentence)
        for name in _VECTORS:
            if isinstance(found.get(name), Mapping):
                raise ValueError(f"{where}: {name} is a dict: concatenate its parts to one vector first")
        arrays = {name: np.asarray(found[name]) for name in found if name not in _OF_THE_WHOLE}
        steps = len(arrays["actions"])
        if not steps:
            continue
        if len(arrays["observations"]) == steps + 1:
            jumps.append((start + steps - 1, arrays["observations"][-1]))
            arrays["observations"] = arrays["observations"][:-1]
        ends = np.arange(steps) == steps - 1
        for name in _FLAGS:
            flag = np.asarray(arrays.pop(name, False))
            arrays[name] = ends & bool(flag) if flag.size == 1 else flag.reshape(-1)
        arrays["truncations"] = arrays["truncations"] | (ends & ~arrays["terminations"].astype(bool))
        wrong = {name: len(array) for name, array in arrays.items() if len(array) != steps}
        if wrong:
            raise ValueError(f"{where} has {steps} actions, and these many rows of others: {wrong}")
        parts.append(arrays)
        start += steps
    if len({frozenset(arrays) for arrays in parts}) > 1 or len(jumps) not in (0, len(parts)):
        raise ValueError("some episodes hold what others do not (rewards, or an observation more than actions)")
    joined = {name: np.concatenate([arrays[name] for arrays in parts]) for name in (parts[0] if parts else ())}
    if not jumps:
        return joined, None
    return joined, (np.array([row for row, _ in jumps]), np.stack([state for _, state in jumps]))


def _attributes(episode: Any, columns: Columns | None) -> dict[str, Any]:
    """An object's attributes under the names that a dataset's columns go by."""
    return {name: getattr(episode, name) for name in known_names(columns) if hasattr(episode, name)}


# --- files ------------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> dict[str, Any]:
    """The columns of a parquet, csv, arrow or feather file.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: the file is damaged.
    """
    try:
        import pyarrow as pa
        from pyarrow import csv, parquet
    except ImportError as error:
        raise ImportError(f'reading {path.suffix} files needs pyarrow: pip install "sdw_fast[tables]"') from error

    def read_arrow(name: str) -> Any:
        try:
            return pa.ipc.open_file(name).read_all()
        except pa.ArrowInvalid:  # Hugging Face writes streams
            return pa.ipc.open_stream(name).read_all()

    readers: dict[str, Callable[[str], Any]] = {".parquet": parquet.read_table, ".csv": csv.read_csv}
    check_memory(path.stat().st_size if path.is_file() else 0)
    with reading(path, f"{path.suffix} file"):
        table = readers.get(path.suffix, read_arrow)(str(path))
    return {name: table.column(name) for name in table.column_names}
