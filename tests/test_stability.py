"""The inner step size: measured before the first step, lowered where training turns rough, the same after a cut."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from oracle import policy

import sdw_fast as sdw
from sdw_fast import stability
from sdw_fast.config import DistillConfig
from sdw_fast.folder import read_metrics
from sdw_fast.networks import orthogonal_parameters
from sdw_fast.run import new_distiller
from sdw_fast.stability import Watch, largest_curvature, rough

TINY = {"size": 12, "hidden": (16, 16), "inner_steps": 20, "batch_size": 64, "steps": 80, "objective": "dbc"}


def make(data: sdw.TransitionDataset, n_runs: int | None = None, **settings: Any) -> sdw.Distiller:
    return new_distiller(data, None, DistillConfig(**{**TINY, **settings}), n_runs=n_runs)


# --- before the first step --------------------------------------------------------------------------------------------


def test_the_curvature_is_the_largest_eigenvalue_of_the_hessian() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    params = orthogonal_parameters((5, 8, 2), gain=1.4, generators=generators)
    states, actions = (torch.randn(2, 30, width, generator=generators[0]) for width in (5, 2))
    found = largest_curvature(states, 0.5 * actions, params, iterations=60)
    for run in range(2):
        shapes = [param[run].shape for param in params]
        flat = torch.cat([param[run].flatten() for param in params]).double()

        def loss(flat: torch.Tensor, run: int = run, shapes: list[torch.Size] = shapes) -> torch.Tensor:
            parts = flat.split([shape.numel() for shape in shapes])
            outputs = policy([p.reshape(s) for p, s in zip(parts, shapes, strict=True)], states[run].double())
            return (outputs - 0.5 * actions[run].double()).square().mean()

        hessian = torch.autograd.functional.hessian(loss, flat)
        assert float(found[run]) == pytest.approx(float(torch.linalg.eigvalsh(hessian).abs().max()), rel=1e-2)


def test_a_step_size_that_the_pairs_do_not_bear_is_lowered_told_and_kept_for_cloning(small_data) -> None:
    with pytest.warns(
        UserWarning, match=r"inner_lr was lowered from 3 to [0-9.]+: cloning on the starting pairs"
    ) as said:
        distiller = make(small_data, inner_lr=3.0)
    assert len(said) == 1
    (rate,) = distiller.inner_lr
    assert np.log(rate / 3.0) / np.log(0.7) == pytest.approx(round(np.log(rate / 3.0) / np.log(0.7)))
    bound = 2 * 1.9 * stability.SHARE
    generator = torch.Generator().manual_seed(0)
    initial = distiller.inner_loop.initial([generator])
    for lr, borne in ((rate, True), (3.0, False)):
        end = distiller.inner_loop.unroll(*distiller.normalized, initial, torch.tensor([lr]))
        curvature = float(largest_curvature(*distiller.normalized, end))
        assert (lr * curvature <= bound) == borne
    synthetic = distiller.synthetic
    assert synthetic.config["inner_lr"] == rate
    assert distiller.config.inner_lr == 3.0
    first, second = (sdw.behavior_clone(synthetic, inner_lr=lr, inner_steps=3) for lr in (None, rate))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert distiller.step()["inner_lr"] == pytest.approx(rate)


@pytest.mark.filterwarnings("error")
def test_a_step_size_that_they_bear_is_left_alone(small_data) -> None:
    distiller = make(small_data)
    assert distiller.inner_lr == [0.1]
    assert distiller.synthetic.config["inner_lr"] == 0.1


def test_a_step_size_far_from_any_use_is_refused(small_data) -> None:
    with pytest.raises(ValueError, match=r"unstable at inner_lr=1000000\.0 and down to a hundredth of it: lower"):
        make(small_data, inner_lr=1e6)


@pytest.mark.filterwarnings("error")
def test_where_it_is_not_wanted_nothing_is_lowered(small_data) -> None:
    assert make(small_data, inner_lr=3.0, adapt_inner_lr=False).inner_lr == [3.0]


# --- while it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, False),
        ({"loss": float("nan")}, True),
        ({"norm": float("inf")}, True),
        ({"growth": 10.5}, True),
        ({"growth": float("inf")}, True),
        ({"growth": float("nan")}, True),
        ({"growth": 9.5}, False),
        ({"after": 0.6}, True),  # cloning ended worse than it began
        ({"after": float("nan")}, True),
    ],
    ids=str,
)
def test_which_steps_are_rough(change: dict[str, float], expected: bool) -> None:
    figures = {"loss": 0.1, "norm": 1.0, "growth": 0.7, "before": 0.5, "after": 0.1, **change}
    loss, norm, growth, before, after = (
        torch.tensor([figures[n]]) for n in ("loss", "norm", "growth", "before", "after")
    )
    assert rough(loss, norm, growth, (before, after)).tolist() == [expected]


def test_the_step_size_falls_where_more_than_a_tenth_of_the_steps_are_rough() -> None:
    watch = Watch([0.1, 0.1], 0.001, torch.device("cpu"), batched=True)
    for step in range(1, 25):  # 2 of 25, and 3 of 25
        watch.see(torch.tensor([step <= 2, step <= 3]), step)
    assert watch.rates == [0.1, 0.1]
    with pytest.warns(UserWarning, match=r"inner_lr of run 1 was lowered from 0.1 to 0.07: .* unstable .* up to 25"):
        watch.see(torch.tensor([False, False]), 25)
    assert watch.rates == pytest.approx([0.1, 0.07])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(26, 51):  # what was rough before does not count twice
            watch.see(torch.tensor([False, False]), step)
    assert watch.rates == pytest.approx([0.1, 0.07])


def test_it_ends_with_advice_where_lowering_does_not_help() -> None:
    watch = Watch([0.0012], 0.001, torch.device("cpu"), batched=False)
    for step in range(1, 25):
        watch.see(torch.tensor([True]), step)
    with pytest.raises(FloatingPointError, match=r"unstable up to step 25, although .* is now 0.0012: lower gain"):
        watch.see(torch.tensor([True]), 25)


class Stopped(Exception):
    pass


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps count as rough by a low growth, so that tiny runs have some."""
    monkeypatch.setattr(stability, "ROUGH_GROWTH", 0.8)


