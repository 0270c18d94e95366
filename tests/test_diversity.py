"""How widely states spread: dimension, entropy, neighbor distance, and how much of one dataset another covers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast import ops
from sdw_fast.diversity import coverage, diversity, estimate_dimension
from sdw_fast.units import Affine


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def dataset(rng: np.random.Generator, tmp_path: Path) -> sdw.TransitionDataset:
    observations = [5, 0, -3] + rng.standard_normal((200, 3)) * [1, 10, 0.1]
    never = np.zeros(200, bool)
    arrays = {"observations": observations, "next_observations": np.roll(observations, -1, axis=0)}
    arrays |= {"actions": np.zeros((200, 1)), "rewards": np.zeros(200), "terminations": never, "truncations": never}
    return dataclasses.replace(sdw.load_dataset(arrays), path=tmp_path)


# --- dimension --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "tolerance"), [(1, 0.03), (2, 0.06), (5, 0.3)])
def test_intrinsic_dimension(rng: np.random.Generator, columns: int, tolerance: float) -> None:
    plane = rng.standard_normal((6000, columns)) @ np.linalg.qr(rng.standard_normal((9, columns)))[0].T
    assert estimate_dimension(plane.astype(np.float32)) == pytest.approx(columns, abs=tolerance)


# --- diversity --------------------------------------------------------------------------------------------------------


def test_diversity_of_a_gaussian(rng: np.random.Generator) -> None:
    deviation = np.array([1.0, 2.0, 0.5])
    measured = diversity((rng.standard_normal((10000, 3)) * deviation).astype(np.float32))
    assert measured.entropy == pytest.approx(1.5 * math.log(2 * math.pi * math.e) + np.log(deviation).sum(), abs=0.06)
    assert measured.participation_ratio == pytest.approx((5.25**2) / (1 + 16 + 1 / 16), rel=0.05)
    assert measured.intrinsic_dimension == pytest.approx(3, abs=0.15)
    assert (measured.states, measured.dimension) == (10000, 3)
    json.dumps(measured.to_dict())


def test_diversity_by_hand() -> None:
    states = np.array([[0.0, 5], [1, 5], [3, 5], [7, 5]])  # on a line
    measured = diversity(states, k=2)
    assert measured.neighbor_distance == pytest.approx((1 + 3 + 1 + 2 + 2 + 3 + 4 + 6) / 8)
    assert measured.participation_ratio == pytest.approx(1)
    # ψ(4) − ψ(2) = 1/2 + 1/3; the unit ball of the line is 2 long; second neighbors lie at 3, 2, 3, 6.
    assert measured.entropy == pytest.approx(5 / 6 + math.log(2) + np.log([3, 2, 3, 6]).mean())


def test_diversity_of_a_dataset_shares_its_neighbors(dataset: sdw.TransitionDataset, monkeypatch) -> None:
    sdw.log_density(dataset)
    expected = diversity(dataset.normalized_observations())

    def refuse(*arguments: Any, **options: Any) -> None:
        pytest.fail("searched again")

    with monkeypatch.context() as patch:
        patch.setattr(ops, "knn", refuse)
        assert diversity(dataset) == expected
    assert diversity(dataset, k=5) == diversity(torch.from_numpy(dataset.normalized_observations()), k=5) != expected


def test_diversity_refuses(dataset: sdw.TransitionDataset) -> None:
    with pytest.raises(ValueError, match="k >= 2"):
        diversity(dataset, k=1)
    with pytest.raises(ValueError, match="k >= 2"):
        estimate_dimension(np.eye(5) * np.arange(5), k=1)
    with pytest.raises(ValueError, match=r"shape \(M, D\)"):
        diversity(np.zeros(4))


# --- coverage ---------------------------------------------------------------------------------------------------------


def test_coverage_by_hand() -> None:
    of = np.array([[0.0], [1.0], [10.0]])  # nearest others at 1, 1, 9
    assert coverage(of, np.array([[0.9], [30.0]]), k=1) == pytest.approx(2 / 3)  # 10 − 0.9 > 9
    assert coverage(of, np.array([[1.0]]), k=1) == 1
    assert coverage(of, np.array([[-5.0]]), k=1) == 0


@pytest.mark.parametrize(("count", "covering", "k"), [(3000, 3000, 1), (3000, 1000, 5), (3000, 9000, 2)])
def test_coverage_within_one_distribution(rng: np.random.Generator, count: int, covering: int, k: int) -> None:
    expected = 1 - math.prod((count - 1 - l) / (count + covering - 1 - l) for l in range(k))
    x = rng.standard_normal((count + covering, 4)).astype(np.float32)
    assert coverage(x[:count], torch.from_numpy(x[count:]).numpy(), k=k) == pytest.approx(expected, abs=0.05)


def test_coverage_of_datasets_is_measured_in_the_first_ones_units(dataset: sdw.TransitionDataset) -> None:
    half = dataset.subset(np.arange(0, 200, 2))
    units = dataclasses.replace(dataset.units, states=Affine(np.zeros(3), np.full(3, 7.0)))
    other = dataclasses.replace(half, observations=half.observations + np.float32(0.3), units=units)
    normalize = dataset.units.states.normalize
    expected = coverage(dataset.normalized_observations(), normalize(other.observations))
    assert coverage(dataset, other) == expected
    assert 0 < expected < 1
    assert coverage(dataset, other, k=1) < expected


def test_coverage_refuses_one_dataset_and_one_array(dataset: sdw.TransitionDataset) -> None:
    with pytest.raises(TypeError, match="one of each"):
        coverage(dataset, np.eye(3))
    with pytest.raises(TypeError, match="one of each"):
        coverage(np.eye(3), dataset)
