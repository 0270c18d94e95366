"""Neighbors of more states than are searched at once are those of one search."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast import parts
from sdw_fast.density import log_density


def _lattice(rng: np.random.Generator) -> np.ndarray:
    """Equal distances everywhere, and duplicates on both sides of every cut."""
    return rng.integers(0, 3, (400, 3)).astype(np.float32)


def _manifold(rng: np.random.Generator) -> np.ndarray:
    return np.tanh(rng.normal(size=(1500, 3)) @ rng.normal(size=(3, 9))).astype(np.float32)


def _apart(rng: np.random.Generator) -> np.ndarray:
    """Heaps far from each other; in some parts there are fewer states than neighbors."""
    return (np.repeat([0.0, 1e4, 2e4], [3, 5, 292])[:, None] + rng.normal(size=(300, 4))).astype(np.float32)


def _huge(rng: np.random.Generator) -> np.ndarray:
    """The squares of gaps overflow float32."""
    return _manifold(rng) * np.float32(1e25)


@pytest.mark.parametrize("make", [_lattice, _manifold, _apart, _huge])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_distances_in_parts_are_those_of_one_search(monkeypatch, make, count: int) -> None:
    states = make(np.random.default_rng(0))
    monkeypatch.setattr(parts, "PART_ROWS", -(-len(states) // count))
    monkeypatch.setattr(parts, "_BLOCK_ROWS", 97)
    found = parts.self_join_in_parts(torch.from_numpy(states).__getitem__, len(states), 7)
    assert np.array_equal(found, sdw.ops.knn(states, k=7)[0])


def test_a_large_dataset_has_the_density_of_a_small_one(monkeypatch) -> None:
    rng = np.random.default_rng(1)
    states = _manifold(rng)
    columns = {"observations": states, "actions": np.tanh(states[:, :2])}
    expected = log_density(sdw.load_dataset(columns), k=5)
    monkeypatch.setattr(parts, "PART_ROWS", 400)
    assert np.array_equal(log_density(sdw.load_dataset(columns), k=5), expected)
    with pytest.raises(ValueError, match="k must lie between 1 and 1499"):
        log_density(sdw.load_dataset(columns), k=1500)


def test_no_projection_outlives_its_use() -> None:
    """A search of 30 million states goes through 30 blocks of them: as many kept would be 2 GB, or 4."""
    sample = torch.from_numpy(_manifold(np.random.default_rng(2))).double()
    space = parts.Parts(sample, 5, parts.principal_frame(sample))
    projected = space.project(sample)
    kept = weakref.ref(projected)
    gc.disable()
    try:
        space.owner_of(projected)
        del projected
        assert kept() is None
    finally:
        gc.enable()
