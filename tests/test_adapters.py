"""Policies of other libraries as teachers: they act and value as in their library, in environment units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sdw_fast.teacher import Teacher
from sdw_fast.units import Affine, Discrete, Units


@pytest.fixture
def states() -> np.ndarray:
    """States of Pendulum, whose actions lie in [−2, 2]."""
    return (np.random.default_rng(0).normal(size=(200, 3)) * [1, 1, 5]).astype(np.float32)


# stable-baselines3


def sb3_model(name: str, env: Any = "Pendulum-v1", **options: Any) -> Any:
    sb3 = pytest.importorskip("stable_baselines3")
    return getattr(sb3, name)("MlpPolicy", env, seed=0, device="cpu", **options)


SQUASHED = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
MODELS = [
    ("SAC", {}),
    ("SAC", {"use_sde": True}),
    ("TD3", {}),
    ("DDPG", {}),
    ("PPO", {}),
    ("A2C", {}),
    ("PPO", SQUASHED),
]


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_an_sb3_model_acts_as_its_predict(states: np.ndarray, name: str, options: dict) -> None:
    model = sb3_model(name, **options)
    if name in ("PPO", "A2C"):  # their fresh networks hardly move from 0
        nn.init.normal_(model.policy.action_net.weight)
    teacher = Teacher.from_sb3(model)
    actions, _ = model.predict(states, deterministic=True)
    assert np.abs(actions).max() > 0.5
    np.testing.assert_allclose(teacher.actions(states), actions, atol=1e-6)
    wide = Units(Affine(np.zeros(3), np.ones(3)), Affine.between([-4], [4]))
    np.testing.assert_allclose(teacher.label(states, wide, values=False)[0], actions / 4, atol=1e-6)


@pytest.mark.parametrize("name", ["SAC", "TD3", "DDPG"])
def test_an_sb3_model_values_actions_by_its_smallest_critic(states: np.ndarray, name: str) -> None:
    model = sb3_model(name)
    actions = np.random.default_rng(1).uniform(-2, 2, (200, 1)).astype(np.float32)
    with torch.no_grad():
        critics = torch.stack(model.critic(torch.from_numpy(states), torch.from_numpy(actions / 2)))
    np.testing.assert_allclose(Teacher.from_sb3(model).values(states, actions), critics.amin(0).squeeze(1), atol=1e-6)
    assert len(critics) == (1 if name == "DDPG" else 2)


def test_an_sb3_model_without_q_serves_pbc_only(states: np.ndarray) -> None:
    teacher = Teacher.from_sb3(sb3_model("PPO"))
    with pytest.raises(ValueError, match=r"no critic.*'pbc'"):
        teacher.values(states, states[:, :1])


def test_statistics_of_a_vecnormalize_are_applied(states: np.ndarray) -> None:
    pytest.importorskip("stable_baselines3")
    import gymnasium as gym
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), clip_obs=1.5)
    env.obs_rms.mean, env.obs_rms.var = np.array([0.5, -0.5, 2.0]), np.array([0.1, 2.0, 30.0])
    model = sb3_model("SAC", env)
    actions, _ = model.predict(env.normalize_obs(states), deterministic=True)
    np.testing.assert_allclose(Teacher.from_sb3(model).actions(states), actions, atol=1e-6)
    assert np.abs(model.predict(states, deterministic=True)[0] - actions).max() > 0.1
    env.norm_obs = False
    plain, _ = model.predict(states, deterministic=True)
    np.testing.assert_allclose(Teacher.from_sb3(model).actions(states), plain, atol=1e-6)


def test_sb3_models_that_cannot_teach_are_refused() -> None:
    with pytest.raises(TypeError, match=r"from_sb3 takes a stable-baselines3 model, such as SAC.load\(path\), got str"):
        Teacher.from_sb3("model.zip")
    with pytest.raises(ValueError, match=r"observation space Discrete\(16\)"):
        Teacher.from_sb3(sb3_model("PPO", "FrozenLake-v1"))


def test_an_sb3_model_of_discrete_actions_acts_and_values_by_numbers() -> None:
    states = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    model = sb3_model("DQN", "CartPole-v1")
    nn.init.normal_(model.q_net.q_net[-1].weight)  # a fresh one takes one action everywhere
    teacher, numbers = Teacher.from_sb3(model), np.arange(200) % 2
    greedy, _ = model.predict(states, deterministic=True)
    assert set(greedy) == {0, 1}
    np.testing.assert_array_equal(teacher.actions(states), greedy)
    with torch.no_grad():
        q = model.q_net(torch.from_numpy(states)).numpy()
    np.testing.assert_allclose(teacher.values(states, numbers), q[np.arange(200), numbers], atol=1e-6)
    targets, values = teacher.label(states, Units(Affine(np.zeros(4), np.ones(4)), Discrete(2)), values=True)
    np.testing.assert_array_equal(targets, np.eye(2)[greedy])
    np.testing.assert_allclose(values, q.max(1), atol=1e-6)


def test_an_sb3_model_with_probabilities_teaches_them() -> None:
    states = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    model = sb3_model("PPO", "CartPole-v1")
    nn.init.normal_(model.policy.action_net.weight)
    with torch.no_grad():
        wanted = model.policy.get_distribution(torch.from_numpy(states)).distribution.probs.numpy()
    np.testing.assert_allclose(Teacher.from_sb3(model).actions(states), wanted, atol=1e-6)
    assert np.ptp(wanted[:, 0]) > 0.1


# TorchRL


class Q(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([states, actions], dim=-1))


def test_torchrl_modules_give_the_deterministic_action_and_the_smallest_value(states: np.ndarray) -> None:
    pytest.importorskip("torchrl")
    from tensordict.nn import NormalParamExtractor, TensorDictModule
    from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator

    net = nn.Sequential(nn.Linear(3, 2), NormalParamExtractor())
    bounds = {"low": -2.0, "high": 2.0}
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs=bounds,
        return_log_prob=True,
    )
    critics = [Q(), Q()]
    teacher = Teacher.from_torchrl(actor, [ValueOperator(q, in_keys=["observation", "action"]) for q in critics])
    with torch.no_grad():
        expected = 2 * torch.tanh(net(torch.from_numpy(states))[0])
        values = torch.cat([q(torch.from_numpy(states), expected) for q in critics], 1).amin(1)
    np.testing.assert_allclose(teacher.actions(states), expected, atol=1e-5)
    np.testing.assert_allclose(teacher.values(states, expected.numpy()), values, atol=1e-5)
    one = Teacher.from_torchrl(actor, ValueOperator(critics[0], in_keys=["observation", "action"]))
    assert (one.values(states, expected.numpy()) >= values.numpy() - 1e-5).all()
    assert Teacher.from_torchrl(actor).critic is None
    with pytest.raises(TypeError, match=r"from_torchrl takes modules on TensorDicts, .* got Linear"):
        Teacher.from_torchrl(nn.Linear(3, 1))


# d3rlpy


@pytest.mark.parametrize("scaled", [False, True])
def test_a_d3rlpy_algorithm_acts_as_its_predict(states: np.ndarray, scaled: bool) -> None:
    d3rlpy = pytest.importorskip("d3rlpy")
    scalers = {}
    if scaled:
        scalers["observation_scaler"] = d3rlpy.preprocessing.StandardObservationScaler(
            mean=np.array([0.5, 0, 1], np.float32), std=np.array([2, 1, 5], np.float32)
        )
        scalers["action_scaler"] = d3rlpy.preprocessing.MinMaxActionScaler(
            minimum=np.array([-2], np.float32), maximum=np.array([2], np.float32)
        )
    algo = d3rlpy.algos.TD3PlusBCConfig(**scalers).create(device="cpu")
    with pytest.raises(ValueError, match="no networks yet"):
        Teacher.from_d3rlpy(algo)
    algo.create_impl((3,), 1)
    teacher = Teacher.from_d3rlpy(algo)
    actions = algo.predict(states)
    np.testing.assert_allclose(teacher.actions(states), actions, atol=1e-6)
    values = teacher.values(states, actions)
    mean = algo.predict_value(states, actions)  # of the two critics, where ours is the smaller
    assert (values <= mean + 1e-6).all()
    assert (values < mean - 1e-6).any()


def test_d3rlpy_algorithms_that_cannot_teach_are_refused(states: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"from_d3rlpy takes a d3rlpy algorithm, .* got int"):
        Teacher.from_d3rlpy(3)
    d3rlpy = pytest.importorskip("d3rlpy")
    cloned = d3rlpy.algos.BCConfig().create()
    cloned.create_impl((3,), 1)
    assert Teacher.from_d3rlpy(cloned).critic is None
    table = d3rlpy.algos.DQNConfig().create()
    table.create_impl((3,), 2)
    with pytest.raises(ValueError, match="DQN has discrete actions"):
        Teacher.from_d3rlpy(table)
