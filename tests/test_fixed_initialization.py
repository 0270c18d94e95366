"""A set distilled for one initialization, which an integer in its file draws: one set gives one policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sdw_fast as sdw
from sdw_fast.cli import app
from sdw_fast.inner import InnerLoop
from sdw_fast.networks import initialization
from sdw_fast.run import new_distiller

TINY: dict[str, Any] = {"size": 12, "hidden": (24, 16), "inner_width": 16, "inner_steps": 5, "batch_size": 64}
TINY |= {"steps": 8, "objective": "dbc", "fixed_initialization": 7}


@pytest.fixture
def synthetic(small_data: sdw.TransitionDataset) -> sdw.SyntheticDataset:
    return sdw.distill(small_data, None, **TINY, progress=False)


def test_policy_is_the_one_that_the_distillation_trained(small_data: sdw.TransitionDataset) -> None:
    distiller = new_distiller(small_data, None, sdw.DistillConfig(**TINY))
    distiller.step()
    loop = distiller.inner_loop
    initial = loop.initial([torch.Generator().manual_seed(123)])
    expected = initialization((11, 16, 16, 3), gain=1.0, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(initial, expected, strict=True))
    with torch.no_grad():
        final = loop.unroll(*distiller.normalized, initial, torch.tensor(distiller.inner_lr))
    policy = sdw.behavior_clone(distiller.synthetic)
    trained = [parameter for name, parameter in policy.named_parameters()]
    assert policy.net.sizes == [11, 16, 16, 3]
    for a, b in zip(trained, final, strict=True):  # the set went through environment units: rounding
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_every_step_starts_from_it_whatever_the_seed(small_data: sdw.TransitionDataset) -> None:
    loop = InnerLoop(sdw.DistillConfig(**TINY), 11, 3, "tanh")
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
    before = [generator.get_state() for generator in generators]
    first, second = loop.initials(generators, 4), loop.initial(generators)
    assert len(first) == 1
    for a, b in zip(first[0], second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[0], a[2])
    assert all(torch.equal(a, g.get_state()) for a, g in zip(before, generators, strict=True))


def test_file_says_what_to_clone_from(synthetic: sdw.SyntheticDataset, tmp_path: Path) -> None:
    again = sdw.SyntheticDataset.load(synthetic.save(tmp_path / "set.npz"))
    observations = torch.from_numpy(synthetic.observations)
    expected = sdw.behavior_clone(synthetic)(observations)
    assert torch.equal(sdw.behavior_clone(again)(observations), expected)
    assert torch.equal(sdw.behavior_clone(again, seed=7, hidden=[16, 16], gain=1.0)(observations), expected)
    assert not torch.equal(sdw.behavior_clone(again, inner_steps=4)(observations), expected)


@pytest.mark.parametrize("other", [{"seed": 0}, {"hidden": (24, 16)}, {"gain": 1.4}, {"ensemble": 2}])
def test_other_initializations_are_refused(synthetic: sdw.SyntheticDataset, other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"one initialization, that of seed 7.*leave {next(iter(other))} out"):
        sdw.behavior_clone(synthetic, **other)


def test_evaluation_runs_its_one_policy(synthetic: sdw.SyntheticDataset, toy_env: str, tmp_path: Path) -> None:
    policy = sdw.behavior_clone(synthetic)
    expected = sdw.evaluate(policy, toy_env, episodes=4, seed=5)
    found = sdw.evaluate_synthetic(synthetic, toy_env, clones=2, episodes=4, seed=5)
    np.testing.assert_array_equal(found.returns, expected.returns)
    synthetic.save(tmp_path / "set.npz")
    refused = CliRunner().invoke(app, ["evaluate", str(tmp_path / "set.npz"), "--env", toy_env, "--clones", "2"])
    assert refused.exit_code == 1
    assert "--clones would have no effect" in refused.output


def test_outer_loss_is_lower_than_that_of_any_initialization(small_data: sdw.TransitionDataset) -> None:
    settings = {**TINY, "steps": 60, "inner_steps": 20}
    losses = []
    for fixed in (7, None):
        distiller = new_distiller(small_data, None, sdw.DistillConfig(**{**settings, "fixed_initialization": fixed}))
        metrics = [distiller.step()["loss"] for _ in range(60)]
        losses.append(np.mean(metrics[-10:]))
    assert losses[0] < losses[1]


def test_seed_is_checked() -> None:
    with pytest.raises(ValueError, match=r"fixed_initialization must be between 0 and 2\*\*63 - 1, got -1"):
        sdw.DistillConfig(fixed_initialization=-1)
