"""Teacher: units and batches, files, CORL checkpoints, dead networks, training."""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sdw_fast import teacher as module
from sdw_fast.data import Normalizer, TransitionDataset
from sdw_fast.evaluate import evaluate
from sdw_fast.teacher import MLP, MinCritic, Teacher, train_teacher

D, A = 5, 2


@pytest.fixture
def network_teacher() -> Teacher:
    """A teacher with random networks of odd widths, a normalizer and provenance."""
    torch.manual_seed(0)
    normalizer = Normalizer(mean=np.linspace(-1, 1, D), scale=np.linspace(0.3, 3, D))
    critics = [MLP([D + A, 9, 1], tanh=False), MLP([D + A, 13, 6, 1], tanh=False)]
    return Teacher(MLP([D, 7, 11, A], tanh=True), MinCritic(critics), normalizer=normalizer, provenance={"seed": 0})


@pytest.fixture
def states() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(203, D)).astype(np.float32)


# Units, types and batches


def test_case_by_hand() -> None:
    """Normalized states are (1, −1) and (2, 0); the actor doubles the first, the critic adds action and second."""
    teacher = Teacher(
        actor=lambda s: 2 * s[:, :1],
        critic=lambda s, a: a[:, 0] + s[:, 1],
        normalizer=Normalizer(mean=np.float32([10, 0]), scale=np.float32([5, 2])),
    )
    states = np.float32([[15, -2], [20, 0]])
    actions = teacher.actions(states)
    np.testing.assert_array_equal(actions, [[2], [4]])
    np.testing.assert_array_equal(teacher.values(states, actions), [1, 4])


def test_bounded_actions_by_hand() -> None:
    """The actor's −1, 0, 1 are 0, 3, 6 between the bounds 0 and 6; the critic sees them as −1, 0, 1 again."""
    teacher = Teacher(lambda s: s, lambda s, a: 10 * a[:, 0], action_bounds=([0], [6]))
    states = np.float32([[-1], [0], [1]])
    np.testing.assert_array_equal(teacher.actions(states), [[0], [3], [6]])
    np.testing.assert_array_equal(teacher.values(states, np.float32([[0], [3], [6]])), [-10, 0, 10])
    assert torch.equal(teacher.actions(torch.from_numpy(states)), torch.tensor([[0.0], [3.0], [6.0]]))
    with pytest.raises(ValueError, match="finite and positive"):
        Teacher(lambda s: s, action_bounds=([1], [-1]))


def test_values_are_the_minimum_over_the_critics(network_teacher: Teacher, states: np.ndarray) -> None:
    actions = network_teacher.actions(states)
    normalized = network_teacher.normalizer.normalize(states)
    inputs = torch.from_numpy(np.concatenate([normalized, actions], axis=1))
    first, second = (critic(inputs).squeeze(1).detach().numpy() for critic in network_teacher.critic.networks)
    assert (first < second).any()
    assert (second < first).any()
    np.testing.assert_allclose(network_teacher.values(states, actions), np.minimum(first, second), rtol=1e-6)


def test_arrays_give_arrays_and_tensors_give_tensors(network_teacher: Teacher, states: np.ndarray) -> None:
    actions = network_teacher.actions(states)
    values = network_teacher.values(states, actions)
    assert isinstance(actions, np.ndarray)
    assert actions.dtype == values.dtype == np.float32
    assert (actions.shape, values.shape) == ((len(states), A), (len(states),))
    tensor = torch.from_numpy(states)
    assert torch.equal(network_teacher.actions(tensor), torch.from_numpy(actions))
    assert torch.equal(network_teacher.values(tensor, torch.from_numpy(actions)), torch.from_numpy(values))
    assert not network_teacher.actions(tensor.requires_grad_()).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_keep_their_device(network_teacher: Teacher, states: np.ndarray) -> None:
    on_gpu = torch.from_numpy(states).cuda()
    actions = network_teacher.actions(on_gpu)
    assert actions.is_cuda
    assert network_teacher.values(on_gpu, actions).is_cuda


