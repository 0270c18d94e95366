"""Discrete actions from end to end: numbers in a dataset, probabilities in a set, numbers from its policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from test_cli import run
from test_minari import make_minari

import sdw_fast as sdw
from sdw_fast.distiller import Distiller
from sdw_fast.environments import check_environment
from sdw_fast.objectives import outer_problem
from sdw_fast.units import Affine, Discrete, Units

ENV = "CartPole-v1"
SETTINGS: dict[str, Any] = {"size": 16, "hidden": (16,), "inner_steps": 15, "batch_size": 64, "density": False}


def balanced(observations: torch.Tensor) -> torch.Tensor:
    """A controller of the pole, which holds it for some hundred steps."""
    return (3 * observations[:, 2] + observations[:, 3] > 0).long()


@pytest.fixture(autouse=True)
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """600 transitions of the controller in CartPole, a third of its actions drawn at random."""
    env, rng = gym.make(ENV), np.random.default_rng(0)
    rows = []
    observation, _ = env.reset(seed=0)
    for _ in range(600):
        action = int(balanced(torch.from_numpy(observation)[None]))
        action = int(rng.integers(2)) if rng.random() < 1 / 3 else action
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, terminated, truncated, following))
        observation = env.reset()[0] if terminated or truncated else following
    names = ("observations", "actions", "rewards", "terminations", "truncations", "next_observations")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.fixture(scope="module")
def data(arrays: dict[str, np.ndarray]) -> sdw.TransitionDataset:
    return sdw.load_dataset(dict(arrays), env_id=ENV)


def test_a_number_is_a_probability_of_one_by_hand() -> None:
    actions = Discrete(3, start=5)
    expected = np.array([[0, 0, 1], [1, 0, 0]], np.float32)
    np.testing.assert_array_equal(actions.normalize(np.array([7, 5])), expected)
    np.testing.assert_array_equal(actions.normalize(expected), expected)
    assert actions.chosen(torch.tensor([[0.1, 0.2, 0.7], [3.0, -1.0, 2.0]])).tolist() == [7, 5]
    assert Units.from_dict(Units(Affine(np.zeros(2), np.ones(2)), actions).to_dict()).actions == actions
    for wrong, message in (
        (np.array([4]), "from 5 to 7"),
        (np.array([[0.5, 0.6, 0.1]]), "add up to 1"),
        (np.array([[np.nan, 0.5, 0.5]]), "add up to 1"),
        (np.array([[0, 1]]), r"integers \(M,\), or probabilities \(M, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            actions.normalize(wrong)


@pytest.mark.parametrize("source", ["dict", "column", "uint8", "n_actions", "npz", "hdf5", "minari"])
def test_every_source_gives_numbers_and_how_many_there_are(
    arrays: dict[str, np.ndarray], source: str, tmp_path: Path
) -> None:
    values: Any = dict(arrays)
    if source == "n_actions":
        values = {**arrays, "n_actions": 2}
    elif source in ("column", "uint8"):
        values["actions"] = arrays["actions"][:, None] if source == "column" else arrays["actions"].astype(np.uint8)
    elif source == "npz":
        values = tmp_path / "data.npz"
        np.savez(values, **arrays, n_actions=2)
    elif source == "hdf5":
        values = tmp_path / "data.hdf5"
        with h5py.File(values, "w") as file:
            for name, array in {**arrays, "env_id": ENV}.items():
                file[name] = array
    elif source == "minari":
        step = {"rewards": np.zeros(600), "terminations": np.zeros(600, bool), "truncations": np.arange(600) == 599}
        states = np.concatenate([arrays["observations"], arrays["observations"][:1]])
        episode = {"observations": states, "actions": arrays["actions"], **step}
        values = make_minari(
            "toy/discrete-v0",
            [episode],
            action_space=gym.spaces.Discrete(2),
            observation_space=gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
        )
    data = sdw.load_dataset(values, env_id=ENV if source in ("dict", "column", "uint8") else None)
    assert data.units.actions == Discrete(2)
    assert data.units.head == "softmax"
    assert data.actions.dtype == np.int64
    np.testing.assert_array_equal(data.actions, arrays["actions"])
    assert data.summary()["action_dim"] == 2
    assert sdw.data.concatenate([data, data.subset(slice(10))]).units.actions == Discrete(2)


@pytest.mark.parametrize(
    ("changes", "env_id", "message"),
    [
        ({}, None, "nothing says how many there are: give n_actions"),
        ({"n_actions": 1}, None, "must be numbers from 0 to 0, as there are 1 discrete actions; got 0 to 1"),
        ({"n_actions": 2.5}, None, "n of discrete actions must be an integer, got 2.5"),
        ({}, "Pendulum-v1", "nothing says how many there are"),
        ({"actions": np.zeros((600, 1), np.float32)}, ENV, "2 discrete actions, and the dataset's are float32"),
        ({"actions": np.zeros((600, 2), int)}, ENV, "MultiDiscrete"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    arrays: dict[str, np.ndarray], changes: dict[str, Any], env_id: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sdw.load_dataset({**arrays, **changes}, env_id=env_id)


def test_a_set_holds_probabilities_and_its_policies_act_in_the_environment(
    data: sdw.TransitionDataset, tmp_path: Path
) -> None:
    syn = sdw.distill(data, objective="dbc", steps=20, progress=False, **SETTINGS)
    assert syn.actions.shape == (16, 2)
    assert (syn.actions > 0).all()
    np.testing.assert_allclose(syn.actions.sum(axis=1), 1, atol=1e-5)
    again = sdw.SyntheticDataset.load(syn.save(tmp_path / "set"))
    assert again.units == syn.units
    np.testing.assert_array_equal(again.actions, syn.actions)
    policy = sdw.behavior_clone(again, ensemble=2)
    observations = torch.from_numpy(data.observations)
    actions = policy(observations)
    assert actions.dtype == torch.int64
    torch.testing.assert_close(actions, policy.logits(observations).argmax(1))
    assert policy(observations[0]).shape == ()
    torch.testing.assert_close(policy.logits(observations).exp().sum(1), torch.ones(600))
    for other in (sdw.MLPPolicy.load(policy.save(tmp_path / "policy.safetensors")), torch.jit.script(policy)):
        assert torch.equal(other(observations), actions)
    assert sdw.evaluate(policy, ENV, episodes=1).mean > 0
    exported = syn.to_minari("toy/set-v0")
    assert isinstance(exported.action_space, gym.spaces.Discrete)
    np.testing.assert_array_equal(sdw.load_dataset(exported).actions, syn.actions.argmax(1))


def test_distillation_lowers_the_outer_loss_and_resumes_to_the_same_bits(data: sdw.TransitionDataset) -> None:
    config = sdw.DistillConfig(objective="dbc", steps=60, **SETTINGS)
    problem, start = outer_problem(data, config=config), sdw.real_pairs(data, 16)
    distiller = Distiller(problem, start, config)
    losses = [distiller.step()["loss"] for _ in range(30)]
    state = distiller.state_dict()
    losses += [distiller.step()["loss"] for _ in range(30)]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    resumed = Distiller(problem, start, config)
    resumed.load_state_dict(state)
    assert [resumed.step()["loss"] for _ in range(30)] == losses[30:]
    np.testing.assert_array_equal(resumed.synthetic.actions, distiller.synthetic.actions)


def test_numbers_start_where_the_environment_says(arrays: dict[str, np.ndarray]) -> None:
    gym.register(
        "Shifted-v0",
        lambda: gym.wrappers.TransformAction(
            gym.make(ENV).unwrapped, lambda action: action - 3, gym.spaces.Discrete(2, start=3)
        ),
        max_episode_steps=20,
    )
    data = sdw.load_dataset({**arrays, "actions": arrays["actions"] + 3}, env_id="Shifted-v0")
    assert data.units.actions == Discrete(2, start=3)
    policy = sdw.behavior_clone(sdw.real_pairs(data, 16), hidden=(8,), inner_steps=5)
    assert set(policy(torch.from_numpy(data.observations)).tolist()) <= {3, 4}
    assert sdw.evaluate(policy, "Shifted-v0", episodes=1).mean > 0
    with pytest.raises(ValueError, match=r"its actions are Discrete\(2\), and those of the data 2 .* from 3"):
        check_environment(data.units, ENV)


@pytest.mark.parametrize("kind", ["numbers", "probabilities"])
def test_a_teacher_says_numbers_or_probabilities_and_values_numbers(data: sdw.TransitionDataset, kind: str) -> None:
    def actor(states: torch.Tensor) -> torch.Tensor:
        chosen = balanced(states)
        return chosen if kind == "numbers" else 0.1 + 0.8 * torch.nn.functional.one_hot(chosen, 2).float()

    def critic(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        assert actions.dtype == torch.int64
        return 10 + states[:, 0] + (actions == balanced(states))

    teacher = sdw.Teacher(actor, critic)
    expected = balanced(torch.from_numpy(data.observations)).numpy()
    problem = outer_problem(data, teacher, sdw.DistillConfig(objective="av-pbc"))
    assert "teacher_agreement" not in problem.report  # it is of continuous actions
    np.testing.assert_array_equal(problem.targets.argmax(1), expected)
    assert problem.targets.max() == pytest.approx(1.0 if kind == "numbers" else 0.9)
    values = teacher.values(data.observations, data.actions)
    np.testing.assert_allclose(values, 10 + data.observations[:, 0] + (data.actions == expected), rtol=1e-6)
    assert len(sdw.real_pairs(data, 8, init="top-q", teacher=teacher)) == 8


@pytest.mark.parametrize(
    ("actor", "message"),
    [
        (lambda s: s[:, :2], "probabilities .*of logits take the softmax"),
        (lambda s: s, r"probabilities \(M, 2\)"),
        (lambda s: 2 + balanced(s), "numbers from 0 to 1"),
    ],
)
def test_other_answers_of_a_teacher_are_refused(data: sdw.TransitionDataset, actor: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        outer_problem(data, sdw.Teacher(actor), sdw.DistillConfig(objective="pbc"))


def test_what_needs_continuous_actions_says_so(data: sdw.TransitionDataset) -> None:
    with pytest.raises(ValueError, match="td3bc and iql train teachers of continuous actions"):
        sdw.train_teacher(data)
    with pytest.raises(ValueError, match="2 discrete actions have no bounds"):
        _ = data.action_bounds
    bounded = Units(Affine(np.zeros(4), np.ones(4)), Affine.between([-1], [1]))
    with pytest.raises(ValueError, match="logits are those of discrete actions"):
        sdw.MLPPolicy([torch.zeros(1, 4), torch.zeros(1)], bounded).logits(torch.zeros(4))
    with pytest.raises(ValueError, match="not be negative or NaN, and add up to 1"):
        sdw.SyntheticDataset(np.zeros((1, 4), np.float32), np.array([[0.5, 0.6]], np.float32), data.units)


def test_the_same_from_the_shell(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path, out = tmp_path / "data.npz", tmp_path / "run"
    np.savez(path, **arrays, env_id=ENV)
    options = {
        "objective": "dbc",
        "size": 8,
        "inner-steps": 5,
        "batch-size": 32,
        "steps": 2,
        "eval-every": 0,
        "out": out,
    }
    done = run("distill", path, *(f"--{name}={value}" for name, value in options.items()))
    assert done.exit_code == 0, done.output
    done = run("evaluate", out / "last.npz", "--episodes", 1, "--clones", 1)
    assert done.exit_code == 0, done.output
    assert "CartPole-v1" in done.output
