"""Densities against known ones, weights against hand-worked ones, and every input that is not what it should be."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdw_fast as sdw
from sdw_fast import density


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --- k-NN log-density -------------------------------------------------------------------------------------------------


def test_knn_log_density_by_hand() -> None:
    # Second neighbors of 0, 1, 3, 7 lie at 3, 2, 3, 6; the unit ball of the line has length 2; three are searched.
    states = np.array([[0.0], [1.0], [3.0], [7.0]], np.float32)
    expected = np.log(2 / (3 * 2 * np.array([3.0, 2.0, 3.0, 6.0])))
    np.testing.assert_allclose(sdw.knn_log_density(states, k=2), expected, rtol=1e-6)


def test_unit_balls() -> None:
    for m, volume in {1: 2, 2: math.pi, 3: 4 / 3 * math.pi, 4: math.pi**2 / 2}.items():
        assert density._log_unit_ball(m) == pytest.approx(math.log(volume))


def test_tensors_integers_and_half_precision_are_states_too(rng: np.random.Generator) -> None:
    states = rng.integers(0, 50, (200, 3))
    expected = sdw.knn_log_density(states.astype(np.float32), k=5)
    for other in (states, torch.from_numpy(states), torch.from_numpy(states).double(), states.astype(np.float16)):
        np.testing.assert_allclose(sdw.knn_log_density(other, k=5), expected, rtol=1e-6)
    strided = np.asfortranarray(states.astype(np.float32))
    np.testing.assert_allclose(sdw.knn_log_density(strided, k=5), expected, rtol=1e-6)


def test_duplicates_are_densest_and_finite() -> None:
    states = np.concatenate([np.zeros((5, 2)), np.array([[3.0, 0], [3, 1], [3, 3], [9, 9]])])
    logd = sdw.knn_log_density(states, k=2)
    assert np.isfinite(logd).all()
    # The smallest positive second-neighbor distance is that of (3, 1), 2 (to (3, 3)); the five zeros get half of it.
    expected = math.log(2 / (8 * math.pi * 1**2))
    np.testing.assert_allclose(logd[:5], expected, rtol=1e-6)
    assert logd[5:].max() < expected


def test_a_duplicate_is_a_neighbor() -> None:
    states = np.array([[0.0], [0.0], [1.0], [5.0]])
    distances, searched = density._neighbor_distances(states, 1, None, 0, "torch", False)
    assert distances[:, 0].tolist() == [0, 0, 1, 4]
    assert searched == 3


def test_constant_columns_are_no_dimensions(rng: np.random.Generator) -> None:
    states = rng.standard_normal((300, 2)).astype(np.float32)
    padded = np.concatenate([states, np.full((300, 3), 7, np.float32)], axis=1)
    np.testing.assert_allclose(sdw.knn_log_density(padded), sdw.knn_log_density(states), rtol=1e-5)


def test_dimension_scales_the_spread(rng: np.random.Generator) -> None:
    states = rng.standard_normal((400, 3)).astype(np.float32)
    ambient = sdw.knn_log_density(states)
    np.testing.assert_allclose(sdw.knn_log_density(states, dimension=3), ambient)
    half = sdw.knn_log_density(states, dimension=1.5)
    np.testing.assert_allclose(half - half.mean(), (ambient - ambient.mean()) / 2, atol=1e-9)
    intrinsic = sdw.knn_log_density(states, k=10, dimension="intrinsic")
    m = sdw.estimate_dimension(states, k=10)
    np.testing.assert_allclose(intrinsic, sdw.knn_log_density(states, k=10, dimension=m))
    # Weights chosen by effective sample size see only the order and the relative spread.
    np.testing.assert_allclose(
        sdw.density_weights(half, ess=0.5).weights, sdw.density_weights(ambient, ess=0.5).weights, rtol=1e-5
    )


def test_reference_subset_leaves_each_state_out_of_its_own_neighborhood(rng: np.random.Generator) -> None:
    states = rng.standard_normal((300, 3))
    states[10:20] = states[0]  # duplicates, some of them references
    k, count = 4, 100
    logd = sdw.knn_log_density(states, k=k, references=count, seed=3)
    rows = density._reference_rows(300, count, 3)
    expected = np.empty(300)
    radius = np.empty(300)
    for i in range(300):
        others = rows[rows != i]
        radius[i] = np.sort(np.linalg.norm(states[others] - states[i], axis=1))[k - 1]
        expected[i] = math.log(k / len(others)) - density._log_unit_ball(3)
    radius[radius == 0] = radius[radius > 0].min() / 2
    np.testing.assert_allclose(logd, expected - 3 * np.log(radius), rtol=1e-5)
    assert np.array_equal(logd, sdw.knn_log_density(states, k=k, references=count, seed=3))
    assert not np.array_equal(logd, sdw.knn_log_density(states, k=k, references=count, seed=4))


def test_all_references_are_the_self_join_even_with_many_duplicates(rng: np.random.Generator) -> None:
    states = rng.integers(0, 2, (60, 3)).astype(np.float32)  # each state has about seven duplicates
    states = np.concatenate([states, rng.standard_normal((60, 3)).astype(np.float32)])
    np.testing.assert_allclose(
        sdw.knn_log_density(states, k=3, references=120), sdw.knn_log_density(states, k=3), rtol=1e-6
    )


def test_other_references(rng: np.random.Generator) -> None:
    states, others = rng.standard_normal((20, 2)), rng.standard_normal((50, 2))
    radius = np.sort(np.linalg.norm(states[:, None] - others, axis=-1), axis=1)[:, 2]
    expected = np.log(3 / (50 * math.pi * radius**2))
    np.testing.assert_allclose(sdw.knn_log_density(states, k=3, references=others), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("states", "options", "error", "message"),
    [
        (np.zeros(5), {}, ValueError, r"shape \(M, D\)"),
        (np.zeros((0, 3)), {}, ValueError, r"shape \(M, D\)"),
        (np.full((9, 2), np.nan), {}, ValueError, "9 rows have NaN"),
        (torch.tensor([[0.0], [torch.inf], [1.0]]), {"k": 1}, ValueError, "first is row 1"),
        (np.zeros((9, 2), complex), {}, TypeError, "real numbers"),
        (np.array([["a"]]), {}, TypeError, "real numbers"),
        (np.eye(9), {"k": 9}, ValueError, "between 1 and 8"),
        (np.eye(9), {"k": 0}, ValueError, "between 1 and 8"),
        (np.eye(9), {"k": 2.0}, TypeError, "integer"),
        (np.eye(1), {"k": 1}, ValueError, "between 1 and 0"),
        (np.eye(9), {"k": 4, "references": 4}, ValueError, "between 1 and 3"),
        (np.eye(9), {"k": 1, "references": 10}, ValueError, "references must lie between 2 and"),
        (np.eye(9), {"k": 1, "references": np.eye(4)}, ValueError, "9 columns, references 4"),
        (np.eye(9), {"k": 5, "references": np.eye(9)[:4]}, ValueError, "between 1 and 4"),
        (np.zeros((9, 2)), {"k": 3}, ValueError, "exact duplicates"),
        (np.eye(9), {"k": 3, "dimension": "large"}, ValueError, "dimension must be"),
        (np.eye(9), {"k": 3, "dimension": -1}, ValueError, "dimension must be"),
        (np.eye(9), {"k": 1, "dimension": "intrinsic"}, ValueError, "k >= 2"),
        (np.eye(9), {"k": 3, "dimension": "intrinsic"}, ValueError, "all neighbor distances are equal"),
        (np.eye(9), {"k": 3, "backend": "magic"}, ValueError, "backend"),
    ],
)
def test_bad_states_are_refused(states, options, error, message) -> None:
    with pytest.raises(error, match=message):
        sdw.knn_log_density(states, **options)


def test_k_may_be_all_the_others(rng: np.random.Generator) -> None:
    states = rng.standard_normal((12, 2))
    radius = np.linalg.norm(states[:, None] - states, axis=-1).max(axis=1)
    np.testing.assert_allclose(sdw.knn_log_density(states, k=11), -np.log(math.pi * radius**2), rtol=1e-5)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    # d = 1, 2, 4 with τ = 1 and no clip: w ∝ 1, 1/2, 1/4, of mean 7/12.
    result = sdw.density_weights(np.log([1.0, 2.0, 4.0]), tau=1, clip=1)
    np.testing.assert_allclose(result.weights, np.array([12, 6, 3]) / 7, rtol=1e-6)
    assert result.effective_sample_size == pytest.approx((7 / 4) ** 2 / (21 / 16) / 3)
    assert result.largest == pytest.approx(12 / 7)
    assert result.rarest_share == pytest.approx(4 / 7)  # the rarest 1% of three states is one state
    assert (result.tau, result.clipped) == (1, 0)
    assert result.weights.dtype == np.float32


def test_clip_is_a_quantile_of_the_weights(rng: np.random.Generator) -> None:
    logd = rng.standard_normal(1000)
    free = sdw.density_weights(logd, tau=1.0, clip=1)
    result = sdw.density_weights(logd, tau=1.0, clip=0.9)
    assert result.clipped == 100
    kept = logd >= np.quantile(logd, 0.1)
    assert np.unique(result.weights[~kept]).size == 1
    assert result.largest == pytest.approx(result.weights[~kept][0])
    ratio = result.weights[kept] / free.weights[kept]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert result.effective_sample_size > free.effective_sample_size


@settings(max_examples=60, deadline=None)
@given(
    logd=st.lists(st.floats(-500, 500), min_size=1, max_size=50),
    tau=st.floats(0, 50),
    clip=st.floats(0.5, 1),
    shift=st.floats(-100, 100),
)
def test_weights_have_mean_one_fall_with_density_and_ignore_its_unit(logd, tau, clip, shift) -> None:
    values = np.array(logd)
    result = sdw.density_weights(values, tau=tau, clip=clip)
    assert np.isfinite(result.weights).all()
    assert result.weights.mean(dtype=np.float64) == pytest.approx(1, rel=1e-5)
    assert (np.diff(result.weights[np.argsort(values, kind="stable")]) <= 1e-6 * result.largest).all()
    assert 1 / len(logd) <= result.effective_sample_size * (1 + 1e-9) <= 1 + 2e-9
    shifted = sdw.density_weights(values + shift, tau=tau, clip=clip)
    np.testing.assert_allclose(shifted.weights, result.weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ess", [0.03, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("clip", [1.0, 0.99])
def test_ess_is_met(rng: np.random.Generator, ess: float, clip: float) -> None:
    logd = 20 * rng.standard_normal(5000)
    result = sdw.density_weights(logd, ess=ess, clip=clip)
    assert result.effective_sample_size == pytest.approx(ess, rel=1e-6)
    again = sdw.density_weights(logd, tau=result.tau, clip=clip)
    np.testing.assert_array_equal(again.weights, result.weights)


def test_ess_falls_with_tau(rng: np.random.Generator) -> None:
    logd = rng.gamma(1, 5, 3000)
    reached = [sdw.density_weights(logd, tau=tau, clip=0.98).effective_sample_size for tau in np.linspace(0, 3, 40)]
    assert reached[0] == pytest.approx(1)
    assert (np.diff(reached) < 0).all()


def test_report_is_json(rng: np.random.Generator) -> None:
    report = sdw.density_weights(rng.standard_normal(100), ess=0.5).to_dict()
    assert set(json.loads(json.dumps(report))) == {
        "tau",
        "effective_sample_size",
        "largest",
        "rarest_share",
        "clipped",
    }


@pytest.mark.parametrize(
    ("logd", "options", "message"),
    [
        ([1.0, 2.0], {}, "exactly one"),
        ([1.0, 2.0], {"tau": 1, "ess": 0.5}, "exactly one"),
        ([1.0, 2.0], {"tau": -1}, "tau must be"),
        ([1.0, 2.0], {"tau": math.nan}, "tau must be"),
        ([1.0, 2.0], {"ess": 0}, "ess is a fraction"),
        ([1.0, 2.0], {"ess": 1.5}, "ess is a fraction"),
        ([1.0, 2.0], {"tau": 1, "clip": 0}, "clip is a quantile"),
        ([1.0, 1.0], {"ess": 0.7}, "no tau reaches"),
        (np.arange(100), {"ess": 0.1, "clip": 0.8}, "raise clip"),
        ([1.0, math.nan], {"tau": 1}, "1 NaN or infinite"),
        ([[1.0, 2.0]], {"tau": 1}, "shape"),
        ([], {"tau": 1}, "shape"),
    ],
)
def test_bad_weight_requests_are_refused(logd, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        sdw.density_weights(np.array(logd), **options)


def test_equal_densities_weigh_the_same() -> None:
    for options in ({"tau": 3.0}, {"ess": 1.0}):
        assert sdw.density_weights(np.full(7, 2.5), **options).weights.tolist() == [1] * 7


def test_effective_sample_size() -> None:
    assert sdw.effective_sample_size(np.ones(10)) == 1
    assert sdw.effective_sample_size(torch.tensor([1.0, 0, 0, 0])) == 0.25
    assert sdw.effective_sample_size(np.array([1e-300, 3e-300])) == pytest.approx(16 / 10 / 2)
    for bad in ([], [0.0, 0.0], [1.0, -1.0], [math.inf, 1.0], [[1.0]]):
        with pytest.raises(ValueError, match="weights must"):
            sdw.effective_sample_size(np.array(bad))


# --- the cache --------------------------------------------------------------------------------------------------------


@dataclass
class Dataset:
    """What the density of a dataset reads of it."""

    normalized_observations: np.ndarray
    path: Path | None
    content_hash: str = "abc"
    normalizer: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(mean=np.zeros(3), scale=np.ones(3)))

    def __len__(self) -> int:
        return len(self.normalized_observations)


@pytest.fixture
def dataset(rng: np.random.Generator, tmp_path: Path) -> Dataset:
    return Dataset(rng.standard_normal((200, 3)).astype(np.float32), tmp_path)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each neighbor search."""
    calls: list[int] = []
    knn = density._knn
    monkeypatch.setattr(density, "_knn", lambda *arguments: (calls.append(1), knn(*arguments))[1])
    return calls


