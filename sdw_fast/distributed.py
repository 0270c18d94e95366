"""Work over the ranks of `torch.distributed`: exact neighbors of rows that no machine holds all of.

Start a script with `torchrun`, open the group by `with process_group():`, and give every rank rows of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sdw_fast.density import log_density_at
from sdw_fast.neighbors import States, like, states_of
from sdw_fast.ops._knn_native import NeighborIndex
from sdw_fast.parts import Parts, crosses, principal_frame, sampled
from sdw_fast.ranks import Ranks, process_group

__all__ = ["Traffic", "knn", "knn_log_density", "process_group"]


@dataclass(frozen=True)
class Traffic:
    """What a search sent from this rank to others.

    Attributes:
        rows: rows of the data moved to the rank that owns their part of space.
        queries: queries sent on to another rank, counted once a rank.
        share: of this rank's queries, those that were sent to any other rank.
        bytes: sent in all.
    """

    rows: int
    queries: int
    share: float
    bytes: int


def knn(
    rows: States, *, k: int, group: dist.ProcessGroup | None = None, traffic: list[Traffic] | None = None
) -> tuple[States, States]:
    """Exact k nearest neighbors of this rank's rows among the rows of all ranks, each row itself left out.

    Rows are numbered through the ranks in rank order. Space is cut into as many boxes as there are ranks, by medians of
    a sample; every row moves to the rank of its box and finds its neighbors there; then only those queries travel whose
    ball, as wide as their k-th distance so far, crosses the box of another rank (PANDA; Patwary et al. 2016, arXiv
    1607.08220). No rank ever holds all rows. The answer is that of `sdw_fast.ops.knn` on the rows of all ranks.

    Args:
        rows: (m, D) float32 or float64 array or tensor, finite, any number of rows on a rank, 0 included; the dtype is
            the same on all ranks.
        k: neighbors, 1 to the number of rows of all ranks − 1.
        group: process group; None: all ranks.
        traffic: a list to which what was sent is appended.

    Returns:
        distances (m, k) float32, ascending, not squared; indices (m, k) int64 through the ranks. Of the kind of `rows`.

    Raises:
        RuntimeError: no process group is initialized.
        ValueError, TypeError: rows or k are not as said, on any rank: raised on all of them.
    """
    distances, indices, _, _ = _neighbors(Ranks(group), rows, k, traffic)
    return like(distances, rows), like(indices, rows)


def knn_log_density(
    rows: States, k: int = 10, *, dimension: str | float = "ambient", group: dist.ProcessGroup | None = None
) -> States:
    """k-nearest-neighbor log-density of this rank's rows among the rows of all ranks.

    Equation, arguments, returns and errors as `sdw_fast.density.knn_log_density`, of which it is the value on the rows
    of all ranks; "intrinsic" is the same up to rounding.
    """
    ranks = Ranks(group)
    distances, _, points, total = _neighbors(ranks, rows, k)
    low, high = _box_of(ranks, points)
    columns = max(1, int((low != high).sum()))
    return like(log_density_at(distances, total - 1, columns, dimension, ranks.reduce), rows)


def _neighbors(
    ranks: Ranks, rows: States, k: int, traffic: list[Traffic] | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Distances (m, k) float32 and numbers (m, k) of this rank's rows, these as a tensor, and how many all ranks have.

    Raises:
        ValueError, TypeError: as `knn`, on all ranks.
    """
    points, k = ranks.together(lambda: _checked(rows, k))
    points, counts, magnitude = _agree_on(ranks, points, k)
    squared, numbers = _search(ranks, points, k, counts, magnitude, traffic)
    return squared.sqrt().float(), numbers, points, sum(counts)


def _checked(rows: States, k: int) -> tuple[Tensor, int]:
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    if getattr(rows, "ndim", 2) == 2 and len(rows) == 0 and rows.shape[1]:
        points = torch.as_tensor(rows)  # a rank without rows takes part all the same
    else:
        points = states_of(rows, "rows")
    return (points if points.dtype == torch.float64 else points.float()).contiguous(), int(k)


def _search(
    ranks: Ranks, points: Tensor, k: int, counts: list[int], magnitude: float, traffic: list[Traffic] | None
) -> tuple[Tensor, Tensor]:
    """Squared distances (m, k) float64 and numbers (m, k) of this rank's rows."""
    sample = torch.cat(ranks.gather(sampled(points, sum(counts)).double().cpu()))
    parts = Parts(sample, ranks.size, ranks.gather(principal_frame(sample))[0])
    owner = parts.owner_of(parts.project(points))
    order = owner.argsort(stable=True)
    numbers = order + sum(counts[: ranks.rank])
    leaving = owner.bincount(minlength=ranks.size).tolist()
    # Ranks in order and rows in order within a rank: what arrives is in the order of its numbers, so that here, too,
    # equal distances come by index.
    (held, numbers), arrived = ranks.exchange([points[order], numbers], leaving)
    own = _Shard(held, numbers, magnitude)
    squared, found = own.self_join(k)
    asked = _asked(ranks, parts.project(held), squared[:, -1], magnitude)
    squared, found = _answered(ranks, own, squared, found, asked)
    (squared, found), _ = ranks.exchange([squared, found], arrived)
    if traffic is not None:
        moved, travelled = len(points) - leaving[ranks.rank], torch.cat(asked)
        share = len(travelled.unique()) / max(1, len(held))
        traffic.append(Traffic(rows=moved, queries=len(travelled), share=share, bytes=ranks.sent))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return squared[back], found[back]


