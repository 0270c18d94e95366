"""MLPPolicy and behavior cloning: by hand, against plain SGD, setting by setting, and without global random state."""

from __future__ import annotations

import copy
import io
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdw_fast.config import DistillConfig
from sdw_fast.networks import orthogonal_parameters
from sdw_fast.policy import MLPPolicy, behavior_clone
from sdw_fast.synthetic import SyntheticDataset
from sdw_fast.units import Affine, Units


def make_set(n: int = 20, config: dict | None = None, low: float = -1.0, high: float = 1.0) -> SyntheticDataset:
    rng = np.random.default_rng(1)
    observations = rng.normal(2, 3, size=(n, 4)).astype(np.float32)
    return SyntheticDataset(
        observations=observations,
        actions=((high - low) / 2 * np.tanh(observations[:, :2] / 3) + (high + low) / 2).astype(np.float32),
        units=Units(Affine.fit(observations), Affine.between([low, low], [high, high])),
        config=config or {},
    )


def same(a: MLPPolicy, b: MLPPolicy) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


SMALL: dict[str, Any] = {"hidden": (6, 5), "gain": 1.2, "inner_steps": 4, "inner_lr": 0.05, "inner_momentum": 0.5}
OTHER: dict[str, Any] = {"hidden": (6, 7), "gain": 0.8, "inner_steps": 5, "inner_lr": 0.07, "inner_momentum": 0.0}


# The policy


def test_policy_by_hand() -> None:
    # one layer: a = center + half · tanh(w · (s − mean)/scale + b), bounds [0, 4]: center 2, half 2
    units = Units(Affine(np.array([1.0]), np.array([2.0])), Affine.between([0.0], [4.0]))
    policy = MLPPolicy([torch.tensor([[2.0]]), torch.tensor([0.5])], units)
    expected = 2 + 2 * np.tanh(2.0 * (3.0 - 1.0) / 2.0 + 0.5)
    assert float(policy(torch.tensor([3.0])).detach()) == pytest.approx(expected, rel=1e-6)
    assert policy(torch.full((7, 1), 3.0)).tolist() == [policy(torch.tensor([3.0])).tolist()] * 7
    with pytest.raises(ValueError, match="bounds are not known"):
        MLPPolicy([torch.tensor([[2.0]]), torch.tensor([0.5])], replace(units, actions=None))


@pytest.fixture(scope="module")
def policy() -> MLPPolicy:
    return behavior_clone(make_set(low=-3.0, high=0.5), **SMALL)


