"""A captured outer step as a distiller takes it, without a GPU: the graph is a call of the step with its own draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast import distiller as module
from sdw_fast.batches import Draws
from sdw_fast.run import new_distiller

TINY = {"size": 12, "hidden": (16, 16), "inner_steps": 5, "batch_size": 64, "steps": 12, "average": 0.9}
STEPS = 8


def stand_in(draws: Draws, work: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Takes a step at a call, and returns what the next one overwrites, as a graph does."""
    figures = torch.zeros(0)

    def replay() -> torch.Tensor:
        nonlocal figures
        found = work(*draws.draw(range(1), 0))
        figures = found if len(figures) == 0 else figures.copy_(found)
        return figures

    return replay


@pytest.fixture
def make(small_data, small_teacher, monkeypatch) -> Callable[..., sdw.Distiller]:
    monkeypatch.setattr(sdw.Distiller, "runs_ahead", True)

    def distiller(*, capturable: bool, **settings: Any) -> sdw.Distiller:
        made = new_distiller(small_data, small_teacher, sdw.DistillConfig(**{**TINY, **settings}))
        made._capturable = capturable
        return made

    return distiller


def assert_the_same(steps: list[list[dict[str, Any]]], distillers: list[sdw.Distiller]) -> None:
    assert steps[0] == steps[1]
    assert len({step["loss"] for step in steps[0]}) == len(steps[0])
    for one, other in zip(*(distiller.normalized for distiller in distillers), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd", "momentum": 0.5}, {"schedule": "constant"}], ids=str)
def test_schedule_average_and_inner_lr_reach_a_captured_step(make, monkeypatch, settings) -> None:
    monkeypatch.setattr(Draws, "capture", stand_in)
    distillers = [make(capturable=capturable, **settings) for capturable in (True, False)]
    steps: list[list[dict[str, Any]]] = []
    for distiller in distillers:
        figures = [distiller.advance() for _ in range(STEPS // 2)]
        read = distiller._watch.tensor.data_ptr()
        distiller._watch.load([distiller.config.inner_lr / 2], [])
        assert distiller._watch.tensor.data_ptr() == read  # where a graph reads it
        figures += [distiller.advance() for _ in range(STEPS // 2)]
        steps.append(distiller.fetch(figures))  # all at once: a figure that the next step overwrote would show
        assert steps[-1][-1]["inner_lr"] == pytest.approx(distiller.config.inner_lr / 2)
    assert distillers[0]._replay is not None
    assert distillers[1]._replay is None
    assert_the_same(steps, distillers)


def test_a_state_is_gone_on_from_step_by_step_and_then_captured(make, monkeypatch) -> None:
    monkeypatch.setattr(Draws, "capture", stand_in)
    first, second = (make(capturable=True) for _ in range(2))
    for _ in range(STEPS):
        first.step()
        second.step()
    second.step()
    second.load_state_dict(first.state_dict())
    assert second._replay is None
    assert second._optimizer.param_groups[0]["lr"] is second._lr
    steps = [[distiller.step() for _ in range(module.WARM_UP + 1)] for distiller in (first, second)]
    assert second._replay is not None
    assert_the_same(steps, [first, second])


@pytest.mark.parametrize("error", [RuntimeError("not permitted"), MemoryError("unrolled_bc: CUDA out of memory")])
def test_what_cannot_be_captured_is_told_once_and_launched(make, monkeypatch, error: Exception) -> None:
    def fails(draws: Draws, work: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        draws.draw(range(1), 0)  # what it had drawn does not count
        raise error

    monkeypatch.setattr(Draws, "capture", fails)
    distillers = [make(capturable=capturable) for capturable in (True, False)]
    steps = [[distiller.step() for _ in range(module.WARM_UP)] for distiller in distillers]
    with pytest.warns(UserWarning, match=f"not captured as a CUDA graph .{error}") as told:
        steps[0].append(distillers[0].step())
    assert len(told) == 1
    steps[0] += [distillers[0].step() for _ in range(3)]
    steps[1] += [distillers[1].step() for _ in range(4)]
    assert_the_same(steps, distillers)
    assert np.isfinite(steps[0][-1]["loss"])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_schedule_and_average_are_those_of_the_cpu(make, monkeypatch, optimizer: str) -> None:
    """Read from tensors by fused kernels, or plain numbers."""
    monkeypatch.setattr(Draws, "capture", stand_in)
    sets = []
    for ahead in (True, False):
        monkeypatch.setattr(sdw.Distiller, "runs_ahead", ahead)
        distiller = make(capturable=ahead, optimizer=optimizer)
        start = [x.clone() for x in distiller.normalized]
        for _ in range(TINY["steps"]):
            distiller.step()
        sets.append([x - first for x, first in zip(distiller.normalized, start, strict=True)])
    for ahead, plain in zip(*sets, strict=True):
        torch.testing.assert_close(ahead, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