def test_batches_do_not_show(network_teacher: Teacher, states: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = network_teacher.actions(states)
    monkeypatch.setattr(module, "BATCH_ROWS", 17)
    sizes: list[int] = []
    network_teacher.actor.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    np.testing.assert_allclose(network_teacher.actions(states), whole, atol=1e-6)
    assert sizes == [17] * 11 + [16]


def test_unusual_but_sound_inputs(network_teacher: Teacher, states: np.ndarray) -> None:
    expected = network_teacher.actions(states)
    np.testing.assert_array_equal(network_teacher.actions(states.astype(np.float64)), expected)
    read_only = states.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(network_teacher.actions(read_only), expected)
    np.testing.assert_allclose(network_teacher.actions(np.asfortranarray(states)[::-2]), expected[::-2], atol=1e-6)
    assert network_teacher.actions(states[:0]).shape == (0, A)


def test_bad_inputs_are_refused(network_teacher: Teacher, states: np.ndarray) -> None:
    with pytest.raises(ValueError, match="5 dimensions, got 4"):
        network_teacher.actions(states[:, :4])
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        network_teacher.actions(states[0])
    with pytest.raises(ValueError, match="203 and 202"):
        network_teacher.values(states, network_teacher.actions(states)[1:])
    with pytest.raises(ValueError, match="NaN"):
        network_teacher.actions(np.where(np.arange(D) == 2, np.nan, states))
    with pytest.raises(TypeError, match="actor must be a callable"):
        Teacher(None)
    with pytest.raises(TypeError, match="critic must be a callable"):
        Teacher(lambda s: s, critic=3)


def test_callables_are_held_to_their_shapes(states: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"actions for 203 states must have shape .* got \(203,\)"):
        Teacher(lambda s: s[:, 0]).actions(states)
    with pytest.raises(ValueError, match=r"must have shape \(203,\), got \(203, 2\)"):
        Teacher(lambda s: s, lambda s, a: a).values(states, states[:, :A])
    column = Teacher(lambda s: s, lambda s, a: s[:, :1]).values(states, states[:, :A])
    np.testing.assert_array_equal(column, states[:, 0])


def test_without_critic_actions_work_and_values_name_the_objectives(states: np.ndarray) -> None:
    teacher = Teacher(actor=lambda s: s[:, :A])
    np.testing.assert_array_equal(teacher.actions(states), states[:, :A])
    with pytest.raises(ValueError, match=r"no critic.*'av-pbc' and 'sdw'.*'pbc'"):
        teacher.values(states, states[:, :A])


# Dead teachers


def test_dead_teachers_are_refused(states: np.ndarray) -> None:
    with pytest.raises(
        ValueError, match=r"dead teacher: its actions are the same \(\[0.5, -1.0\]\) for all 203 states"
    ):
        Teacher(lambda s: torch.tensor([0.5, -1.0]).expand(len(s), A)).actions(states)
    with pytest.raises(ValueError, match="dead teacher: its values are the same"):
        Teacher(lambda s: s[:, :A], lambda s, a: 0 * s[:, 0]).values(states, states[:, :A])
    with pytest.raises(ValueError, match="dead teacher: its actions are NaN or infinite for 203 of 203"):
        Teacher(lambda s: s / 0 - s / 0).actions(states)
    with pytest.raises(ValueError, match="dead teacher: its values are NaN or infinite for 1 of 203"):
        Teacher(lambda s: s, lambda s, a: 1 / (s[:, 0] - s[7, 0])).values(states, states[:, :A])


def test_living_teachers_are_not_refused(states: np.ndarray) -> None:
    constant = Teacher(lambda s: torch.ones(len(s), A), lambda s, a: torch.ones(len(s)))
    assert constant.actions(states[:5]).shape == (5, A)  # a few states may well share an action
    same = np.repeat(states[:1], 203, axis=0)
    assert constant.actions(same).shape == (203, A)  # and equal states must
    one_idle = Teacher(lambda s: torch.stack([torch.ones(len(s)), s[:, 0]], dim=1))
    assert one_idle.actions(states).shape == (203, A)


# Files


def test_save_and_load_keep_every_bit(network_teacher: Teacher, states: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "teacher.safetensors"
    network_teacher.save(path)
    loaded = Teacher.load(path)
    actions = network_teacher.actions(states)
    np.testing.assert_array_equal(loaded.actions(states), actions)
    np.testing.assert_array_equal(loaded.values(states, actions), network_teacher.values(states, actions))
    np.testing.assert_array_equal(loaded.normalizer.mean, network_teacher.normalizer.mean)
    np.testing.assert_array_equal(loaded.normalizer.scale, network_teacher.normalizer.scale)
    assert loaded.provenance == {"seed": 0}
    assert os.listdir(path.parent) == ["teacher.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # as readable as any file of the user
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["teacher"])
    assert description["networks"] == {"actor": [5, 7, 11, 2], "critic1": [7, 9, 1], "critic2": [7, 13, 6, 1]}


def test_save_without_critic_or_normalizer(states: np.ndarray, tmp_path: Path) -> None:
    teacher = Teacher(MLP([D, A], tanh=True), action_bounds=([-2, -1], [0.5, 3]))
    teacher.save(tmp_path / "t.safetensors")
    loaded = Teacher.load(tmp_path / "t.safetensors")
    assert loaded.critic is None
    assert loaded.normalizer is None
    np.testing.assert_array_equal(loaded.actions(states), teacher.actions(states))


def test_half_precision_halves_the_file(network_teacher: Teacher, states: np.ndarray, tmp_path: Path) -> None:
    network_teacher.save(tmp_path / "half.safetensors", half=True)
    loaded = Teacher.load(tmp_path / "half.safetensors")
    actions = loaded.actions(states)
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, network_teacher.actions(states), atol=5e-3)
    assert not np.array_equal(actions, network_teacher.actions(states))


def test_an_interrupted_save_leaves_the_old_file(
    network_teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "teacher.safetensors"
    network_teacher.save(path)
    before = path.read_bytes()

    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        network_teacher.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["teacher.safetensors"]


def test_arbitrary_callables_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="actor is function"):
        Teacher(lambda s: s).save(tmp_path / "t.safetensors")
    with pytest.raises(TypeError, match="critic Linear"):
        Teacher(MLP([D, A], tanh=True), nn.Linear(1, 1)).save(tmp_path / "t.safetensors")
    assert os.listdir(tmp_path) == []


def test_truncated_and_foreign_files_are_refused(network_teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no teacher file at .*teacher.safetensors"):
        Teacher.load(path)
    network_teacher.save(path)
    content = path.read_bytes()
    for length in (0, 5, 200, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"not a complete \.safetensors file"):
            Teacher.load(path)
    torch.save({"actor": {}}, path)
    with pytest.raises(ValueError, match="from_corl"):
        Teacher.load(path)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="holds no teacher"):
        Teacher.load(path)
    path.write_bytes(content)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del tensors["critic2.0.bias"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"holds no teacher.*0\.bias"):
        Teacher.load(path)


# The shipped teacher


def test_shipped_teacher_beats_the_behavior_policy() -> None:
    """It was measured at 86 ± 10 (normalized, 20 episodes); the data it learned from has a mean of 47."""
    pytest.importorskip("mujoco")
    teacher = Teacher.load(Path(module.__file__).parent / "assets" / "hopper-medium-teacher.safetensors")
    result = evaluate(teacher.actions, "Hopper-v5", episodes=4, seed=0)
    assert result.normalized_mean > 60
    states = np.random.default_rng(0).normal(size=(1000, 11)).astype(np.float32)
    states = teacher.normalizer.denormalize(states)
    values = teacher.values(states, teacher.actions(states))
    assert (values > 0).mean() > 0.9
    assert teacher.provenance["env_id"] == "Hopper-v5"


# CORL checkpoints


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def below(name: str, network: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for key, value in network.state_dict().items()}


MEAN, STD = np.linspace(-2, 2, D), np.linspace(0, 4, D)


def seen_by_networks(states: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((states - MEAN) / (STD + 1e-3)).float()


def test_cal_ql_checkpoint(states: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published OBD teachers: a tanh-Gaussian actor, twin critics, and a pickled module `__main__.Scalar`."""

    class Scalar(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.constant = nn.Parameter(torch.tensor(value))

    Scalar.__module__, Scalar.__qualname__ = "__main__", "Scalar"
    monkeypatch.setattr(sys.modules["__main__"], "Scalar", Scalar, raising=False)
    base, q1, q2 = mlp(D, 8, 6, 2 * A), mlp(D + A, 7, 1), mlp(D + A, 7, 1)
    checkpoint = {
        "actor": {
            **below("base_network", base),
            "log_std_multiplier.constant": torch.tensor(1.0),
            "log_std_offset.constant": torch.tensor(-1.0),
        },
        "critic1": below("network", q1),
        "critic2": below("network", q2),
        "sac_log_alpha": Scalar(0.5),
        "total_it": 1000,
    }
    torch.save(checkpoint, tmp_path / "c.pt")
    teacher = Teacher.from_corl(tmp_path / "c.pt", MEAN, STD)
    actions = torch.tanh(base(seen_by_networks(states))[:, :A])
    np.testing.assert_allclose(teacher.actions(states), actions.detach(), rtol=1e-4, atol=1e-5)
    inputs = torch.cat([seen_by_networks(states), actions], dim=1)
    expected = torch.minimum(q1(inputs), q2(inputs)).squeeze(1).detach()
    np.testing.assert_allclose(teacher.values(states, actions.detach().numpy()), expected, rtol=1e-4, atol=1e-4)

    teacher.save(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(Teacher.load(tmp_path / "t.safetensors").actions(states), teacher.actions(states))


def test_td3bc_and_iql_checkpoints(states: np.ndarray, tmp_path: Path) -> None:
    actor, q1, q2 = mlp(D, 8, A), mlp(D + A, 7, 1), mlp(D + A, 5, 1)
    critics = {"critic_1": below("net", q1), "critic_2": below("net", q2)}
    torch.save({"actor": below("net", actor), **critics}, tmp_path / "td3bc.pt")
    gaussian = {**below("net.net", actor), "log_std": torch.zeros(A)}
    twin = {**below("q1.net", q1), **below("q2.net", q2)}
    torch.save({"actor": gaussian, "qf": twin, "vf": below("v.net", mlp(D, 7, 1))}, tmp_path / "iql.pt")
    expected = torch.tanh(actor(seen_by_networks(states))).detach()
    inputs = torch.cat([seen_by_networks(states), expected], dim=1)
    values = torch.minimum(q1(inputs), q2(inputs)).squeeze(1).detach()
    for name in ("td3bc.pt", "iql.pt"):
        teacher = Teacher.from_corl(tmp_path / name, MEAN, STD)
        np.testing.assert_allclose(teacher.actions(states), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(teacher.values(states, expected.numpy()), values, rtol=1e-4, atol=1e-4)


def test_checkpoint_without_critic_serves_actions_only(states: np.ndarray, tmp_path: Path) -> None:
    torch.save({"actor": below("net", mlp(D, 8, A))}, tmp_path / "c.pt")
    teacher = Teacher.from_corl(tmp_path / "c.pt", MEAN, STD)
    with pytest.raises(ValueError, match="no critic"):
        teacher.values(states, teacher.actions(states))


class Payload:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Teacher.from_corl(path, MEAN, STD)

    actor = below("net", mlp(D, 8, A))
    torch.save({"actor": actor, "extra": Payload(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match="never unpickled"):
        Teacher.from_corl(path, MEAN, STD)
    assert not (tmp_path / "ran").exists()

    torch.save({"actor": actor}, path)
    content = path.read_bytes()
    for length in (0, 50, len(content) // 2):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cannot be read as a CORL checkpoint"):
            Teacher.from_corl(path, MEAN, STD)

    bad = [
        ({"policy": actor}, r"no state dict 'actor' \(it holds \['policy'\]\)"),
        ([1, 2], "it holds list"),
        ({"actor": below("trunk", mlp(D, 8, A))}, "unknown actor layout"),
        ({"actor": {**actor, "net.1.weight": torch.ones(8), "net.1.bias": torch.ones(8)}}, "linear layers only"),
        ({"actor": actor, "critic_1": below("net", mlp(D, 7, 1))}, "critic maps 5 to 1, the actor asks for 7 to 1"),
    ]
    for checkpoint, message in bad:
        torch.save(checkpoint, path)
        with pytest.raises(ValueError, match=message):
            Teacher.from_corl(path, MEAN, STD)

    torch.save({"actor": actor}, path)
    with pytest.raises(ValueError, match=r"actor of 5 state dimensions.*\(4,\)"):
        Teacher.from_corl(path, MEAN[:4], STD)
    with pytest.raises(ValueError, match="finite"):
        Teacher.from_corl(path, MEAN, STD * np.nan)


# Training


def one_step_data(rows: int = 2000, bound: float = 1.0) -> TransitionDataset:
    """Episodes of one step with reward −(a − s₀/2)²: the best action is s₀/2, and Q is the reward; |a| ≤ bound."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, size=(rows, 3)).astype(np.float32)
    actions = rng.uniform(-1, 1, size=(rows, 1)).astype(np.float32)
    return TransitionDataset(
        observations=observations,
        actions=actions * bound,
        rewards=-((actions - observations[:, :1] / 2) ** 2)[:, 0],
        next_observations=observations,
        terminations=np.ones(rows, dtype=bool),
        truncations=np.zeros(rows, dtype=bool),
        env_id="Test-v0",
        action_low=np.float32([-bound]),
        action_high=np.float32([bound]),
    )


@pytest.mark.parametrize(("algorithm", "bound"), [("td3bc", 1.0), ("iql", 2.5)])
def test_training_improves_on_the_behavior(algorithm: str, bound: float) -> None:
    pytest.importorskip("torchrl")
    data = one_step_data(bound=bound)
    teacher = train_teacher(data, algorithm, steps=200, seed=1, alpha=10.0, progress=False)
    actions = teacher.actions(data.observations)
    regret = ((actions / bound - data.observations[:, :1] / 2) ** 2).mean()
    assert regret < 0.1 * -data.rewards.mean()
    values = teacher.values(data.observations, data.actions)
    assert np.corrcoef(values, data.rewards)[0, 1] > 0.95
    assert abs(values.mean() - data.rewards.mean()) < 0.1 * abs(data.rewards.mean())  # in the units of the rewards
    assert teacher.provenance["algorithm"] == algorithm
    assert teacher.provenance["dataset_hash"] == data.content_hash
    assert teacher.provenance["env_id"] == "Test-v0"
    json.dumps(teacher.provenance)


@pytest.mark.parametrize("algorithm", ["td3bc", "iql"])
def test_training_repeats_by_seed(algorithm: str) -> None:
    pytest.importorskip("torchrl")
    data = one_step_data(300)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = train_teacher(data, algorithm, steps=6, seed=3, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again = train_teacher(data, algorithm, steps=6, seed=3, progress=False)
    other = train_teacher(data, algorithm, steps=6, seed=4, progress=False)
    actions = first.actions(data.observations)
    np.testing.assert_array_equal(again.actions(data.observations), actions)
    np.testing.assert_array_equal(again.values(data.observations, actions), first.values(data.observations, actions))
    assert not np.array_equal(other.actions(data.observations), actions)


def test_training_bootstraps_past_truncation_but_not_past_termination() -> None:
    """Reward 1 a step: an episode that only was cut has discounted value to come, one that ended has none."""
    pytest.importorskip("torchrl")
    rng = np.random.default_rng(0)
    observations = rng.choice([-1.0, 1.0], size=(1000, 1)).astype(np.float32)
    data = TransitionDataset(
        observations=observations,
        actions=rng.uniform(-1, 1, size=(1000, 1)).astype(np.float32),
        rewards=np.ones(1000, dtype=np.float32),
        next_observations=observations,
        terminations=observations[:, 0] < 0,
        truncations=observations[:, 0] > 0,
    )
    for algorithm in ("td3bc", "iql"):
        teacher = train_teacher(data, algorithm, steps=120, seed=0, progress=False)
        values = teacher.values(data.observations, data.actions)
        ended, cut = values[data.terminations].mean(), values[data.truncations].mean()
        assert abs(ended - 1) < 0.1
        assert cut > 1.15  # 1 without the bootstrap, on its way to 1 / (1 − 0.99) with it


def test_training_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    data = one_step_data(50)
    with pytest.raises(ValueError, match="'td3bc' or 'iql', got 'sac'"):
        train_teacher(data, "sac", steps=1)
    with pytest.raises(ValueError, match="steps=0"):
        train_teacher(data, steps=0)
    with pytest.raises(ValueError, match=r"expectile=1\.5"):
        train_teacher(data, "iql", steps=1, expectile=1.5)
    pytest.importorskip("torchrl")
    unbounded = TransitionDataset(
        data.observations, data.actions * 3, data.rewards, data.terminations, data.truncations, data.observations
    )
    with pytest.raises(ValueError, match="action bounds"):
        train_teacher(unbounded, steps=1)
    data.next_observations = None
    with pytest.raises(ValueError, match="next observations"):
        train_teacher(data, steps=1)
    monkeypatch.setitem(sys.modules, "torchrl.objectives", None)
    with pytest.raises(ImportError, match=r'pip install "sdw_fast\[teacher\]"'):
        train_teacher(one_step_data(50), steps=1)


def test_training_stops_when_it_diverges() -> None:
    pytest.importorskip("torchrl")
    data = one_step_data(300)
    data.rewards = np.full(300, 3e38, dtype=np.float32)
    with pytest.raises(FloatingPointError, match="check the rewards' scale"):
        train_teacher(data, "td3bc", steps=5, progress=False)