def test_log_density_searches_once(dataset: Dataset, searches: list[int]) -> None:
    first = sdw.log_density(dataset)
    np.testing.assert_array_equal(first, sdw.knn_log_density(dataset.normalized_observations))
    searches.clear()
    np.testing.assert_array_equal(sdw.log_density(dataset), first)
    intrinsic = sdw.log_density(dataset, dimension="intrinsic")  # the same neighbors
    assert not np.allclose(intrinsic, first)
    assert not searches
    assert [file.suffix for file in (dataset.path / ".sdw_cache").iterdir()] == [".npz"]


def test_cache_knows_what_it_holds(dataset: Dataset, searches: list[int]) -> None:
    sdw.log_density(dataset)
    subset = sdw.log_density(dataset, references=100)
    np.testing.assert_array_equal(subset, sdw.knn_log_density(dataset.normalized_observations, references=100))
    searches.clear()
    sdw.log_density(dataset, k=11)
    sdw.log_density(dataset, references=100, seed=1)
    dataset.content_hash = "abd"
    sdw.log_density(dataset)
    dataset.normalizer.scale = np.full(3, 2.0)
    sdw.log_density(dataset)
    assert len(searches) == 4
    np.testing.assert_array_equal(sdw.log_density(dataset, references=100), subset)


