"""Space cut into parts of about as many states each: one a rank, or one after another where memory holds no more.

A search of the parts is exact: a state finds its neighbors in its own part, and then is asked of those other parts that
its ball crosses, as wide as its k-th distance so far (after PANDA; Patwary et al. 2016, arXiv 1607.08220).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdw_fast.ops._knn_native import NeighborIndex
from sdw_fast.progress import progress_bar

SAMPLE_ROWS = 1 << 16  # of all states, by which space is cut
PART_ROWS = 8_000_000  # states searched together by one process: for 17 columns and k = 10 some 2.5 GB
_BLOCK_ROWS = 1 << 20  # states looked at together
_CACHED_ROWS = 1 << 14  # whose projections and what is made of them stay in the cache

Take = Callable[[Any], Tensor]  # states (n, D) by their rows, a slice or (n,) int64


class Parts:
    """Space cut into parts, by medians of a sample along the principal axis in which it varies most.

    Args:
        sample: (n, D) float64.
        count: of parts.
        frame: `principal_frame` of a sample, the same wherever the cuts are to be the same.
    """

    def __init__(self, sample: Tensor, count: int, frame: tuple[Tensor, Tensor]) -> None:
        self.count = count
        self._center, self._axes = frame
        self._root = self._cut((sample - self._center) @ self._axes, 0, count)

    def _cut(self, sample: Tensor, first: int, last: int) -> Any:
        """The number of a part, `first`, or (axis, value, parts below it, the others)."""
        if last - first == 1:
            return first
        middle = (first + last) // 2
        if not len(sample):
            return 0, 0.0, self._cut(sample, first, middle), self._cut(sample, middle, last)
        axis = int((sample - sample.mean(0)).square().sum(0).argmax())
        value = float(sample[:, axis].quantile((middle - first) / (last - first)))
        below = sample[:, axis] < value
        return axis, value, self._cut(sample[below], first, middle), self._cut(sample[~below], middle, last)

    def project(self, points: Tensor) -> Tensor:
        """(m, D) coordinates in which space is cut, of the points' dtype; distances are the points', to rounding."""
        axes, center = self._axes.to(points), (self._center @ self._axes).to(points)
        return torch.addmm(center, points, axes, beta=-1)

    def owner_of(self, projected: Tensor) -> Tensor:
        """The part in which every point lies, (m,)."""
        owner = torch.zeros(len(projected), dtype=torch.int64, device=projected.device)
        # No function that calls itself: it would refer to itself, and keep the projections until the next collection.
        todo = [(self._root, torch.arange(len(projected), device=projected.device))]
        while todo:
            part, rows = todo.pop()
            if isinstance(part, int):
                owner[rows] = part
            else:
                axis, value, lower, upper = part
                below = projected[rows, axis] < value
                todo += [(lower, rows[below]), (upper, rows[~below])]
        return owner


def sampled(points: Tensor, total: int) -> Tensor:
    """Those of the points that are in a sample of SAMPLE_ROWS of all."""
    return points[:: max(1, total // SAMPLE_ROWS)]


def principal_frame(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Center (D,) and principal axes (D, D) of a float64 sample. Their last bits depend on the LAPACK."""
    center = sample.mean(0)
    return center, torch.linalg.eigh((sample - center).T @ (sample - center)).eigenvectors


def crosses(projected: Tensor, reach: Tensor, box: tuple[Tensor, Tensor], magnitude: float) -> Tensor:
    """Whether the balls of squared radius `reach` (m,) around points (m, D) cross a box, (m,) bool.

    All are projected (see `Parts.project`) from points whose largest coordinate is `magnitude`. Where rounding leaves
    it open, they cross: a projection of D columns is off by at most 2 (D + 2) √D unit roundoffs of the magnitude in
    each of its columns, and so are the two ends of a gap.
    """
    low, high = (end.to(projected.device).double() for end in box)
    dims, unit = projected.shape[1], torch.finfo(projected.dtype).eps
    reach = reach.sqrt() * (1 + 1e-6) + 4 * (dims + 2) * dims * unit * magnitude

    def gaps(part: Tensor) -> Tensor:  # in float64, where squares do not overflow; of what is not finite NaN
        return torch.maximum(low - part, part - high).clamp_(min=0).norm(dim=1)

    parts = zip(projected.split(_CACHED_ROWS), reach.split(_CACHED_ROWS), strict=True)
    return torch.cat([~(gaps(part.double()) > radius) for part, radius in parts])


