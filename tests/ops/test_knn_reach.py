"""A search with a reach finds the neighbors within it, and says where there are fewer than k."""

from __future__ import annotations

import pytest
import torch

from sdw_fast.ops._knn_native import NeighborIndex


def _expected(queries: torch.Tensor, references: torch.Tensor, k: int, reach: torch.Tensor) -> list[list[int]]:
    """Rows within the reach, by distance, then index: all differences in float64."""
    squared = (queries.double()[:, None] - references.double()).square().sum(2)
    order = squared.argsort(dim=1, stable=True)[:, :k]
    return [
        [int(row) for row in rows if distances[row] <= limit]
        for rows, distances, limit in zip(order, squared, reach, strict=True)
    ]


def test_reach_by_hand_on_the_cpu() -> None:
    index = NeighborIndex(torch.tensor([[0.0], [1.0], [3.0], [6.0]]), 6.0)
    queries, reach = torch.tensor([[0.0], [2.0], [9.0]]), torch.tensor([1.0, torch.inf, 8.9], dtype=torch.float64)
    squared, found = index.within(queries, 3, reach)
    assert found.tolist() == [[0, 1, -1], [1, 2, 0], [-1, -1, -1]]
    assert squared.tolist() == [[0, 1, torch.inf], [1, 1, 4], [torch.inf] * 3]


@pytest.mark.parametrize(("rows", "dims"), [(1, 1), (40, 3), (3000, 6), (700, 40)])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_reach_on_the_cpu_is_a_cut_of_the_full_answer(rows: int, dims: int, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    references = torch.randn(rows, dims, generator=generator, dtype=kind)
    references[rows // 2 :] = references[rows // 2 :].round()  # ties and duplicates
    queries = torch.cat([references[:30], torch.randn(50, dims, generator=generator, dtype=kind)])
    k = min(8, rows)
    index = NeighborIndex(references, float(torch.cat([references, queries]).abs().max()))
    full, _ = index.within(queries, k, torch.full((len(queries),), torch.inf, dtype=torch.float64))
    reach = full.gather(1, (torch.arange(len(queries)) % k)[:, None])[:, 0] * (1 + 1e-12)  # up to a neighbor, rounded
    reach[::5] = 0
    squared, found = index.within(queries, k, reach)
    assert [[i for i in row if i >= 0] for row in found.tolist()] == _expected(queries, references, k, reach)
    assert torch.equal(squared.isfinite(), found >= 0)
