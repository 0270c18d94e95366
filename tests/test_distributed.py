"""Neighbors and densities over ranks are those of one process that holds all rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks

import sdw_fast as sdw
from sdw_fast import distributed
from sdw_fast.density import knn_log_density


def _lattice(rng: np.random.Generator) -> np.ndarray:
    """Rows with equal distances everywhere, and duplicates on both sides of every cut."""
    return rng.integers(0, 3, (400, 3)).astype(np.float32)


def _manifold(rng: np.random.Generator) -> np.ndarray:
    return np.tanh(rng.normal(size=(1500, 3)) @ rng.normal(size=(3, 9))).astype(np.float32)


def _far_away(rng: np.random.Generator) -> np.ndarray:
    return 1e6 + rng.normal(size=(300, 4))  # float64, whose digits lie behind the fifth


CASES = {"lattice": (_lattice, 7), "manifold": (_manifold, 10), "far away": (_far_away, 3)}


def _shares(rows: np.ndarray, size: int, empty: bool) -> list[np.ndarray]:
    """Uneven shares; with `empty` the second rank has none."""
    cuts = sorted(np.random.default_rng(size).choice(np.arange(1, len(rows)), size - 1, replace=False))
    if empty:
        cuts[1] = cuts[0]
    return np.split(rows, cuts)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_neighbors_over_ranks_are_those_of_one_process(tmp_path: Path, case: str, size: int) -> None:
    make, k = CASES[case]
    rows = make(np.random.default_rng(3))
    shares = _shares(rows, size, empty=size > 2)

    def work(rank: int) -> tuple[np.ndarray, np.ndarray]:
        return distributed.knn(shares[rank], k=k)

    found = on_ranks(size, tmp_path, work)
    distances, indices = sdw.ops.knn(rows, k=k)
    assert np.array_equal(np.concatenate([index for _, index in found]), indices)
    assert np.array_equal(np.concatenate([distance for distance, _ in found]), distances)


def test_a_rank_with_fewer_rows_than_neighbors(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    shares = np.split(rows, [1, 3])
    found = on_ranks(3, tmp_path, lambda rank: distributed.knn(shares[rank], k=11)[1])
    assert np.array_equal(np.concatenate(found), sdw.ops.knn(rows, k=11)[1])


def test_a_rank_without_rows_need_not_know_their_kind(tmp_path: Path) -> None:
    rows = _manifold(np.random.default_rng(4))[:200]
    shares = [rows[:90], np.zeros((0, 2)), rows[90:]]  # float64 of another width, and nothing in it
    found = on_ranks(3, tmp_path, lambda rank: distributed.knn(shares[rank], k=4)[1])
    assert np.array_equal(np.concatenate(found), sdw.ops.knn(rows, k=4)[1])


@pytest.mark.parametrize("dimension", ["ambient", "intrinsic", 2.5])
def test_log_densities_over_ranks_are_those_of_one_process(tmp_path: Path, dimension: str | float) -> None:
    rows = _manifold(np.random.default_rng(1))[:600]
    rows[100:140] = rows[0]  # states with more duplicates than neighbors
    rows[:, 4] = 2  # a constant column is no dimension
    shares = _shares(rows, 3, empty=True)
    found = on_ranks(3, tmp_path, lambda rank: distributed.knn_log_density(shares[rank], 5, dimension=dimension))
    np.testing.assert_allclose(np.concatenate(found), knn_log_density(rows, 5, dimension=dimension), rtol=1e-12)


def test_tensors_come_back_as_tensors_and_traffic_is_counted(tmp_path: Path) -> None:
    rows = torch.from_numpy(_manifold(np.random.default_rng(2)))

    def work(rank: int) -> tuple[torch.Tensor, distributed.Traffic]:
        traffic: list[distributed.Traffic] = []
        _, indices = distributed.knn(rows[rank::2], k=4, traffic=traffic)
        return indices, traffic[0]

    (first, sent), (_, other) = on_ranks(2, tmp_path, work)
    both = torch.cat([rows[::2], rows[1::2]])
    assert torch.equal(first, sdw.ops.knn(both, k=4)[1][: len(first)])
    assert 0 < sent.rows < len(first)
    assert sent.queries > 0
    assert 0 < sent.share < 1
    assert sent.bytes > 9 * 4 * (sent.rows + sent.queries)
    assert other.bytes > 0


def test_what_is_wrong_on_one_rank_is_said_on_all(tmp_path: Path) -> None:
    good = np.zeros((5, 3), np.float32)

    def said(rank: int, *others: object) -> list[str]:
        messages = []
        for mine, k in others if rank == 1 else [(good, 2)] * len(others):  # type: ignore[misc]
            with pytest.raises((TypeError, ValueError)) as error:
                distributed.knn(mine, k=k)
            messages.append(str(error.value))
        return messages

    wrong = [(np.full((5, 3), np.nan, np.float32), 2), (np.zeros((5, 4), np.float32), 2), (good, 3), (good, 2.0)]
    first, second = on_ranks(2, tmp_path, said, *wrong)
    assert "rank 1: rows: 5 rows have NaN" in first[0]
    assert "columns [3, 4]" in first[1]
    assert "values of k [2, 3]" in first[2]
    assert "rank 1: k must be an integer, got float" in first[3]
    assert second[1] == first[1]


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"torchrun.*init_process_group"):
        distributed.knn(np.zeros((3, 2), np.float32), k=1)
