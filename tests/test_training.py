"""train_teacher: against a plain loop of the papers' losses, on problems with known answers, and by seed."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdw_fast.config import TeacherConfig
from sdw_fast.data import TransitionDataset
from sdw_fast.readers import load_dataset
from sdw_fast.teacher import Teacher
from sdw_fast.training import train_teacher
from sdw_fast.version import __version__

TORCHRL = pytest.mark.skipif(importlib.util.find_spec("torchrl") is None, reason="needs torchrl")


def one_step_data(rows: int = 2000, bound: float = 1.0, reward_scale: float = 1.0) -> TransitionDataset:
    """Episodes of one step with reward −(a − s₀/2)²: the best action is s₀/2, and Q is the reward; |a| ≤ bound."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, size=(rows, 3)).astype(np.float32)
    actions = rng.uniform(-1, 1, size=(rows, 1)).astype(np.float32)
    return load_dataset(
        {
            "observations": observations,
            "actions": actions * bound,
            "rewards": reward_scale * -((actions - observations[:, :1] / 2) ** 2)[:, 0],
            "next_observations": observations,
            "terminations": np.ones(rows, dtype=bool),
            "truncations": np.zeros(rows, dtype=bool),
            "action_low": -bound,
            "action_high": bound,
            "env_id": "Test-v0",
        }
    )


def episodes(rows: int = 500) -> TransitionDataset:
    """Episodes of 10 steps, half of them cut; states and actions in units of their own, the bounds not symmetric."""
    rng = np.random.default_rng(1)
    ends = np.arange(rows) % 10 == 9
    observations = rng.normal(3, [0.1, 1, 40, 5], size=(rows + 1, 4)).astype(np.float32)
    return load_dataset(
        {
            "observations": observations[:-1],
            "actions": rng.uniform([-1, 0], [3, 0.5], size=(rows, 2)).astype(np.float32),
            "rewards": rng.normal(1, 2, size=rows).astype(np.float32),
            "next_observations": observations[1:],
            "terminations": ends & (np.arange(rows) % 20 == 9),
            "truncations": ends & (np.arange(rows) % 20 == 19),
            "action_low": [-1, 0],
            "action_high": [3, 0.5],
        }
    )


# The papers' algorithms, written out. Everything random is drawn from the seed in this order: the weights of the actor,
# of V and of both critics, then at each step the rows of the batch and the noise on the target's actions.

Networks = tuple[nn.Module, nn.Module, nn.Module]


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(sizes[0], 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, sizes[-1]))


def move(targets: list[nn.Module], networks: list[nn.Module]) -> None:
    with torch.no_grad():
        for target, network in zip(targets, networks, strict=True):
            for old, new in zip(target.parameters(), network.parameters(), strict=True):
                old.mul_(0.995).add_(new, alpha=0.005)


def adam(*networks: nn.Module | Tensor) -> torch.optim.Adam:
    leaves = [leaf for n in networks for leaf in ([n] if isinstance(n, Tensor) else n.parameters())]
    return torch.optim.Adam(leaves, lr=3e-4)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def normalized(data: TransitionDataset) -> dict[str, Tensor]:
    """Columns of the dataset as an algorithm sees them: states of mean 0 and deviation 1, actions in [−1, 1]."""
    mean, std = data.observations.mean(axis=0, dtype=np.float64), data.observations.std(axis=0, dtype=np.float64)
    low, high = data.action_bounds
    columns = {
        "s": (data.observations - mean) / (std + 1e-3),
        "a": (data.actions - low) / (high - low) * 2 - 1,
        "r": data.rewards,
        "next": (data.next_observations() - mean) / (std + 1e-3),
        "goes_on": 1 - data.terminations.astype(np.float32),
    }
    return {name: torch.from_numpy(np.asarray(column, dtype=np.float32)) for name, column in columns.items()}


