"""Densities against known ones, weights against hand-worked ones, and every input that is not what it should be."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdw_fast as sdw
from sdw_fast import density
from sdw_fast.data import Normalizer, TransitionDataset

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_tensors_stay_on_their_device(rng: np.random.Generator, device: str) -> None:
    states = rng.standard_normal((300, 4)).astype(np.float32)
    states[:, 2] = 7  # no dimension
    others = rng.standard_normal((100, 4)).astype(np.float32)
    x, y = torch.from_numpy(states).to(device), torch.from_numpy(others).to(device)
    for options in ({}, {"k": 5, "dimension": "intrinsic"}, {"references": 120}, {"references": others}):
        expected = sdw.knn_log_density(states, **options)
        assert isinstance(expected, np.ndarray)
        logd = sdw.knn_log_density(
            x, **{**options, **({"references": y} if options.get("references") is others else {})}
        )
        assert isinstance(logd, torch.Tensor)
        assert (logd.device, logd.dtype) == (x.device, torch.float64)
        np.testing.assert_allclose(logd.cpu(), expected, rtol=1e-6)
    assert isinstance(sdw.kde_log_density(x), torch.Tensor)
    assert sdw.estimate_dimension(x) == pytest.approx(sdw.estimate_dimension(states), rel=1e-6)
    assert sdw.coverage(x, y) == sdw.coverage(states, others)
    for one, other in zip(sdw.diversity(x).to_dict().values(), sdw.diversity(states).to_dict().values(), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


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


@pytest.fixture
def dataset(rng: np.random.Generator, tmp_path: Path) -> TransitionDataset:
    never = np.zeros(200, bool)
    observations = [5, 0, -3] + rng.standard_normal((200, 3)) * [1, 10, 0.1]
    return TransitionDataset(observations, np.zeros((200, 1)), np.zeros(200), never, never, path=tmp_path)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each neighbor search."""
    calls: list[int] = []
    knn = density._knn
    monkeypatch.setattr(density, "_knn", lambda *arguments: (calls.append(1), knn(*arguments))[1])
    return calls


def test_log_density_searches_once(dataset: TransitionDataset, searches: list[int]) -> None:
    first = sdw.log_density(dataset)
    np.testing.assert_array_equal(first, sdw.knn_log_density(dataset.normalized_observations))
    searches.clear()
    np.testing.assert_array_equal(sdw.log_density(dataset), first)
    intrinsic = sdw.log_density(dataset, dimension="intrinsic")  # the same neighbors
    assert not np.allclose(intrinsic, first)
    assert not searches
    assert [file.suffix for file in (dataset.path / ".sdw_cache").iterdir()] == [".npz"]


def test_cache_knows_what_it_holds(dataset: TransitionDataset, searches: list[int]) -> None:
    sdw.log_density(dataset)
    subset = sdw.log_density(dataset, references=100)
    np.testing.assert_array_equal(subset, sdw.knn_log_density(dataset.normalized_observations, references=100))
    searches.clear()
    sdw.log_density(dataset, k=11)
    sdw.log_density(dataset, references=100, seed=1)
    other = dataclasses.replace(dataset, rewards=dataset.rewards + 1)
    sdw.log_density(other)
    scaled = Normalizer(dataset.normalizer.mean, np.full(3, 2, np.float32))
    sdw.log_density(dataclasses.replace(dataset, normalizer=scaled))
    assert len(searches) == 4
    np.testing.assert_array_equal(sdw.log_density(dataset, references=100), subset)


def test_cache_lies_beside_a_file_and_nowhere_without_one(dataset: TransitionDataset, searches: list[int]) -> None:
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
def test_damaged_cache_is_computed_again(dataset: TransitionDataset, searches: list[int], damage: str) -> None:
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


