"""The outer loop on a GPU: the first steps are the CPU's, and the host never waits for the device within a step."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast import ops
from sdw_fast.distill import DistillConfig, Distiller, read_metrics

TINY = {"size": 12, "hidden": (16, 16), "inner_steps": 5, "batch_size": 64, "steps": 30, "checkpoint_every": 7}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def given_draws(distiller: Distiller, draws: list) -> None:
    """Makes the distiller take these draws, one a step, in place of its own."""
    remaining = iter(draws)

    def draw() -> tuple:
        initial, batches = next(remaining)
        moved = [[part.to(distiller.device) for part in batch] for batch in batches]
        return [p.detach().clone().to(distiller.device) for p in initial], moved

    distiller._draw = draw  # type: ignore[method-assign]


@gpu
@pytest.mark.parametrize("n_runs", [None, 3])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_first_steps_agree_with_the_cpu(small_data, small_teacher, monkeypatch, optimizer, n_runs) -> None:
    for op in ("unrolled_bc", "behavior_matching"):
        monkeypatch.setattr(ops, op, functools.partial(getattr(ops, op), precision="ieee"))
    config = DistillConfig(**TINY, optimizer=optimizer)
    distillers = [Distiller(small_data, small_teacher, config, device=d, n_runs=n_runs) for d in ("cpu", "cuda")]
    draws = [distillers[0]._draw() for _ in range(3)]
    for distiller in distillers:
        given_draws(distiller, draws)
    for _ in range(3):
        first, second = (distiller.step() for distiller in distillers)
        for name, value in first.items():
            np.testing.assert_allclose(second[name], value, rtol=1e-3)
    for one, other in zip(*(distiller.sets for distiller in distillers), strict=True):
        np.testing.assert_allclose(one.observations, other.observations, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(one.actions, other.actions, rtol=1e-3, atol=1e-3)


@gpu
@pytest.mark.parametrize("n_runs", [None, 2])
def test_a_step_asks_nothing_back(small_data, small_teacher, n_runs) -> None:
    distiller = Distiller(small_data, small_teacher, DistillConfig(**TINY), device="cuda", n_runs=n_runs)
    distiller.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps = [distiller._advance() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(distiller._fetch(steps)) == 3


@gpu
@pytest.mark.parametrize("resident", [True, False])
def test_stopped_run_goes_on_to_the_same_bits(small_data, small_teacher, tmp_path, monkeypatch, resident) -> None:
    if not resident:
        monkeypatch.setattr(sys.modules[Distiller.__module__], "RESIDENT_BYTES", 0)

    def run(folder: str, steps: int) -> sdw.SyntheticDataset:
        settings = {**TINY, "steps": steps, "schedule": "constant", "device": "cuda", "progress": False}
        return sdw.distill(small_data, small_teacher, folder=tmp_path / folder, **settings)

    whole = run("whole", 30)
    run("parts", 17)
    parts = run("parts", 30)
    np.testing.assert_array_equal(whole.observations, parts.observations)
    np.testing.assert_array_equal(whole.actions, parts.actions)
    losses = [[m["loss"] for m in read_metrics(tmp_path / folder)] for folder in ("whole", "parts")]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="device"):
        sdw.distill(small_data, small_teacher, **TINY, folder=tmp_path / "whole", progress=False)


@gpu
def test_a_run_that_diverges_ends(small_data, small_teacher) -> None:
    distiller = Distiller(small_data, small_teacher, DistillConfig(**TINY, inner_lr=1e20), device="cuda")
    before = distiller.observations.detach().clone()
    with pytest.raises(FloatingPointError, match="10 outer steps in a row"):
        distiller.run(progress=False)
    assert torch.equal(distiller.observations.detach(), before)