def td3bc(data: TransitionDataset, config: TeacherConfig) -> Networks:
    """Fujimoto and Gu 2021: the actor every second step, by −α / mean|Q₁| · Q₁(s, π(s)) + (π(s) − a)²."""
    columns = normalized(data)
    states, actions = columns["s"].shape[1], columns["a"].shape[1]
    actor, q1, q2 = mlp(states, actions), mlp(states + actions, 1), mlp(states + actions, 1)
    networks = [actor, q1, q2]
    targets = copy.deepcopy(networks)
    actor_optimizer, critic_optimizer = adam(actor), adam(q1, q2)
    for step in range(1, config.steps + 1):
        rows = torch.randint(len(data), (256,))
        s, a, r, following, goes_on = (columns[name][rows] for name in ("s", "a", "r", "next", "goes_on"))
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(a)).clamp(-0.5, 0.5)
            chosen = (targets[0](following).tanh() + noise).clamp(-1, 1)
            pair = torch.cat([following, chosen], dim=1)
            y = r + 0.99 * goes_on * torch.minimum(targets[1](pair), targets[2](pair)).squeeze(1)
        pair = torch.cat([s, a], dim=1)
        descend(sum((q(pair).squeeze(1) - y).square().mean() for q in (q1, q2)), critic_optimizer)
        if step % 2 == 0:
            pi = actor(s).tanh()
            q = q1(torch.cat([s, pi], dim=1)).squeeze(1)
            loss = -config.alpha / q.detach().abs().mean() * q.mean() + (pi - a).square().mean()
            descend(loss, actor_optimizer)
            move(targets, networks)
    return actor, q1, q2


def iql(data: TransitionDataset, config: TeacherConfig) -> Networks:
    """Kostrikov et al. 2022: V by expectile regression on Q, Q by V, the actor by advantage-weighted cloning."""
    columns = normalized(data)
    scale = 1 / columns["r"].abs().mean()
    states, actions = columns["s"].shape[1], columns["a"].shape[1]
    actor, v, q1, q2 = mlp(states, actions), mlp(states, 1), mlp(states + actions, 1), mlp(states + actions, 1)
    log_std = torch.zeros(actions, requires_grad=True)
    targets = copy.deepcopy([q1, q2])
    actor_optimizer, critic_optimizer = adam(actor, log_std), adam(q1, q2, v)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(actor_optimizer, config.steps)
    for _ in range(config.steps):
        rows = torch.randint(len(data), (256,))
        s, a, r, following, goes_on = (columns[name][rows] for name in ("s", "a", "r", "next", "goes_on"))
        pair = torch.cat([s, a], dim=1)
        with torch.no_grad():
            y = scale * r + 0.99 * goes_on * v(following).squeeze(1)
            q = torch.minimum(targets[0](pair), targets[1](pair)).squeeze(1)
        advantage = q - v(s).squeeze(1)
        expectile = torch.where(advantage > 0, config.expectile, 1 - config.expectile)
        critic_loss = (expectile * advantage.square()).mean()
        critic_loss = critic_loss + sum((network(pair).squeeze(1) - y).square().mean() for network in (q1, q2))
        policy = torch.distributions.Normal(actor(s).tanh(), log_std.exp())
        weight = (config.temperature * advantage.detach()).exp().clamp(max=100)
        descend(-(weight * policy.log_prob(a).sum(dim=1)).mean(), actor_optimizer)
        descend(critic_loss, critic_optimizer)
        schedule.step()
        move(targets, [q1, q2])
    with torch.no_grad():
        for network in (q1, q2):
            network[4].weight /= scale
            network[4].bias /= scale
    return actor, q1, q2


REFERENCES: dict[str, Callable[[TransitionDataset, TeacherConfig], Networks]] = {"td3bc": td3bc, "iql": iql}