def self_join_in_parts(take: Take, rows: int, k: int, *, progress: bool = False) -> Tensor:
    """Distances of every state to its k nearest others, (rows, k) float32, as `sdw_fast.ops.knn` gives them.

    No more than the states of a part are held, with their tree and their answers, and k + 2 numbers of every state.

    Args:
        take: gives states, float32 and finite, on the CPU.
        rows: how many there are, more than k.
        k: neighbors.
        progress: show a bar.
    """
    sample = take(np.arange(0, rows, max(1, rows // SAMPLE_ROWS))).double()
    parts = Parts(sample, -(-rows // PART_ROWS), principal_frame(sample))
    owner, boxes, magnitude = _shared_out(parts, take, rows)
    members = [(owner == part).nonzero()[:, 0] for part in range(len(boxes))]
    distances = torch.full((rows, k), torch.inf)
    with progress_bar(total=2 * len(boxes), desc="neighbors", unit="part", show=progress) as bar:
        for own in members:
            if len(own) > 1:
                nearest = min(k, len(own) - 1)
                for row, squared, _ in NeighborIndex(take(own.numpy()), magnitude).self_join_portions(nearest):
                    distances[own[row], :nearest] = squared.sqrt_().float()
            bar.update()
        for part, own in enumerate(members):
            if len(own):
                _look_in(part, take, own, parts, owner, boxes[part], magnitude, distances)
            bar.update()
    return distances


def _look_in(
    part: int,
    take: Take,
    own: Tensor,
    parts: Parts,
    owner: Tensor,
    box: tuple[Tensor, Tensor],
    magnitude: float,
    distances: Tensor,
) -> None:
    """Puts nearer neighbors that lie in a part into the distances of the states outside it."""
    index, k = NeighborIndex(take(own.numpy()), magnitude), distances.shape[1]
    for block in _blocks(len(owner)):
        points = take(block)
        reach = (distances[block, -1].double() * (1 + 1e-6)).square()  # no less than what float32 has rounded
        asked = (owner[block] != part) & crosses(parts.project(points), reach, box, magnitude)
        rows = asked.nonzero()[:, 0]
        if not len(rows):
            continue
        squared, _ = index.within(points[rows], min(k, len(own)), reach[rows])
        both = torch.cat([distances[rows + block.start], squared.sqrt_().float()], 1)
        distances[rows + block.start] = both.sort(dim=1).values[:, :k]


def _shared_out(parts: Parts, take: Take, rows: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]], float]:
    """The part of every state, (rows,) int16, the projected box of every part's, and the largest coordinate."""
    owner, magnitude = torch.empty(rows, dtype=torch.int16), 0.0
    first = take(slice(0, 1))
    low, high = (first.new_full((parts.count, first.shape[1]), end) for end in (torch.inf, -torch.inf))
    for block in _blocks(rows):
        points = take(block)
        magnitude = max(magnitude, float(points.abs().max()))
        projected = parts.project(points)
        found = parts.owner_of(projected)
        owner[block] = found.short()
        places = found[:, None].expand_as(projected)
        low.scatter_reduce_(0, places, projected, "amin")
        high.scatter_reduce_(0, places, projected, "amax")
    return owner, list(zip(low, high, strict=True)), magnitude


def _blocks(rows: int) -> Iterator[slice]:
    """Slices of _BLOCK_ROWS that together are all rows."""
    for start in range(0, rows, _BLOCK_ROWS):
        yield slice(start, min(start + _BLOCK_ROWS, rows))