def test_place_that_cannot_be_written_is_no_error(dataset: TransitionDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sdw.knn_log_density(dataset.normalized_observations)
    (dataset.path / ".sdw_cache").write_text("a file where the folder would be")
    np.testing.assert_array_equal(sdw.log_density(dataset), expected)
    (dataset.path / ".sdw_cache").unlink()

    def refuse(*arguments: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(density.os, "replace", refuse)
    np.testing.assert_array_equal(sdw.log_density(dataset), expected)
    assert list((dataset.path / ".sdw_cache").iterdir()) == []  # no temporary file is left


def test_log_density_refuses(dataset: TransitionDataset) -> None:
    with pytest.raises(ValueError, match="method must be"):
        sdw.log_density(dataset, method="histogram")
    with pytest.raises(TypeError, match="must be a number"):
        sdw.log_density(dataset, references=np.eye(3))
    with pytest.raises(ValueError, match="between 1 and 199"):
        sdw.log_density(dataset, k=200)


# --- known densities --------------------------------------------------------------------------------------------------
#
# A k-NN log-density has mean error log k − ψ(k) (0.05 at k = 10) and standard deviation √ψ'(k) (0.32) where the density
# is locally constant; curvature and borders add to it. The tolerances below are those two and a margin.

NOISE = 0.325  # √ψ'(10)
OFFSET = 0.0508  # log 10 − ψ(10)


def log_normal(x: np.ndarray, deviation: float | np.ndarray = 1.0) -> np.ndarray:
    """log N(x; 0, deviation²), summed over the columns."""
    return (-0.5 * (x / deviation) ** 2 - np.log(deviation * math.sqrt(2 * math.pi)) + np.zeros(x.shape)).sum(axis=1)


def mixture(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A narrow and a wide Gaussian in the plane, 3 to 1, and the log-density."""
    narrow = rng.random(count) < 0.75
    x = np.where(narrow[:, None], 0.2, 1.0) * rng.standard_normal((count, 2)) + np.where(narrow[:, None], 0.0, 3.0)
    return x, np.logaddexp(np.log(0.75) + log_normal(x, 0.2), np.log(0.25) + log_normal(x - 3, 1.0))


@pytest.mark.parametrize(("columns", "bias", "spread"), [(1, 0.02, 0.35), (2, 0.03, 0.38), (5, 0.2, 0.55)])
def test_knn_on_a_gaussian(rng: np.random.Generator, columns: int, bias: float, spread: float) -> None:
    x = rng.standard_normal((8000, columns))
    error = sdw.knn_log_density(x.astype(np.float32)) - log_normal(x)
    assert abs(error.mean() - OFFSET) < bias
    assert NOISE - 0.05 < error.std() < spread


def test_knn_on_a_mixture(rng: np.random.Generator) -> None:
    x, truth = mixture(rng, 8000)
    error = sdw.knn_log_density(x.astype(np.float32)) - truth
    assert abs(error.mean() - OFFSET) < 0.03
    assert error.std() < 0.38
    assert abs(error[truth < np.quantile(truth, 0.2)].mean() - OFFSET) < 0.1  # the rare states are not far off either


def test_knn_on_a_cube(rng: np.random.Generator) -> None:
    x = rng.random((8000, 3)).astype(np.float32)
    logd = sdw.knn_log_density(x)
    inside = (np.abs(x - 0.5) < 0.4).all(axis=1)
    assert abs(logd[inside].mean() - OFFSET) < 0.03
    assert abs(logd[inside].std() - NOISE) < 0.03
    # A ball around a state on a face has half its volume outside: the estimate is low by about log 2.
    face = (np.abs(x[:, 0] - 0.5) > 0.499) & (np.abs(x[:, 1:] - 0.5) < 0.4).all(axis=1)
    assert -0.9 < logd[face].mean() - OFFSET < -0.4


def test_knn_on_a_curved_surface(rng: np.random.Generator) -> None:
    # (u, u², v) with u, v uniform: a sheet of dimension 2 in 3, of density 1 / √(1 + 4u²) an area.
    u, v = rng.uniform(-1, 1, 8000), rng.random(8000)
    sheet = np.stack([u, u**2, v], axis=1).astype(np.float32)
    truth = -np.log(2 * np.sqrt(1 + 4 * u**2))
    inside = (np.abs(u) < 0.9) & (np.abs(v - 0.5) < 0.4)
    assert sdw.estimate_dimension(sheet, k=10) == pytest.approx(2, abs=0.1)
    exact = (sdw.knn_log_density(sheet, dimension=2) - truth)[inside]
    assert abs(exact.mean() - OFFSET) < 0.03
    assert abs(exact.std() - NOISE) < 0.03
    estimated = (sdw.knn_log_density(sheet, dimension="intrinsic") - truth)[inside]
    assert abs(estimated.mean() - OFFSET) < 0.3
    ambient = (sdw.knn_log_density(sheet) - truth)[inside]
    assert ambient.std() > 1.3 * exact.std()  # a ball of too many dimensions stretches every contrast by 3/2


def test_reference_subset_is_unbiased(rng: np.random.Generator) -> None:
    x = rng.standard_normal((8000, 2))
    error = sdw.knn_log_density(x.astype(np.float32), references=2000) - log_normal(x)
    assert abs(error.mean() - OFFSET) < 0.05


@pytest.mark.parametrize(("columns", "tolerance"), [(1, 0.03), (2, 0.06), (5, 0.3)])
def test_intrinsic_dimension(rng: np.random.Generator, columns: int, tolerance: float) -> None:
    plane = rng.standard_normal((6000, columns)) @ np.linalg.qr(rng.standard_normal((9, columns)))[0].T
    assert sdw.estimate_dimension(plane.astype(np.float32)) == pytest.approx(columns, abs=tolerance)


def test_intrinsic_dimension_by_hand() -> None:
    # Neighbor distances (1, 2) and (1, 4): 1/m = mean(log 2, log 4). A row with a duplicate says nothing.
    assert density._dimension_of_distances(torch.tensor([[1.0, 2], [1, 4], [0, 3]])) == pytest.approx(
        1 / math.log(8**0.5)
    )
    with pytest.raises(ValueError, match="no state without a duplicate"):
        density._dimension_of_distances(torch.zeros((4, 3)))


# --- kernel density ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidth", ["scott", "silverman", 0.3])
def test_kde_is_scipys_without_the_state_itself(rng: np.random.Generator, bandwidth: str | float) -> None:
    stats = pytest.importorskip("scipy.stats")
    count, columns = 400, 3
    x = rng.standard_normal((count, columns))
    x = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T  # SciPy's kernel has the covariance's
    x *= np.array([0.5, 1.0, 30.0])  # shape, ours the columns' deviations: the same for uncorrelated columns
    kernel = stats.gaussian_kde(x.T, bw_method=bandwidth)
    own = kernel.evaluate(x[:1].T) * 0 + 1 / math.sqrt(np.linalg.det(2 * math.pi * kernel.covariance))
    expected = np.log((kernel(x.T) * count - own) / (count - 1))
    np.testing.assert_allclose(sdw.kde_log_density(x, bandwidth=bandwidth), expected, rtol=1e-6, atol=1e-6)


def test_kde_blocks_constant_columns_and_isolated_states(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rng.standard_normal((150, 2))
    x[0] = 1e3  # its kernels underflow in any plain sum
    expected = sdw.kde_log_density(x, bandwidth=0.1)
    assert np.isfinite(expected).all()
    assert expected.argmin() == 0
    padded = torch.from_numpy(np.concatenate([x, np.ones((150, 1))], axis=1))
    np.testing.assert_allclose(sdw.kde_log_density(padded, bandwidth=0.1), expected)


def test_kde_on_a_mixture(rng: np.random.Generator) -> None:
    x, truth = mixture(rng, 4000)
    logd = sdw.kde_log_density(x, bandwidth=0.12)
    assert abs((logd - truth).mean()) < 0.15
    assert np.corrcoef(logd, truth)[0, 1] > 0.97


@pytest.mark.parametrize("bandwidth", ["wide", 0, -1.0, math.inf])
def test_kde_refuses_bandwidths(bandwidth: str | float) -> None:
    with pytest.raises(ValueError, match="bandwidth must be"):
        sdw.kde_log_density(np.eye(4), bandwidth=bandwidth)


def test_kde_and_flow_refuse_what_has_no_density() -> None:
    pytest.importorskip("zuko")
    for estimate in (sdw.kde_log_density, sdw.flow_log_density):
        with pytest.raises(ValueError, match="all states are equal"):
            estimate(np.ones((20, 3)))
        with pytest.raises(ValueError, match="at least 2"):
            estimate(np.ones((1, 3)))
        with pytest.raises(ValueError, match="NaN"):
            estimate(np.full((20, 3), np.nan))
    with pytest.raises(ValueError, match="at least 10 states"):
        sdw.flow_log_density(np.eye(5))


# --- flow -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_flow() -> Iterator[dict]:
    """Options of a flow that fits in a second, on one thread: waking a second one costs more than these sizes take."""
    pytest.importorskip("zuko")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {"transforms": 4, "hidden": (32, 32), "batch_size": 256, "learning_rate": 5e-3}
    torch.set_num_threads(threads)


def test_flow_on_a_correlated_gaussian_in_its_own_units(rng: np.random.Generator, small_flow: dict) -> None:
    x = rng.standard_normal((4000, 3))
    mix = np.array([[50.0, 0, 0], [0.3, 0.2, 0], [1.0, 1.0, 2.0]])
    states = np.concatenate([5 + x @ mix.T, np.ones((4000, 1))], axis=1)  # and a constant column
    truth = log_normal(x) - np.log(np.abs(np.linalg.det(mix)))
    error = sdw.flow_log_density(states, max_epochs=10, **small_flow) - truth
    assert abs(error.mean()) < 0.05
    assert error.std() < 0.3


def test_flow_on_a_mixture(rng: np.random.Generator, small_flow: dict) -> None:
    x, truth = mixture(rng, 4000)
    error = sdw.flow_log_density(x, max_epochs=10, **small_flow) - truth
    assert abs(error.mean()) < 0.2
    assert error.std() < 0.6


def test_flow_repeats_and_leaves_the_global_generator_alone(rng: np.random.Generator, small_flow: dict) -> None:
    x = rng.standard_normal((300, 1))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = sdw.flow_log_density(x, max_epochs=2, **small_flow)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(sdw.flow_log_density(torch.from_numpy(x), max_epochs=2, **small_flow), first)
    assert not np.array_equal(sdw.flow_log_density(x, max_epochs=2, seed=1, **small_flow), first)


def test_flow_ends_when_it_no_longer_improves(rng: np.random.Generator, small_flow: dict) -> None:
    x = rng.standard_normal((60, 4)).astype(np.float32)  # few states: more epochs only overfit
    long = sdw.flow_log_density(x, max_epochs=400, patience=5, **small_flow)
    longer = sdw.flow_log_density(x, max_epochs=800, patience=5, **small_flow)
    assert np.array_equal(long, longer)
    with pytest.raises(ValueError, match="diverged"):
        sdw.flow_log_density(x, max_epochs=3, **{**small_flow, "learning_rate": 1e30})


def test_flow_without_zuko(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match=r'pip install "sdw_fast\[flow\]"'):
        sdw.flow_log_density(np.eye(20))


@pytest.mark.parametrize("method", ["kde", "flow"])
def test_other_methods_are_cached_too(dataset: TransitionDataset, method: str) -> None:
    if method == "flow":
        pytest.importorskip("zuko")
    options = {"flow": {"max_epochs": 1, "hidden": (8,)}, "kde": {"bandwidth": 0.5}}[method]
    first = sdw.log_density(dataset, method, **options)
    estimate = getattr(density, f"{method}_log_density")
    np.testing.assert_array_equal(first, estimate(dataset.normalized_observations, **options))
    (file,) = (dataset.path / ".sdw_cache").iterdir()
    np.savez(file, logd=first + 1)  # what is read from now on
    np.testing.assert_array_equal(sdw.log_density(dataset, method, progress=True, **options), first + 1)
    with pytest.raises(TypeError, match="colour"):
        sdw.log_density(dataset, method, colour="red")


# --- diversity --------------------------------------------------------------------------------------------------------


def test_diversity_of_a_gaussian(rng: np.random.Generator) -> None:
    deviation = np.array([1.0, 2.0, 0.5])
    measured = sdw.diversity((rng.standard_normal((10000, 3)) * deviation).astype(np.float32))
    assert measured.entropy == pytest.approx(1.5 * math.log(2 * math.pi * math.e) + np.log(deviation).sum(), abs=0.06)
    assert measured.participation_ratio == pytest.approx((5.25**2) / (1 + 16 + 1 / 16), rel=0.05)
    assert measured.intrinsic_dimension == pytest.approx(3, abs=0.15)
    assert (measured.states, measured.dimension) == (10000, 3)
    json.dumps(measured.to_dict())


def test_diversity_by_hand() -> None:
    states = np.array([[0.0, 5], [1, 5], [3, 5], [7, 5]])  # on a line
    measured = sdw.diversity(states, k=2)
    assert measured.neighbor_distance == pytest.approx((1 + 3 + 1 + 2 + 2 + 3 + 4 + 6) / 8)
    assert measured.participation_ratio == pytest.approx(1)
    # ψ(4) − ψ(2) = 1/2 + 1/3; the unit ball of the line is 2 long; second neighbors lie at 3, 2, 3, 6.
    assert measured.entropy == pytest.approx(5 / 6 + math.log(2) + np.log([3, 2, 3, 6]).mean())


def test_diversity_of_a_dataset_shares_its_neighbors(dataset: TransitionDataset, searches: list[int]) -> None:
    sdw.log_density(dataset)
    measured = sdw.diversity(dataset)
    assert len(searches) == 1
    assert measured == sdw.diversity(dataset.normalized_observations)


def test_coverage_by_hand() -> None:
    of = np.array([[0.0], [1.0], [10.0]])  # nearest others at 1, 1, 9
    assert sdw.coverage(of, np.array([[0.9], [30.0]]), k=1) == pytest.approx(2 / 3)  # 10 − 0.9 > 9
    assert sdw.coverage(of, np.array([[1.0]]), k=1) == 1
    assert sdw.coverage(of, np.array([[-5.0]]), k=1) == 0


@pytest.mark.parametrize(("count", "covering", "k"), [(3000, 3000, 1), (3000, 1000, 5), (3000, 9000, 2)])
def test_coverage_within_one_distribution(rng: np.random.Generator, count: int, covering: int, k: int) -> None:
    expected = 1 - math.prod((count - 1 - l) / (count + covering - 1 - l) for l in range(k))
    x = rng.standard_normal((count + covering, 4)).astype(np.float32)
    assert sdw.coverage(x[:count], torch.from_numpy(x[count:]).numpy(), k=k) == pytest.approx(expected, abs=0.05)


def test_coverage_of_datasets_is_measured_in_the_first_ones_normalization(
    dataset: TransitionDataset, rng: np.random.Generator
) -> None:
    other = dataclasses.replace(
        dataset,
        observations=dataset.observations[::2] + 0.3,
        actions=np.zeros((100, 1)),
        rewards=np.zeros(100),
        terminations=np.zeros(100),
        truncations=np.zeros(100),
        normalizer=None,
    )
    expected = sdw.coverage(dataset.normalized_observations, dataset.normalizer.normalize(other.observations))
    assert sdw.coverage(dataset, other) == expected
    assert 0 < expected < 1


def test_coverage_refuses_one_dataset_and_one_array(dataset: TransitionDataset) -> None:
    with pytest.raises(TypeError, match="one of each"):
        sdw.coverage(dataset, np.eye(3))