@TORCHRL
@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("td3bc", {"seed": 3, "steps": 1}),
        ("td3bc", {"seed": 3, "steps": 7}),
        ("td3bc", {"seed": 4, "steps": 4, "alpha": 40.0}),
        ("iql", {"seed": 3, "steps": 7}),
        ("iql", {"seed": 4, "steps": 4, "expectile": 0.95}),
        ("iql", {"seed": 5, "steps": 4, "temperature": 0.2}),
    ],
)
def test_training_is_the_papers_algorithm(algorithm: str, settings: dict[str, Any]) -> None:
    data = episodes()
    teacher = train_teacher(data, algorithm, progress=False, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(settings["seed"])
        actor, q1, q2 = REFERENCES[algorithm](data, TeacherConfig(algorithm, **settings))
    columns, (low, high) = normalized(data), data.action_bounds
    with torch.no_grad():
        expected = actor(columns["s"]).tanh()
        pair = torch.cat([columns["s"], expected], dim=1)
        values = torch.minimum(q1(pair), q2(pair)).squeeze(1).numpy()
    actions = low + (high - low) * (expected.numpy() + 1) / 2
    np.testing.assert_allclose(teacher.actions(data.observations), actions, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(teacher.values(data.observations, actions), values, rtol=1e-3, atol=1e-3)


@TORCHRL
def test_settings_default_to_those_documented() -> None:
    data = episodes()
    bare, written = (
        train_teacher(data, *given, steps=3, progress=False, **settings)
        for given, settings in (((), {}), (("td3bc",), {"alpha": 2.5, "seed": 0}))
    )
    np.testing.assert_array_equal(bare.actions(data.observations), written.actions(data.observations))
    bare, written = (
        train_teacher(data, "iql", steps=3, progress=False, **settings)
        for settings in ({}, {"expectile": 0.7, "temperature": 3.0, "seed": 0})
    )
    np.testing.assert_array_equal(bare.actions(data.observations), written.actions(data.observations))
    actions = bare.actions(data.observations)
    np.testing.assert_array_equal(bare.values(data.observations, actions), written.values(data.observations, actions))


# Problems with known answers


@TORCHRL
@pytest.mark.parametrize(("algorithm", "bound"), [("td3bc", 1.0), ("iql", 2.5)])
def test_training_improves_on_the_behavior(algorithm: str, bound: float) -> None:
    data = one_step_data(bound=bound)
    teacher = train_teacher(data, algorithm, steps=200, seed=1, alpha=10.0, progress=False)
    actions = teacher.actions(data.observations)
    regret = ((actions / bound - data.observations[:, :1] / 2) ** 2).mean()
    assert regret < 0.1 * -data.rewards.mean()
    values = teacher.values(data.observations, data.actions)
    assert np.corrcoef(values, data.rewards)[0, 1] > 0.95
    assert abs(values.mean() - data.rewards.mean()) < 0.1 * abs(data.rewards.mean())  # in the units of the rewards
    assert teacher.units == data.units


@TORCHRL
def test_iql_does_not_depend_on_the_scale_of_the_rewards() -> None:
    small, large = (
        train_teacher(one_step_data(300, reward_scale=scale), "iql", steps=5, progress=False) for scale in (1.0, 1024.0)
    )
    data = one_step_data(300)
    np.testing.assert_allclose(large.actions(data.observations), small.actions(data.observations), rtol=1e-4, atol=1e-5)
    values = [teacher.values(data.observations, data.actions) for teacher in (small, large)]
    np.testing.assert_allclose(values[1], 1024 * values[0], rtol=1e-3)


@TORCHRL
def test_training_bootstraps_past_truncation_but_not_past_termination() -> None:
    """Reward 1 a step: an episode that only was cut has discounted value to come, one that ended has none."""
    rng = np.random.default_rng(0)
    observations = rng.choice([-1.0, 1.0], size=(1000, 1)).astype(np.float32)
    data = load_dataset(
        {
            "observations": observations,
            "actions": rng.uniform(-1, 1, size=(1000, 1)).astype(np.float32),
            "rewards": np.ones(1000, dtype=np.float32),
            "next_observations": observations,
            "terminations": observations[:, 0] < 0,
            "truncations": observations[:, 0] > 0,
        }
    )
    for algorithm in ("td3bc", "iql"):
        teacher = train_teacher(data, algorithm, steps=120, seed=0, progress=False)
        values = teacher.values(data.observations, data.actions)
        ended, cut = values[data.terminations].mean(), values[data.truncations].mean()
        assert abs(ended - 1) < 0.1
        assert cut > 1.15  # 1 without the bootstrap, on its way to 1 / (1 − 0.99) with it


# Seeds and provenance


@TORCHRL
@pytest.mark.parametrize("algorithm", ["td3bc", "iql"])
def test_training_repeats_by_seed(algorithm: str) -> None:
    data = one_step_data(300)
    torch.manual_seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = train_teacher(data, algorithm, steps=6, seed=3, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]  # noqa: NPY002
    torch.manual_seed(6)
    again = train_teacher(data, algorithm, steps=6, seed=3, progress=False)
    other = train_teacher(data, algorithm, steps=6, seed=4, progress=False)
    actions = first.actions(data.observations)
    np.testing.assert_array_equal(again.actions(data.observations), actions)
    np.testing.assert_array_equal(again.values(data.observations, actions), first.values(data.observations, actions))
    assert not np.array_equal(other.actions(data.observations), actions)


@TORCHRL
def test_training_that_diverges_stops_and_leaves_the_random_state_alone() -> None:
    data = one_step_data(300)
    data = replace(data, rewards=np.full(300, 3e38, dtype=np.float32))
    before = torch.random.get_rng_state()
    with pytest.raises(FloatingPointError, match=r"had diverged by step 5: .* check the rewards' scale"):
        train_teacher(data, "td3bc", steps=5, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@TORCHRL
def test_training_leaves_the_gpus_random_state_alone() -> None:
    before = torch.cuda.get_rng_state()
    train_teacher(one_step_data(300), steps=1, progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@TORCHRL
@pytest.mark.parametrize("algorithm", ["td3bc", "iql"])
def test_provenance_says_how_the_teacher_was_made(algorithm: str, tmp_path: Any) -> None:
    data = replace(one_step_data(300), name="one step")
    settings = {"steps": 2, "seed": 11, "alpha": 3.0, "expectile": 0.8, "temperature": 2.0}
    teacher = train_teacher(data, algorithm, progress=False, **settings)
    assert teacher.provenance == {
        "algorithm": algorithm,
        **settings,
        "env_id": "Test-v0",
        "dataset": "one step",
        "dataset_hash": data.content_hash,
        "transitions": 300,
        "sdw_fast": __version__,
        "torch": torch.__version__,
    }
    json.dumps(teacher.provenance)
    teacher.save(tmp_path / "t.safetensors")
    assert Teacher.load(tmp_path / "t.safetensors").provenance == teacher.provenance


def test_the_progress_bar_shows_the_losses(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchrl")
    train_teacher(one_step_data(300), "iql", steps=2)
    shown = capsys.readouterr().err
    assert "training the teacher (iql)" in shown
    assert all(f"{name}=" in shown for name in ("critic", "value", "actor", "Q"))
    train_teacher(one_step_data(300), "td3bc", steps=2, progress=False)
    assert capsys.readouterr().err == ""


# Refusals


def test_training_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    data = one_step_data(50)
    with pytest.raises(ValueError, match=r"\['td3bc', 'iql'\], got 'sac'"):
        train_teacher(data, "sac", steps=1)
    for settings in ({"steps": 0}, {"expectile": 1.5}, {"expectile": 0.3}, {"alpha": 0.0}, {"temperature": -1.0}):
        ((name, value),) = settings.items()
        with pytest.raises(ValueError, match=rf"{name} must .*got {value}"):
            train_teacher(data, "iql", **{"steps": 1, **settings})
    with pytest.raises(TypeError, match="learning_rate"):
        train_teacher(data, steps=1, learning_rate=1e-3)
    unbounded = load_dataset(
        {
            "observations": data.observations,
            "actions": data.actions * 3,
            "rewards": data.rewards,
            "next_observations": data.observations,
            "terminations": data.terminations,
        }
    )
    with pytest.raises(ValueError, match="action bounds"):
        train_teacher(unbounded, steps=1)
    monkeypatch.setitem(sys.modules, "torchrl.objectives", None)
    with pytest.raises(ImportError, match=r'pip install "sdw_fast\[teacher\]"'):
        train_teacher(one_step_data(50), steps=1)


@TORCHRL
def test_a_dead_teacher_is_not_returned() -> None:
    """States that differ by rounding only: no network tells them apart."""
    rng = np.random.default_rng(0)
    data = load_dataset(
        {
            "observations": 1 + 1e-7 * rng.normal(size=(200, 3)),
            "actions": rng.uniform(-1, 1, size=(200, 1)),
            "rewards": np.ones(200),
            "terminations": np.zeros(200, dtype=bool),
            "next_observations": 1 + 1e-7 * rng.normal(size=(200, 3)),
        }
    )
    with pytest.raises(ValueError, match="dead teacher: its actions are the same"):
        train_teacher(data, steps=1, progress=False)