def test_cache_lies_beside_a_file_and_nowhere_without_one(dataset: Dataset, searches: list[int]) -> None:
    folder = dataset.path
    dataset.path = folder / "data.npz"
    dataset.path.write_bytes(b"")
    sdw.log_density(dataset)
    assert (folder / ".sdw_cache").is_dir()
    dataset.path = None
    searches.clear()
    sdw.log_density(dataset)
    assert len(searches) == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "shape", "nan", "pickle"])
def test_damaged_cache_is_computed_again(dataset: Dataset, searches: list[int], damage: str) -> None:
    expected = sdw.log_density(dataset)
    (file,) = (dataset.path / ".sdw_cache").iterdir()
    good = file.read_bytes()
    distances = np.ones((200, 10), np.float32)
    if damage == "truncated":
        file.write_bytes(good[: len(good) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_text("not an archive")
    elif damage == "shape":
        np.savez(file, distances=distances[:50], searched=199)
    elif damage == "nan":
        np.savez(file, distances=distances * np.nan, searched=199)
    elif damage == "pickle":
        np.savez(file, distances=np.array([{}], dtype=object), searched=199)
    searches.clear()
    np.testing.assert_array_equal(sdw.log_density(dataset), expected)
    assert len(searches) == 1
    np.testing.assert_array_equal(sdw.log_density(dataset), expected)
    assert len(searches) == 1


def test_place_that_cannot_be_written_is_no_error(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sdw.knn_log_density(dataset.normalized_observations)
    (dataset.path / ".sdw_cache").write_text("a file where the folder would be")
    np.testing.assert_array_equal(sdw.log_density(dataset), expected)
    (dataset.path / ".sdw_cache").unlink()

    def refuse(*arguments: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(density.os, "replace", refuse)
    np.testing.assert_array_equal(sdw.log_density(dataset), expected)
    assert list((dataset.path / ".sdw_cache").iterdir()) == []  # no temporary file is left


def test_log_density_refuses(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="method must be"):
        sdw.log_density(dataset, method="histogram")
    with pytest.raises(TypeError, match="must be a number"):
        sdw.log_density(dataset, references=np.eye(3))
    with pytest.raises(ValueError, match="between 1 and 199"):
        sdw.log_density(dataset, k=200)
