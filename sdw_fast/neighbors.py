"""Distances of states to their nearest neighbors, which densities and measures of diversity are made of.

States become tensors once, at the door (`states_of`), and are worked on where they lie; results go back as the kind
that was given (`like`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdw_fast import ops, parts
from sdw_fast.arrays import real_numbers, tensor_of
from sdw_fast.config import checked_seed
from sdw_fast.data import TransitionDataset
from sdw_fast.files import computed_once
from sdw_fast.progress import progress_bar

States = np.ndarray | Tensor
Reduce = Callable[[Tensor, str], Tensor]  # a tensor and "sum" or "min": that over all ranks, see `sdw_fast.distributed`


def here(values: Tensor, operation: str) -> Tensor:
    """The sum or minimum over the only rank."""
    return values


def states_of(observations: States, name: str) -> Tensor:
    """(M, D) floating point on the device it came on, every number as it was given; an array is not copied.

    Raises:
        TypeError, ValueError: as `real_numbers`.
        ValueError: wrong shape, NaN or infinite values.
    """
    numbers = real_numbers(name, observations)
    states = numbers if isinstance(numbers, Tensor) else tensor_of(numbers)
    if states.ndim != 2 or 0 in states.shape:
        raise ValueError(f"{name} must have shape (M, D) with M, D >= 1, got {tuple(states.shape)}")
    finite = states.isfinite().all(dim=1)
    if not bool(finite.all()):
        rows = (~finite).nonzero()[:, 0]
        raise ValueError(f"{name}: {len(rows)} rows have NaN or infinite values, the first is row {int(rows[0])}")
    return states


def like(values: Tensor, given: States) -> States:
    """Values of the kind that was given: an array for an array."""
    return values if isinstance(given, Tensor) else values.numpy()


def neighbor_distances(
    states: Tensor,
    k: int,
    references: int | States | None = None,
    *,
    seed: int = 0,
    backend: str = "auto",
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Distances to the k nearest neighbors, own row left out, and how many states were searched.

    Args:
        states: (M, D).
        k: neighbors.
        references: the states searched. None: the states. A number R: a random subset of them, without replacement,
            each member left out of its own neighborhood. (R, D) states: those; nothing is left out.
        seed: of the random subset.
        backend: of `sdw_fast.ops.knn`.
        progress: show a bar.

    Returns:
        (M, k) float32, ascending, and an int64 scalar, or (M,) where only some of the states are references.

    Raises:
        ValueError: k or R out of range, widths differ, or an approximate backend found too few.
        TypeError: k is not an integer.
    """
    count = len(states)
    if references is None:
        _check_k(k, count - 1, "the other observations")
        distances, _ = _knn(states, None, k, backend, progress)
        searched = torch.tensor(count - 1)
    elif isinstance(references, int | np.integer):
        rows = _reference_rows(count, int(references), seed).to(states.device)
        _check_k(k, len(rows) - 1, "references besides the state itself")
        distances, indices = _knn(states, states[rows], k + 1, backend, progress)
        distances, searched = _without_self(distances, indices, rows)
    else:
        others = states_of(references, "references")
        if others.shape[1] != states.shape[1]:
            raise ValueError(f"observations have {states.shape[1]} columns, references {others.shape[1]}")
        _check_k(k, len(others), "references")
        distances, _ = _knn(states, others, k, backend, progress)
        searched = torch.tensor(len(others))
    if not bool(distances.isfinite().all()):
        raise ValueError(f"backend {backend!r} is approximate and found fewer than k = {k} neighbors of some states")
    return distances, searched