@pytest.mark.filterwarnings("ignore:inner_lr")
@pytest.mark.parametrize("n_runs", [None, 2])
def test_a_run_that_lowers_it_goes_on_to_the_same_bits(small_data, tmp_path, restless, n_runs) -> None:
    settings = {**TINY, "n_runs": n_runs, "checkpoint_every": 7, "progress": False}
    whole = sdw.distill(small_data, **settings, out=tmp_path / "whole")
    folder = "." if n_runs is None else "run-001"
    rates = [m["inner_lr"] for m in read_metrics(tmp_path / "whole" / folder)]
    assert rates[0] > rates[-1]
    assert all(a == b for i, (a, b) in enumerate(itertools.pairwise(rates), start=1) if i % 25)

    def stop(distiller: sdw.Distiller, metrics: dict) -> None:
        if distiller.iteration in (17, 40):  # within and beyond the first decision
            raise Stopped

    for _ in range(2):
        with pytest.raises(Stopped):
            sdw.distill(small_data, **settings, out=tmp_path / "parts", callback=stop)
    parts = sdw.distill(small_data, **settings, out=tmp_path / "parts")
    for one, other in zip([whole] if n_runs is None else whole, [parts] if n_runs is None else parts, strict=True):
        assert np.array_equal(one.observations, other.observations)
        assert one.config == other.config
    assert [m["inner_lr"] for m in read_metrics(tmp_path / "parts" / folder)] == rates


@pytest.mark.filterwarnings("ignore:inner_lr")
def test_runs_side_by_side_have_step_sizes_of_their_own(small_data, restless) -> None:
    settings = {**TINY, "steps": 30, "progress": False}
    together = sdw.distill(small_data, **settings, n_runs=2)
    for seed, found in enumerate(together):
        alone = sdw.distill(small_data, **settings, seed=seed)
        assert found.config["inner_lr"] == alone.config["inner_lr"]
        np.testing.assert_allclose(found.observations, alone.observations, rtol=1e-3, atol=1e-3)


def test_a_dataset_of_extreme_actions_does_not_run_away(small_data) -> None:
    """All actions at the bounds, in every state another: what no policy can clone."""
    rng = np.random.default_rng(0)
    data = dataclasses.replace(small_data, actions=np.sign(rng.normal(size=(400, 3))).astype(np.float32))
    losses: list[float] = []
    sdw.distill(data, **{**TINY, "steps": 60}, callback=lambda d, m: losses.append(m["loss"]), progress=False)
    assert np.isfinite(losses).all()