def _agree_on(ranks: Ranks, points: Tensor, k: int) -> tuple[Tensor, list[int], float]:
    """The points, the number of every rank's, and the largest coordinate of all, where the rows and k fit each other.

    A rank without rows takes those of others later: it has points of their dtype and width, and none.
    """
    largest = float(points.abs().max()) if points.numel() else 0.0
    said = ranks.gather((len(points), points.shape[1], points.dtype, k, largest))
    counts = [count for count, *_ in said]
    for what, values in (
        ("columns", {width for count, width, *_ in said if count}),
        ("dtypes", {str(kind) for count, _, kind, *_ in said if count}),
        ("values of k", {neighbors for *_, neighbors, _ in said}),
    ):
        if len(values) > 1:
            raise ValueError(f"the ranks must agree, and have {what} {sorted(values)}")
    if not 1 <= k < sum(counts):
        raise ValueError(f"k must lie between 1 and {sum(counts) - 1} (the other rows of all ranks), got {k}")
    if not len(points):
        points = next(points.new_empty((0, width), dtype=kind) for count, width, kind, *_ in said if count)
    return points, counts, max(largest for *_, largest in said)


def _box_of(ranks: Ranks, points: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest coordinates of all ranks' points, (D,) each."""
    empty = points.new_full((1, points.shape[1]), torch.inf)
    low = torch.cat([points, empty]).amin(0)
    high = torch.cat([points, -empty]).amax(0)
    return ranks.reduce(low, "min"), ranks.reduce(high, "max")


class _Shard:
    """The rows of a part of space, under their numbers through the ranks."""

    def __init__(self, rows: Tensor, numbers: Tensor, magnitude: float) -> None:
        self.rows, self.numbers = rows, numbers
        self._index = NeighborIndex(rows, magnitude) if len(rows) else None

    def self_join(self, k: int) -> tuple[Tensor, Tensor]:
        """Squared distances (n, k) and numbers (n, k); infinities at −1 where the part has too few rows."""
        neighbors = min(k, len(self.rows) - 1)
        if self._index is None or neighbors < 1:
            return self._padded(None, None, len(self.rows), k)
        return self._padded(*self._index.self_join(neighbors), len(self.rows), k)

    def within(self, queries: Tensor, k: int, reach: Tensor) -> tuple[Tensor, Tensor]:
        """The same for queries, among the rows whose squared distance is at most their reach."""
        if self._index is None or not len(queries):
            return self._padded(None, None, len(queries), k)
        return self._padded(*self._index.within(queries, min(k, len(self.rows)), reach), len(queries), k)

    def _padded(self, squared: Tensor | None, found: Tensor | None, rows: int, k: int) -> tuple[Tensor, Tensor]:
        distances = torch.full((rows, k), torch.inf, dtype=torch.float64, device=self.rows.device)
        numbers = torch.full((rows, k), -1, dtype=torch.int64, device=self.rows.device)
        if squared is not None and found is not None:
            distances[:, : squared.shape[1]] = squared
            numbers[:, : found.shape[1]] = torch.where(found < 0, found, self.numbers[found.clamp(min=0)])
        return distances, numbers


def _asked(ranks: Ranks, projected: Tensor, reach: Tensor, magnitude: float) -> list[Tensor]:
    """Of each rank, the rows here whose ball of squared radius `reach` crosses the box of that rank's rows."""
    box = (projected.amin(0), projected.amax(0)) if len(projected) else None
    asked = []
    for rank, other in enumerate(ranks.gather(box)):
        if rank == ranks.rank or other is None:
            asked.append(torch.empty(0, dtype=torch.int64, device=projected.device))
        else:
            asked.append(crosses(projected, reach, other, magnitude).nonzero()[:, 0])
    return asked


def _answered(ranks: Ranks, own: _Shard, squared: Tensor, found: Tensor, asked: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The neighbors of the rows here, with what the ranks that were asked know of nearer ones."""
    k, rows = squared.shape[1], torch.cat(asked)
    (queries, reach), incoming = ranks.exchange([own.rows[rows], squared[rows, -1]], [len(part) for part in asked])
    distances, numbers = own.within(queries, k, reach)
    hits = numbers >= 0
    per_query = hits.sum(1)
    per_rank = [int(part.sum()) for part in per_query.split(incoming)]
    (per_query,), _ = ranks.exchange([per_query], incoming)
    (distances, numbers), _ = ranks.exchange([distances[hits], numbers[hits]], per_rank)
    firsts = per_query.cumsum(0) - per_query
    for part, start in zip(asked, np.cumsum([0, *map(len, asked)]).tolist(), strict=False):
        counted, first = per_query[start : start + len(part)], firsts[start : start + len(part)]
        nearer = counted > 0
        place = torch.arange(k, device=rows.device)
        holds = place < counted[nearer, None]
        at = (first[nearer, None] + place)[holds]
        more = squared.new_full(holds.shape, torch.inf), found.new_full(holds.shape, -1)
        more[0][holds], more[1][holds] = distances[at], numbers[at]
        these = part[nearer]
        squared[these], found[these] = _merged(squared[these], found[these], *more)
    return squared, found


def _merged(squared: Tensor, found: Tensor, more: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The k nearest of two lists (n, k), by distance, then number."""
    both, numbers = torch.cat([squared, more], 1), torch.cat([found, others], 1)
    order = numbers.argsort(dim=1)
    order = order.gather(1, both.gather(1, order).argsort(dim=1, stable=True))[:, : squared.shape[1]]
    return both.gather(1, order), numbers.gather(1, order)
