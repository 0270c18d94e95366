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
    for _ in range(module.WARM_UP + 1):
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
    monkeypatch.setattr(module, "WARM_UP", 1_000)  # no graph
    monkeypatch.setattr(plain._draws, "draw_ahead", lambda *_: None)
    figures = [[distiller.advance() for _ in range(12)] for distiller in (plain, ahead)]
    resumed.load_state_dict(ahead.state_dict())
    for steps, distiller in zip(figures, (plain, ahead), strict=True):
        steps += [distiller.advance() for _ in range(12)]
    figures.append(figures[1][:12] + [resumed.advance() for _ in range(12)])
    expected = torch.stack(figures[0])
    assert all(torch.equal(torch.stack(steps), expected) for steps in figures[1:])
    assert all(torch.equal(d.observations, plain.observations) for d in (ahead, resumed))


GRAPHED = [
    {},
    {"n_runs": 3, "average": 0.9},
    {"optimizer": "sgd", "momentum": 0.5, "inner_momentum": 0.5, "window": 3},
    {"optimizer": "sgd", "momentum": 0.0, "schedule": "constant", "tape": "recompute"},
    {"fixed_initialization": 3, "n_runs": 2},
    {"hidden": (256, 256, 256), "inner_width": None, "size": 256, "select": "last"},
    {"batch_size": 20_000},  # behavior_matching by PyTorch's products
]


@pytest.mark.parametrize("settings", GRAPHED, ids=str)
def test_a_captured_step_is_the_launched_one(small_data, small_teacher, monkeypatch, settings) -> None:
    """To the same bits; a run goes on from a state in between, taken from either."""
    graphed, resumed = (make(small_data, small_teacher, "cuda", **settings) for _ in range(2))
    first = [graphed.advance() for _ in range(6)]
    resumed.load_state_dict(graphed.state_dict())
    rest = [[distiller.advance() for _ in range(6)] for distiller in (graphed, resumed)]
    assert graphed._replay is not None
    assert resumed._replay is not None
    monkeypatch.setattr(module, "WARM_UP", 1_000)
    launched = make(small_data, small_teacher, "cuda", **settings)
    expected = torch.stack([launched.advance() for _ in range(12)])
    assert launched._replay is None
    for figures in rest:
        assert torch.equal(torch.stack([*first, *figures]), expected)
    for distiller in (graphed, resumed):
        assert all(torch.equal(*pair) for pair in zip(distiller.normalized, launched.normalized, strict=True))
        states = [d.state_dict()["generators"] for d in (distiller, launched)]
        assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


def test_a_captured_step_follows_inner_lr(small_data, small_teacher, monkeypatch) -> None:
    """The step size that `Watch` lowers is read where the graph finds it."""
    distillers = []
    for warm_up in (2, 1_000):
        monkeypatch.setattr(module, "WARM_UP", warm_up)
        distiller = make(small_data, small_teacher, "cuda")
        for step in range(8):
            if step == 4:
                distiller._watch.load([distiller.config.inner_lr / 2], [])
            metrics = distiller.step()
        assert metrics["inner_lr"] == pytest.approx(distiller.config.inner_lr / 2)
        distillers.append(distiller)
    assert torch.equal(distillers[0].observations, distillers[1].observations)


def test_steps_that_are_not_captured_are_launched(small_data, small_teacher, monkeypatch) -> None:
    """With a warning, to the same bits."""
    expected, distiller = (make(small_data, small_teacher, "cuda") for _ in range(2))
    for _ in range(6):
        expected.step()
    take = distiller._take

    def asking(*drawn: Any) -> torch.Tensor:
        figures = take(*drawn)
        figures.sum().item()
        return figures

    monkeypatch.setattr(distiller, "_take", asking)
    for _ in range(module.WARM_UP):
        distiller.step()
    with pytest.warns(UserWarning, match="not captured as a CUDA graph"):
        distiller.step()
    for _ in range(3):
        distiller.step()
    assert torch.equal(distiller.observations, expected.observations)


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
