"""The outer loop on a GPU: the first steps are the CPU's, and the host never waits for the device within a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from benchmarks import gpu_distill
from sdw_fast import batches
from sdw_fast import distiller as module
from sdw_fast.folder import read_metrics
from sdw_fast.networks import orthogonal_parameters
from sdw_fast.run import new_distiller, run

TINY = {"size": 12, "hidden": (16, 16), "inner_steps": 5, "batch_size": 64, "steps": 30, "checkpoint_every": 7}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture
def draws_of_the_cpu() -> Iterator[None]:
    """Whatever the device, distillers take the random numbers that a CPU's generators of their seeds give."""
    with gpu_distill.draws_of_the_cpu():
        yield


def make(data: sdw.TransitionDataset, teacher: sdw.Teacher, device: str, n_runs: int | None = None, **settings: Any):
    config = sdw.DistillConfig(**{**TINY, **settings})
    return new_distiller(data, teacher, config, device=device, n_runs=n_runs)


@pytest.mark.parametrize("n_runs", [None, 3])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_first_steps_agree_with_the_cpu(small_data, small_teacher, draws_of_the_cpu, optimizer, n_runs) -> None:
    settings = {"optimizer": optimizer, "precision": "ieee", "n_runs": n_runs}
    distillers = [make(small_data, small_teacher, device, **settings) for device in ("cpu", "cuda")]
    for _ in range(3):
        first, second = (distiller.step() for distiller in distillers)
        for name, value in first.items():
            np.testing.assert_allclose(second[name], value, rtol=1e-3)
    for one, other in zip(*(distiller.sets for distiller in distillers), strict=True):
        np.testing.assert_allclose(one.observations, other.observations, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(one.actions, other.actions, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("runs", [1, 5])
def test_initial_weights_are_the_q_of_what_is_drawn(runs) -> None:
    """With a positive diagonal of R, layer by layer, whatever is factored together."""
    sizes = (17, 256, 256, 40, 6)
    found, drawn = ([torch.Generator("cuda").manual_seed(seed) for seed in range(runs)] for _ in range(2))
    weights = orthogonal_parameters(sizes, gain=1.0, generators=found)[::2]
    for weight, (fan_in, fan_out) in zip(weights, itertools.pairwise(sizes), strict=True):
        shape = max(fan_in, fan_out), min(fan_in, fan_out)
        q, r = torch.linalg.qr(torch.stack([torch.randn(shape, generator=g, device="cuda") for g in drawn]).double())
        q *= r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        torch.testing.assert_close(weight.double(), q if fan_out >= fan_in else q.mT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_runs", [None, 2])
def test_a_step_asks_nothing_back(small_data, small_teacher, n_runs) -> None:
    distiller = make(small_data, small_teacher, "cuda", n_runs)
    distiller.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps = [distiller.advance() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(distiller.fetch(steps)) == 3


@pytest.mark.parametrize("resident", [True, False])
def test_stopped_run_goes_on_to_the_same_bits(small_data, small_teacher, tmp_path, monkeypatch, resident) -> None:
    if not resident:
        monkeypatch.setattr(batches, "RESIDENT_BYTES", 0)

    def distill(folder: str, steps: int) -> sdw.SyntheticDataset:
        settings = {**TINY, "steps": steps, "schedule": "constant", "device": "cuda", "progress": False}
        return sdw.distill(small_data, small_teacher, out=tmp_path / folder, **settings)

    whole = distill("whole", 30)
    distill("parts", 17)
    parts = distill("parts", 30)
    np.testing.assert_array_equal(whole.observations, parts.observations)
    np.testing.assert_array_equal(whole.actions, parts.actions)
    losses = [[m["loss"] for m in read_metrics(tmp_path / folder)] for folder in ("whole", "parts")]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="device"):
        sdw.distill(small_data, small_teacher, **TINY, out=tmp_path / "whole", progress=False)


@pytest.mark.parametrize("settings", [{}, {"n_runs": 2, "initializations": 2}], ids=str)
def test_drawing_ahead_changes_no_bits(small_data, small_teacher, monkeypatch, settings) -> None:
    """Policies wide enough for a draw to be at work while steps are; and a run goes on from a state in between."""

    def wide() -> sdw.Distiller:
        return make(small_data, small_teacher, "cuda", **settings, hidden=(256, 256, 256), inner_width=None)

    ahead, plain, resumed = wide(), wide(), wide()
    monkeypatch.setattr(plain._draws, "draw_ahead", lambda *_: None)
    figures = [[distiller.advance() for _ in range(12)] for distiller in (plain, ahead)]
    resumed.load_state_dict(ahead.state_dict())
    for steps, distiller in zip(figures, (plain, ahead), strict=True):
        steps += [distiller.advance() for _ in range(12)]
    figures.append(figures[1][:12] + [resumed.advance() for _ in range(12)])
    expected = torch.stack(figures[0])
    assert all(torch.equal(torch.stack(steps), expected) for steps in figures[1:])
    assert all(torch.equal(d.observations, plain.observations) for d in (ahead, resumed))


def test_a_problem_in_host_memory_takes_the_steps_of_the_cpu_s_rows(small_data, small_teacher, monkeypatch) -> None:
    """The rows are drawn where they lie: whatever the parameters, a run sees the batches of a CPU generator."""
    monkeypatch.setattr(batches, "RESIDENT_BYTES", 0)
    problem = sdw.outer_problem(small_data, small_teacher, sdw.DistillConfig(**TINY))
    hosted, plain = (module.OuterBatches(problem, torch.device(device)) for device in ("cuda", "cpu"))
    assert hosted.device.type == "cpu"
    for found, expected in zip(
        hosted.draw(64, torch.Generator().manual_seed(3)), plain.draw(64, torch.Generator().manual_seed(3)), strict=True
    ):
        assert found.device.type == "cuda"
        np.testing.assert_allclose(found.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_a_run_that_diverges_ends(small_data, small_teacher) -> None:
    distiller = make(small_data, small_teacher, "cuda", inner_lr=1e20, adapt_inner_lr=False)
    before = distiller.observations.detach().clone()
    with pytest.raises(FloatingPointError, match="10 outer steps in a row"):
        run(distiller, progress=False)
    assert torch.equal(distiller.observations.detach(), before)