def test_policies_are_copied_pickled_and_saved(policy: MLPPolicy, tmp_path: Path) -> None:
    observations = torch.from_numpy(make_set().observations)
    expected = policy(observations)
    torch.save(policy, buffer := io.BytesIO())
    buffer.seek(0)
    copies = [copy.deepcopy(policy), pickle.loads(pickle.dumps(policy)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert torch.equal(other(observations), expected)
        assert other.units == policy.units
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert torch.equal(policy(observations), expected)  # a copy, not a view
    fresh = behavior_clone(make_set(low=-3.0, high=0.5), seed=9, **SMALL)
    fresh.load_state_dict(policy.state_dict())
    assert torch.equal(fresh(observations), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
def test_policies_move_to_another_precision(policy: MLPPolicy, dtype: torch.dtype, tolerance: float) -> None:
    observations = torch.from_numpy(make_set().observations)
    moved = copy.deepcopy(policy).to(dtype)
    actions = moved(observations.to(dtype))
    assert actions.dtype == dtype
    torch.testing.assert_close(actions.float(), policy(observations), atol=tolerance, rtol=0)


def test_policies_serve_torch_func(policy: MLPPolicy) -> None:
    observations = torch.from_numpy(make_set().observations)
    torch.testing.assert_close(torch.func.vmap(policy)(observations), policy(observations))
    slope = torch.func.jacrev(policy)(observations[0])
    step = 0.1 * torch.ones(4)
    precise, state = copy.deepcopy(policy).double(), observations[0].double()
    change = precise(state + 1e-4 * step) - precise(state)
    torch.testing.assert_close((slope @ step).double(), change / 1e-4, rtol=1e-2, atol=1e-4)


# Behavior cloning


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_behavior_clone_is_full_batch_sgd(momentum: float) -> None:
    synthetic = make_set(low=-0.5, high=2.0)
    settings = {"inner_steps": 7, "inner_lr": 0.2, "inner_momentum": momentum, "hidden": (9, 5), "gain": 1.5}
    policy = behavior_clone(synthetic, seed=3, **settings)
    generator = torch.Generator().manual_seed(3)
    params = [p[0].double() for p in orthogonal_parameters((4, 9, 5, 2), gain=1.5, generators=[generator])]
    params = [p.requires_grad_() for p in params]
    observations = synthetic.observations.astype(np.float64)
    states = torch.from_numpy((observations - observations.mean(0)) / (observations.std(0) + 1e-3))
    targets = torch.from_numpy((synthetic.actions.astype(np.float64) + 0.5) / 2.5 * 2 - 1)
    optimizer = torch.optim.SGD(params, lr=0.2, momentum=momentum)
    for _ in range(7):
        optimizer.zero_grad()
        hidden = torch.relu(states @ params[0].T + params[1])
        hidden = torch.relu(hidden @ params[2].T + params[3])
        (torch.tanh(hidden @ params[4].T + params[5]) - targets).square().mean().backward()
        optimizer.step()
    for trained, expected in zip(policy.parameters(), params, strict=True):
        torch.testing.assert_close(trained[0].double(), expected.detach(), atol=1e-5, rtol=1e-5)


def test_behavior_clone_learns_and_respects_bounds() -> None:
    synthetic = make_set(n=64, low=-0.4, high=0.4)
    policy = behavior_clone(synthetic, inner_steps=400, hidden=(64, 64))
    with torch.no_grad():
        predicted = policy(torch.as_tensor(synthetic.observations)).numpy()
        far = policy(1e4 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))).numpy()
    assert np.abs(predicted).max() <= np.float32(0.4)
    assert np.abs(far).max() <= np.float32(0.4)
    assert np.abs(predicted - synthetic.actions).mean() < 0.05


def test_behavior_clone_of_a_set_without_settings_takes_the_defaults_of_a_distillation() -> None:
    bare, configured = behavior_clone(make_set()), behavior_clone(make_set(config=DistillConfig().to_dict()))
    assert same(bare, configured)
    written = {"hidden": (256, 256, 256), "gain": 1.0, "inner_steps": 100, "inner_lr": 0.1, "inner_momentum": 0.9}
    assert same(bare, behavior_clone(make_set(), **written, seed=0))


@pytest.mark.parametrize("name", list(SMALL))
def test_each_setting_reaches_the_result(name: str) -> None:
    base = behavior_clone(make_set(), **SMALL)
    changed = behavior_clone(make_set(), **{**SMALL, name: OTHER[name]})
    assert not same(base, changed)
    # the set's own settings stand where nothing is given, and give way to what is
    assert same(behavior_clone(make_set(config=SMALL)), base)
    assert same(behavior_clone(make_set(config={**SMALL, name: OTHER[name]})), changed)
    assert same(behavior_clone(make_set(config=SMALL), **{name: OTHER[name]}), changed)


@pytest.mark.parametrize("name", list(SMALL))
def test_a_setting_that_the_set_lacks_is_the_default(name: str) -> None:
    own = {key: value for key, value in SMALL.items() if key != name}
    default = getattr(DistillConfig(), name)
    assert same(behavior_clone(make_set(config=own)), behavior_clone(make_set(), **{**own, name: default}))


def test_settings_of_the_distillation_alone_do_not_matter() -> None:
    config = {**SMALL, "hidden": [6, 5], "inner_width": 3, "steps": 7, "lr": 0.9, "seed": 5, "a later setting": 1}
    assert same(behavior_clone(make_set(config=config)), behavior_clone(make_set(), **SMALL))


def test_behavior_clone_follows_its_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = behavior_clone(make_set(), seed=2, **SMALL)
    MLPPolicy(list(first.net.parameters()), first.units)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]  # noqa: NPY002
    torch.manual_seed(7)
    assert same(first, behavior_clone(make_set(), seed=2, **SMALL))
    assert not same(first, behavior_clone(make_set(), seed=3, **SMALL))
    assert same(behavior_clone(make_set(), **SMALL), behavior_clone(make_set(), seed=0, **SMALL))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_policies_train_and_act_on_the_gpu() -> None:
    before = torch.cuda.get_rng_state()
    policy = behavior_clone(make_set(), device="cuda", **SMALL)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    observations = torch.from_numpy(make_set().observations)
    actions = policy(observations.cuda())
    torch.testing.assert_close(policy.cpu()(observations), actions.cpu())


def test_divergence_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match="diverged"):
        behavior_clone(make_set(), inner_steps=50, inner_lr=1e30)


@pytest.mark.parametrize(("name", "value"), [("inner_steps", 0), ("inner_lr", -1.0), ("inner_momentum", 1.0)])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        behavior_clone(make_set(), **{name: value})
