"""Density weights against hand-worked ones: mean 1, clipped at a quantile, of the effective sample size asked for."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdw_fast as sdw
from sdw_fast.density import effective_sample_size


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


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


def test_rarest_share_is_of_one_percent(rng: np.random.Generator) -> None:
    logd = rng.permutation(np.linspace(-3, 4, 1000))
    result = sdw.density_weights(logd, tau=0.7, clip=1)
    weights = np.sort(np.exp(-0.7 * logd))
    assert result.rarest_share == pytest.approx(weights[-10:].sum() / weights.sum())
    assert sdw.density_weights(logd[:101], tau=0.0).rarest_share == pytest.approx(2 / 101)  # rounded up


def test_tensors_have_weights_too(rng: np.random.Generator) -> None:
    logd = rng.standard_normal(50)
    expected, found = (sdw.density_weights(x, ess=0.5) for x in (logd, torch.from_numpy(logd).requires_grad_()))
    np.testing.assert_array_equal(found.weights, expected.weights)
    assert found.to_dict() == expected.to_dict()


def test_default_clip_is_the_quantile_099(rng: np.random.Generator) -> None:
    assert sdw.density_weights(rng.standard_normal(1000), tau=1.0).clipped == 10


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
    assert effective_sample_size(np.ones(10)) == 1
    assert effective_sample_size(torch.tensor([1.0, 0, 0, 0])) == 0.25
    assert effective_sample_size(np.array([1e-300, 3e-300])) == pytest.approx(16 / 10 / 2)
    for bad in ([], [0.0, 0.0], [1.0, -1.0], [math.inf, 1.0], [[1.0]]):
        with pytest.raises(ValueError, match="weights must"):
            effective_sample_size(np.array(bad))
