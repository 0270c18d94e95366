"""Columns → dataset: what any source holds, completed and checked once, constructed once.

An array that already is contiguous float32 is taken over without a copy.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sdw_fast.arrays import unmasked
from sdw_fast.data import TransitionDataset
from sdw_fast.files import room
from sdw_fast.units import Affine, Discrete, Units, d4rl_returns

_ROW_BLOCK = 16_384  # rows looked at together where a whole-array temporary would double the memory
_FEWEST_STEPS, _MOST_STEPS = 100, 200_000  # from which leaps can be told from steps; which are looked at


@dataclass
class Columns:
    """What a source holds, under Gymnasium's names, unchecked.

    Attributes:
        arrays: observations and actions; rewards, terminations, truncations, next_observations, and episode_index and
            frame_index, where it has them.
        jumps: where the source itself knows them, (rows, next observations) of the rows whose next observation is not
            the following row's; None: found by comparing next_observations, or derived without them.
        action_bounds: (low, high), or None where the source does not say them.
        discrete: how many discrete actions there are, or None where the source does not say it, or they are vectors.
        reference_scores: (random, expert) returns that the source carries.
        env_id, env_spec: the environment that the source names, as in `Units`.
        env: the environment that the caller names in its place, an `Environment`.
        name, path: as in `TransitionDataset`.
        scratch: the folder of temporary files for what must be rewritten; None: it is rewritten in memory.
    """

    arrays: dict[str, Any]
    jumps: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    action_bounds: tuple[Any, Any] | None = None
    discrete: Discrete | None = None
    reference_scores: tuple[float, float] | None = None
    env_id: str | None = None
    env_spec: str | None = None
    env: Any = None
    name: str | None = None
    path: Path | None = None
    scratch: Path | None = None


def build_dataset(columns: Columns) -> TransitionDataset:
    """Checks and completes the columns, each once, and constructs the dataset."""
    arrays = columns.arrays
    episode_ends = _in_order(arrays)
    observations = _matrix("observations", arrays.pop("observations"))
    rows = len(observations)
    actions = _actions(arrays.pop("actions"), rows)
    rewards, truncations = arrays.pop("rewards", None), arrays.pop("truncations", None)
    rewards = None if rewards is None else _column("rewards", rewards, rows, np.float32)
    terminations = _column("terminations", arrays.pop("terminations", np.zeros(rows, bool)), rows, np.bool_)
    truncations = None if truncations is None else _column("truncations", truncations, rows, np.bool_)

    jumps = columns.jumps
    following = arrays.pop("next_observations", None)
    if following is not None:
        jumps = _jumps(observations, _numeric("next_observations", following))
    if jumps is not None:
        jumps = jumps[0], _finite("next_observations", jumps[1], numbers=jumps[0])
    truncations = _ends_marked(terminations, truncations, episode_ends, None if jumps is None else jumps[0])
    if jumps is None and rewards is None:
        ends = np.flatnonzero(terminations | truncations)
        jumps = ends, observations[ends]
    if jumps is None:
        _tell_of_resets(observations, terminations | truncations)
        kept = ~(truncations & ~terminations)
        if not kept.any():
            raise ValueError("every row is a truncated end without next_observations: no transition is left")
        jumps, cut = _without_successors(observations, terminations, kept)
        truncations = (truncations | cut)[kept]
        observations = _rows(observations, kept, columns.scratch)  # one after the other: the peak is the data and one
        actions = _rows(actions, kept, columns.scratch)
        rewards, terminations = _rows(cast("np.ndarray", rewards), kept, columns.scratch), terminations[kept]
    units = _units(columns, observations, actions)
    if isinstance(units.actions, Affine):
        _tell_of_actions_beyond(actions, units.actions)
    return TransitionDataset(
        observations=observations,
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        jumps=jumps[0],
        jump_observations=jumps[1],
        units=units,
        name=columns.name,
        path=columns.path,
    )


def _in_order(arrays: dict[str, Any]) -> NDArray[np.bool_] | None:
    """Takes episode_index and frame_index out of the arrays, and sorts the others by them where they need it.

    Returns:
        The rows that end an episode, (M,): where the episode changes, or its frames do not go on by one. None where no
        episode is named.

    Raises:
        ValueError: the indices do not fit the observations.
    """
    episodes, frames = arrays.pop("episode_index", None), arrays.pop("frame_index", None)
    if episodes is None:
        return None
    rows = len(arrays["observations"])
    for name, index in (("episode_index", episodes), ("frame_index", frames)):
        if index is not None and np.shape(index) not in ((rows,), (rows, 1)):
            raise ValueError(f"{name} must have shape ({rows},) to match observations, got {np.shape(index)}")
    numbers = np.unique(np.asarray(episodes).reshape(-1), return_inverse=True)[1].reshape(-1)
    frames = None if frames is None else _column("frame_index", frames, rows, np.int64)
    apart = _apart(numbers, frames)
    if frames is not None and apart.sum() > len(np.unique(numbers)):
        order = np.lexsort((frames, numbers))
        for name in arrays:
            arrays[name] = np.asarray(arrays[name])[order]
        apart = _apart(numbers[order], frames[order])
    return apart


def _apart(episodes: np.ndarray, frames: np.ndarray | None) -> NDArray[np.bool_]:
    """The rows that the following row does not continue."""
    following = np.append(episodes[1:] == episodes[:-1], False)
    if frames is not None:
        following[:-1] &= frames[1:] == frames[:-1] + 1
    return ~following


def _ends_marked(
    terminations: np.ndarray, truncations: np.ndarray | None, ends: np.ndarray | None, jumps: np.ndarray | None
) -> NDArray[np.bool_]:
    """Truncations, with the ends that the source knows of by the episodes' index, or, without flags, by the jumps.

    The last row ends an episode in any case. Flags that leave jumps unmarked are told.
    """
    marked = np.zeros(len(terminations), bool) if truncations is None else truncations
    if ends is not None:
        marked = marked | (ends & ~terminations)
    elif truncations is None and jumps is not None:
        marked[jumps] = ~terminations[jumps]
    elif jumps is not None:
        unmarked = jumps[:-1][~(terminations | marked)[jumps[:-1]]]
        if len(unmarked):
            warnings.warn(
                f"the next observation of {len(unmarked)} of {len(marked)} rows, first of row {unmarked[0]}, is not "
                "the observation of the row that follows, and no flag ends an episode there: returns of episodes will "
                "be wrong; without truncations the ends are found there",
                stacklevel=4,
            )
    if not (terminations[-1] or marked[-1]):
        marked = marked.copy()
        marked[-1] = True
    return marked


def _tell_of_resets(observations: np.ndarray, ends: np.ndarray) -> None:
    """Warns where flags end no episode but the last, and yet the states leap as they do when an environment is reset.

    A leap is a step five times as long as all but a hundredth of the steps are, or one, three times as long as the
    median, to where the data began.
    """
    if ends[:-1].any() or len(observations) < _FEWEST_STEPS:
        return
    states = Affine.fit(observations).normalize(observations[:_MOST_STEPS])
    steps = np.linalg.norm(np.diff(states, axis=0), axis=1)
    middle, long = np.quantile(steps, [0.5, 0.99])
    back = np.linalg.norm(states[1:] - states[0], axis=1) < middle
    leaps = np.flatnonzero((steps > 5 * long) | (back & (steps > 3 * middle)))
    if len(leaps):
        warnings.warn(
            f"the flags end no episode before the last row, but the observations leap {len(leaps)} times, first after "
            f"row {leaps[0]}, as they do when an environment is reset: mark the ends (truncations, or episode_index)",
            stacklevel=4,
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
        with np.errstate(over="ignore"):  # an overflow becomes an infinity, reported with its row
            jumping[block] = (following[block].astype(np.float32, copy=False) != after).any(axis=1)
    rows = np.flatnonzero(jumping)
    return rows, following[rows]


def _without_successors(
    observations: np.ndarray, terminations: np.ndarray, kept: np.ndarray
) -> tuple[tuple[NDArray[np.int64], np.ndarray], np.ndarray]:
    """Jumps of the kept rows, and all rows cut short, where rows that nothing is known to follow are left out.

    The row before one that is left out now ends its episode, and the left-out observation follows it. After a
    termination the row's own observation stands for what is never used.
    """
    before = np.append(~kept[1:], False) & kept & ~terminations
    own = kept & terminations
    rows = np.flatnonzero(before | own)
    sources = np.where(own[rows], rows, rows + 1)
    places = np.cumsum(kept) - 1
    return (places[rows], observations[sources]), before


def _rows(array: np.ndarray, kept: NDArray[np.bool_], scratch: Path | None) -> np.ndarray:
    """The rows that are kept, in memory or in a temporary file."""
    if scratch is None:
        return array[kept]
    found, filled = room((int(kept.sum()), *array.shape[1:]), array.dtype, scratch), 0
    for start in range(0, len(array), _ROW_BLOCK):
        part = array[start : start + _ROW_BLOCK][kept[start : start + _ROW_BLOCK]]
        found[filled : filled + len(part)] = part
        filled += len(part)
    return found


def _tell_of_actions_beyond(actions: np.ndarray, scaling: Affine) -> None:
    """Warns of actions that no policy can take, beyond what rounding explains."""
    extremes = np.stack([actions.min(axis=0), actions.max(axis=0)])
    if (np.abs(scaling.normalize(extremes)) > 1 + 1e-4).any():
        low, high = scaling.bounds
        warnings.warn(
            f"the actions reach from {extremes[0]} to {extremes[1]}, beyond the bounds {low} to {high}: no policy "
            "can follow them there. Are the bounds right (action_low, action_high)?",
            stacklevel=2,
        )


def _units(columns: Columns, observations: np.ndarray, actions: np.ndarray) -> Units:
    """The units of the columns: bounds are the environment's, else the source's, else ±1 where no action is beyond."""
    stated, own, width = columns.action_bounds, columns.reference_scores, 0 if actions.ndim == 1 else actions.shape[1]
    units = Units(
        states=Affine.fit(observations),
        actions=Affine.between(*_per_action(stated, width)) if stated and width else columns.discrete,
        env_id=columns.env_id,
        env_spec=columns.env_spec,
    )
    if columns.env is not None or columns.env_id is not None:
        units = _placed(units, width, columns.env)
    returns = d4rl_returns(units.env_id) if own is None else Affine.scores(*own)
    units = dataclasses.replace(units, returns=returns)
    if width == 0 or isinstance(units.actions, Discrete):
        _check_discrete(actions, units.actions)
    elif units.actions is None and max(-actions.min(), actions.max()) <= 1:
        return dataclasses.replace(units, actions=Affine.between(np.full(width, -1.0), np.full(width, 1.0)))
    return units


def _check_discrete(actions: np.ndarray, known: Affine | Discrete | None) -> None:
    """Raises ValueError unless the actions are numbers of discrete actions that are known."""
    if actions.ndim != 1:
        raise ValueError(
            f"there are {known and known.width} discrete actions, and the dataset's are {actions.dtype} of shape "
            f"{actions.shape}: give their numbers, integers (M,)"
        )
    if not isinstance(known, Discrete):
        raise ValueError(
            "actions are integers, the numbers of discrete actions, and nothing says how many there are: give "
            "n_actions, or the env_id of an environment with a Discrete action space; or floats (M, A), if they are no "
            "such numbers"
        )
    if actions.min() < known.start or actions.max() >= known.start + known.n:
        raise ValueError(
            f"actions must be numbers from {known.start} to {known.start + known.n - 1}, as there are {known.n} "
            f"discrete actions; got {actions.min()} to {actions.max()}"
        )


def _placed(units: Units, width: int, env: Any) -> Units:
    """Units in their environment; where it cannot be made here, without what only the environment can tell."""
    from sdw_fast.environments import place

    try:
        units, reason = place(units, width, env), f"does not bound {width} actions"
    except (ImportError, ValueError) as error:
        reason = f"cannot be made here ({error})"
        if env is not None:
            units = dataclasses.replace(units, env_id=env if isinstance(env, str) else None, env_spec=None)
    if units.actions is None:
        warnings.warn(
            f"the environment {units.env_id!r} {reason}: action bounds are taken to be -1 and 1 if every action lies "
            "there; to say them, give action_low and action_high",
            stacklevel=2,
        )
    return units


def _per_action(bounds: tuple[Any, Any], width: int) -> list[np.ndarray]:
    try:
        return [np.broadcast_to(np.asarray(bound, dtype=np.float64), width) for bound in bounds]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"action_low and action_high must be numbers or ({width},) arrays, got {bounds[0]!r} and {bounds[1]!r}"
        ) from error


def _actions(values: Any, rows: int) -> np.ndarray:
    """Vectors (rows, A) float32, or, of integers, the numbers of discrete actions (rows,) int64."""
    array = _numeric("actions", values)
    if array.dtype.kind == "f":
        return _matrix("actions", array, rows)
    if array.shape not in ((rows,), (rows, 1)):
        raise ValueError(
            f"actions are {array.dtype} of shape {array.shape}: integers are the numbers of discrete actions, one a "
            f"row, ({rows},); several at once (MultiDiscrete) are not supported, and other vectors are floats"
        )
    return np.ascontiguousarray(array.reshape(rows), dtype=np.int64)


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
    array = unmasked(name, values)
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
