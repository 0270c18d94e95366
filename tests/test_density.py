"""Densities against known ones, of a dataset and its cache; k-NN and flow. Their neighbors: test_neighbors.py."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast.density import flow_log_density, knn_log_density, log_unit_ball
from sdw_fast.diversity import coverage, diversity, estimate_dimension
from sdw_fast.files import write_npz

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --- k-NN log-density -------------------------------------------------------------------------------------------------


def test_knn_log_density_by_hand() -> None:
    # Second neighbors of 0, 1, 3, 7 lie at 3, 2, 3, 6; the unit ball of the line has length 2; three are searched.
    states = np.array([[0.0], [1.0], [3.0], [7.0]], np.float32)
    expected = np.log(2 / (3 * 2 * np.array([3.0, 2.0, 3.0, 6.0])))
    np.testing.assert_allclose(knn_log_density(states, k=2), expected, rtol=1e-6)


def test_ten_neighbors_unless_told(small_data: sdw.TransitionDataset) -> None:
    states = small_data.normalized_observations()
    np.testing.assert_array_equal(sdw.log_density(small_data), knn_log_density(states, k=10))
    np.testing.assert_array_equal(sdw.log_density(small_data), knn_log_density(states))
    assert diversity(small_data) == diversity(small_data, 10) != diversity(small_data, 9)


def test_unit_balls() -> None:
    for m, volume in {1: 2, 2: math.pi, 3: 4 / 3 * math.pi, 4: math.pi**2 / 2}.items():
        assert log_unit_ball(m) == pytest.approx(math.log(volume))


def test_tensors_integers_and_half_precision_are_states_too(rng: np.random.Generator) -> None:
    states = rng.integers(0, 50, (200, 3))
    expected = knn_log_density(states.astype(np.float32), k=5)
    for other in (states, torch.from_numpy(states), torch.from_numpy(states).double(), states.astype(np.float16)):
        np.testing.assert_allclose(knn_log_density(other, k=5), expected, rtol=1e-6)
    strided = np.asfortranarray(states.astype(np.float32))
    np.testing.assert_allclose(knn_log_density(strided, k=5), expected, rtol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_tensors_stay_on_their_device(rng: np.random.Generator, device: str) -> None:
    states = rng.standard_normal((300, 4)).astype(np.float32)
    states[:, 2] = 7  # no dimension
    others = rng.standard_normal((100, 4)).astype(np.float32)
    x, y = torch.from_numpy(states).to(device), torch.from_numpy(others).to(device)
    for options in ({}, {"k": 5, "dimension": "intrinsic"}, {"references": 120}, {"references": others}):
        expected = knn_log_density(states, **options)
        assert isinstance(expected, np.ndarray)
        logd = knn_log_density(x, **{**options, **({"references": y} if options.get("references") is others else {})})
        assert isinstance(logd, torch.Tensor)
        assert (logd.device, logd.dtype) == (x.device, torch.float64)
        np.testing.assert_allclose(logd.cpu(), expected, rtol=1e-6)
    assert estimate_dimension(x) == pytest.approx(estimate_dimension(states), rel=1e-6)
    assert coverage(x, y) == coverage(states, others)
    for one, other in zip(diversity(x).to_dict().values(), diversity(states).to_dict().values(), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_duplicates_are_densest_and_finite() -> None:
    states = np.concatenate([np.zeros((5, 2)), np.array([[3.0, 0], [3, 1], [3, 3], [9, 9]])])
    logd = knn_log_density(states, k=2)
    assert np.isfinite(logd).all()
    # The smallest positive second-neighbor distance is that of (3, 1), 2 (to (3, 3)); the five zeros get half of it.
    expected = math.log(2 / (8 * math.pi * 1**2))
    np.testing.assert_allclose(logd[:5], expected, rtol=1e-6)
    assert logd[5:].max() < expected


def test_constant_columns_are_no_dimensions(rng: np.random.Generator) -> None:
    states = rng.standard_normal((300, 2)).astype(np.float32)
    padded = np.concatenate([states, np.full((300, 3), 7, np.float32)], axis=1)
    np.testing.assert_allclose(knn_log_density(padded), knn_log_density(states), rtol=1e-5)


def test_dimension_scales_the_spread(rng: np.random.Generator) -> None:
    states = rng.standard_normal((400, 3)).astype(np.float32)
    ambient = knn_log_density(states)
    np.testing.assert_allclose(knn_log_density(states, dimension=3), ambient)
    half = knn_log_density(states, dimension=1.5)
    np.testing.assert_allclose(half - half.mean(), (ambient - ambient.mean()) / 2, atol=1e-9)
    intrinsic = knn_log_density(states, k=10, dimension="intrinsic")
    m = estimate_dimension(states, k=10)
    np.testing.assert_allclose(intrinsic, knn_log_density(states, k=10, dimension=m))
    # Weights chosen by effective sample size see only the order and the relative spread.
    np.testing.assert_allclose(
        sdw.density_weights(half, ess=0.5).weights, sdw.density_weights(ambient, ess=0.5).weights, rtol=1e-5
    )


def test_other_references(rng: np.random.Generator) -> None:
    states, others = rng.standard_normal((20, 2)), rng.standard_normal((50, 2))
    radius = np.sort(np.linalg.norm(states[:, None] - others, axis=-1), axis=1)[:, 2]
    expected = np.log(3 / (50 * math.pi * radius**2))
    np.testing.assert_allclose(knn_log_density(states, k=3, references=others), expected, rtol=1e-5)


def test_k_may_be_all_the_others(rng: np.random.Generator) -> None:
    states = rng.standard_normal((12, 2))
    radius = np.linalg.norm(states[:, None] - states, axis=-1).max(axis=1)
    np.testing.assert_allclose(knn_log_density(states, k=11), -np.log(math.pi * radius**2), rtol=1e-5)


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
    error = knn_log_density(x.astype(np.float32)) - log_normal(x)
    assert abs(error.mean() - OFFSET) < bias
    assert NOISE - 0.05 < error.std() < spread


def test_knn_on_a_mixture(rng: np.random.Generator) -> None:
    x, truth = mixture(rng, 8000)
    error = knn_log_density(x.astype(np.float32)) - truth
    assert abs(error.mean() - OFFSET) < 0.03
    assert error.std() < 0.38
    assert abs(error[truth < np.quantile(truth, 0.2)].mean() - OFFSET) < 0.1  # the rare states are not far off either


def test_knn_on_a_cube(rng: np.random.Generator) -> None:
    x = rng.random((8000, 3)).astype(np.float32)
    logd = knn_log_density(x)
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
    assert estimate_dimension(sheet, k=10) == pytest.approx(2, abs=0.1)
    exact = (knn_log_density(sheet, dimension=2) - truth)[inside]
    assert abs(exact.mean() - OFFSET) < 0.03
    assert abs(exact.std() - NOISE) < 0.03
    estimated = (knn_log_density(sheet, dimension="intrinsic") - truth)[inside]
    assert abs(estimated.mean() - OFFSET) < 0.3
    ambient = (knn_log_density(sheet) - truth)[inside]
    assert ambient.std() > 1.3 * exact.std()  # a ball of too many dimensions stretches every contrast by 3/2


def test_reference_subset_is_unbiased(rng: np.random.Generator) -> None:
    x = rng.standard_normal((8000, 2))
    error = knn_log_density(x.astype(np.float32), references=2000) - log_normal(x)
    assert abs(error.mean() - OFFSET) < 0.05


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
    error = flow_log_density(states, max_epochs=10, **small_flow) - truth
    assert abs(error.mean()) < 0.05
    assert error.std() < 0.3


def test_flow_on_a_mixture(rng: np.random.Generator, small_flow: dict) -> None:
    x, truth = mixture(rng, 4000)
    error = flow_log_density(x, max_epochs=10, **small_flow) - truth
    assert abs(error.mean()) < 0.2
    assert np.quantile(np.abs(error), 0.9) < 0.9  # a single state far out would rule a standard deviation


def test_flow_repeats_and_leaves_the_global_generator_alone(rng: np.random.Generator, small_flow: dict) -> None:
    x = rng.standard_normal((300, 1))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = flow_log_density(x, max_epochs=2, **small_flow)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(flow_log_density(torch.from_numpy(x), max_epochs=2, **small_flow), first)
    assert not np.array_equal(flow_log_density(x, max_epochs=2, seed=1, **small_flow), first)


def test_flow_ends_when_it_no_longer_improves(rng: np.random.Generator, small_flow: dict) -> None:
    x = rng.standard_normal((60, 4)).astype(np.float32)  # few states: more epochs only overfit
    long = flow_log_density(x, max_epochs=400, patience=5, **small_flow)
    longer = flow_log_density(x, max_epochs=800, patience=5, **small_flow)
    assert np.array_equal(long, longer)
    with pytest.raises(ValueError, match="diverged"):
        flow_log_density(x, max_epochs=3, **{**small_flow, "learning_rate": 1e30})


def test_flow_waits_for_patience_epochs_and_keeps_the_best(rng: np.random.Generator, small_flow: dict) -> None:
    x = rng.standard_normal((120, 2))
    noisy = {**small_flow, "transforms": 1, "hidden": (8,), "batch_size": 16, "learning_rate": 0.01}
    by_epochs = [flow_log_density(x, max_epochs=n, patience=100, **noisy) for n in range(1, 13)]
    better = [n for n in range(1, 12) if not np.array_equal(by_epochs[n], by_epochs[n - 1])]  # than from epoch 0 on
    ends = set()
    for patience in (1, 3, 4):
        best = 0
        while any(0 < n - best <= patience for n in better):
            best = min(n for n in better if n > best)
        np.testing.assert_array_equal(flow_log_density(x, max_epochs=12, patience=patience, **noisy), by_epochs[best])
        ends.add(best)
    assert len(ends) > 1  # or this has shown nothing


def test_flow_without_zuko(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match=r'pip install "sdw_fast\[flow\]"'):
        flow_log_density(np.eye(20))


def test_flow_refuses_what_has_no_density() -> None:
    pytest.importorskip("zuko")
    with pytest.raises(ValueError, match="all states are equal"):
        flow_log_density(np.ones((20, 3)))
    with pytest.raises(ValueError, match="at least 2"):
        flow_log_density(np.ones((1, 3)))
    with pytest.raises(ValueError, match="NaN"):
        flow_log_density(np.full((20, 3), np.nan))
    with pytest.raises(ValueError, match="at least 10 states"):
        flow_log_density(np.eye(5))


def test_flow_of_a_dataset_is_computed_once(tmp_path: Path) -> None:
    pytest.importorskip("zuko")
    states = np.random.default_rng(1).standard_normal((200, 3)) * [1, 10, 0.1]
    arrays = {"observations": states, "actions": np.zeros((200, 1)), "rewards": np.zeros(200)}
    ends = np.zeros(200, bool)
    loaded = sdw.load_dataset({**arrays, "next_observations": states, "terminations": ends, "truncations": ends})
    data = dataclasses.replace(loaded, path=tmp_path)
    options = {"max_epochs": 1, "hidden": (8,)}
    first = sdw.log_density(data, "flow", **options)
    np.testing.assert_array_equal(first, flow_log_density(data.normalized_observations(), **options))
    (file,) = (tmp_path / ".sdw_cache").iterdir()
    write_npz(file, logd=first + 1)  # what is read from now on
    np.testing.assert_array_equal(sdw.log_density(data, "flow", progress=True, **options), first + 1)
    np.testing.assert_array_equal(sdw.log_density(data, "flow", **options, seed=0), first + 1)  # the default, said
    assert not np.array_equal(sdw.log_density(data, "flow", **options, seed=1), first + 1)
    write_npz(file, logd=first[:7])
    np.testing.assert_array_equal(sdw.log_density(data, "flow", **options), first)
    with pytest.raises(TypeError, match="colour"):
        sdw.log_density(data, "flow", colour="red")
    with pytest.raises(ValueError, match="method must be"):
        sdw.log_density(data, method="histogram")