def dataset_neighbor_distances(
    data: TransitionDataset,
    k: int,
    references: int | None = None,
    *,
    seed: int = 0,
    backend: str = "auto",
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """`neighbor_distances` of a dataset's normalized states, computed once where the dataset has a folder.

    Of more than `parts.PART_ROWS` they are searched in parts, so that memory needs to hold no more than one.
    """
    if references is not None and not isinstance(references, int | np.integer):
        raise TypeError(f"references of a dataset's log-density must be a number, got {type(references).__name__}")

    def states_in(part: Any) -> Tensor:
        return torch.from_numpy(data.units.states.normalize(data.observations[part]))

    def compute() -> dict[str, np.ndarray]:
        if references is None and backend in ("auto", "native") and rows > parts.PART_ROWS:
            _check_k(k, rows - 1, "the other observations")
            own = parts.self_join_in_parts(states_in, rows, k, progress=progress)
            return {"distances": own.numpy(), "searched": np.array(rows - 1)}
        states = states_in(slice(None))
        found = neighbor_distances(states, k, references, seed=seed, backend=backend, progress=progress)
        return {"distances": found[0].numpy(), "searched": found[1].numpy()}

    options = f"k={k} references={references} seed={seed if references else None} backend={backend}"
    rows = len(data)
    shapes: dict[str, tuple[int, ...]] = {"distances": (rows, k), "searched": () if references is None else (rows,)}
    found = computed_once(data.path, f"knn {data.content_hash} {options}", compute, shapes)
    return torch.from_numpy(found["distances"]), torch.from_numpy(found["searched"])


def varying_columns(states: Tensor) -> int:
    """Columns that are not constant: a constant one has no part in any distance, so it is no dimension either."""
    return max(1, int((states.amax(0) != states.amin(0)).sum()))


def intrinsic_dimension(distances: Tensor, total: Reduce = here) -> float:
    """The Levina-Bickel estimate with MacKay-Ghahramani averaging, from (M, k) ascending distances."""
    if distances.shape[1] < 2:
        raise ValueError("the intrinsic dimension needs k >= 2 neighbors, got k = 1")
    distinct = distances[distances[:, 0] > 0].double()
    log_ratio = distinct[:, -1:].log() - distinct[:, :-1].log()
    count, added = total(torch.tensor([log_ratio.numel(), log_ratio.sum()], dtype=torch.float64), "sum").tolist()
    if count == 0:
        raise ValueError("no state without a duplicate: the intrinsic dimension cannot be estimated")
    if added == 0:
        raise ValueError("all neighbor distances are equal: the intrinsic dimension cannot be estimated")
    return 1 / (added / count)


def floored_radius(distances: Tensor, total: Reduce = here) -> Tensor:
    """Distances to the last neighbor, float64, with half the smallest positive one in place of zeros."""
    radius = distances[:, -1].double()
    positive = torch.cat([radius[radius > 0], radius.new_full((1,), torch.inf)])  # never empty
    smallest = float(total(positive.amin(), "min"))
    if smallest == math.inf:
        raise ValueError(
            "every state has k or more exact duplicates, so every neighbor distance is zero: "
            "remove duplicates (numpy.unique(observations, axis=0)) or raise k"
        )
    return radius.clamp(min=smallest / 2)


def _knn(queries: Tensor, references: Tensor | None, k: int, backend: str, progress: bool) -> tuple[Tensor, Tensor]:
    """`ops.knn` with a progress bar."""
    with progress_bar(total=len(queries), desc="neighbors", unit="state", unit_scale=True, show=progress) as bar:
        return ops.knn(queries, references, k=k, backend=backend, progress=lambda done, _: bar.update(done - bar.n))


def _reference_rows(count: int, references: int, seed: int) -> Tensor:
    """Sorted rows of a random subset, drawn without replacement."""
    if not 2 <= references <= count:
        raise ValueError(f"references must lie between 2 and the number of observations, {count}, got {references}")
    rng = np.random.default_rng(checked_seed("seed", seed))
    return torch.from_numpy(np.sort(rng.choice(count, references, replace=False)))


def _without_self(distances: Tensor, indices: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Drops one of k + 1 neighbors of every state: itself where it is a reference, the farthest elsewhere.

    A state with k duplicates of lower index may not be among its own neighbors; the farthest is dropped there too,
    as all of the k + 1 distances are zero.
    """
    own = torch.full_like(indices[:, 0], -1)
    own[rows] = torch.arange(len(rows), device=own.device)
    drop = indices == own[:, None]  # (M, k + 1)
    drop[~drop.any(1), -1] = True
    searched = len(rows) - (own >= 0).long()
    return distances[~drop].reshape(len(distances), -1), searched


def _check_k(k: Any, available: int, what: str) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be an integer, got {k!r}")
    if not 1 <= k <= available:
        raise ValueError(f"k must lie between 1 and {available} (the number of {what}), got {k}")
