"""Teacher: units and batches, users' own modules, dead networks, the shipped teachers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sdw_fast.evaluation import evaluate
from sdw_fast.networks import MLP, MinCritic
from sdw_fast.teacher import Teacher
from sdw_fast.units import Affine, Units

D, A = 5, 2
STATES = Affine(np.linspace(-1, 1, D), np.linspace(0.3, 3, D))


@pytest.fixture
def network_teacher() -> Teacher:
    """A teacher with random networks of odd widths, normalized states, action bounds that are not known, provenance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critics = [MLP([D + A, 9, 1], tanh=False), MLP([D + A, 13, 6, 1], tanh=False)]
        actor = MLP([D, 7, 11, A], tanh=True)
    return Teacher(actor, MinCritic(critics), units=Units(STATES), provenance={"seed": 0})


@pytest.fixture
def states() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(203, D)).astype(np.float32)


def between(teacher: Teacher, low: list[float], high: list[float]) -> Teacher:
    """The same networks under action bounds."""
    return Teacher(teacher.actor, teacher.critic, units=Units(STATES, Affine.between(low, high), env_id="Test-v0"))


# Units, types and batches


def test_case_by_hand() -> None:
    """Normalized states are (1, −1) and (2, 0); the actor doubles the first, the critic adds action and second."""
    teacher = Teacher(
        actor=lambda s: 2 * s[:, :1],
        critic=lambda s, a: a[:, 0] + s[:, 1],
        units=Units(Affine(np.float32([10, 0]), np.float32([5, 2]))),
    )
    states = np.float32([[15, -2], [20, 0]])
    actions = teacher.actions(states)
    np.testing.assert_array_equal(actions, [[2], [4]])
    np.testing.assert_array_equal(teacher.values(states, actions), [1, 4])


def test_bounded_actions_by_hand() -> None:
    """The actor's −1, 0, 1 are 0, 3, 6 between the bounds 0 and 6; the critic sees them as −1, 0, 1 again."""
    units = Units(Affine(np.zeros(1), np.ones(1)), Affine.between([0], [6]))
    teacher = Teacher(lambda s: s, lambda s, a: 10 * a[:, 0], units=units)
    states = np.float32([[-1], [0], [1]])
    np.testing.assert_array_equal(teacher.actions(states), [[0], [3], [6]])
    np.testing.assert_array_equal(teacher.values(states, np.float32([[0], [3], [6]])), [-10, 0, 10])
    np.testing.assert_array_equal(teacher.values(states, np.array([[0], [3], [6]])), [-10, 0, 10])  # whole numbers
    assert torch.equal(teacher.actions(torch.from_numpy(states)), torch.tensor([[0.0], [3.0], [6.0]]))


def test_labels_are_in_the_datasets_units(network_teacher: Teacher, states: np.ndarray) -> None:
    """Teacher and dataset differ in the units of states and of actions; each number is worked out anew."""
    teacher = between(network_teacher, low := [-2.0, 0.5], high := [3.0, 0.9])
    data = Units(Affine(np.full(D, 7.0), np.full(D, 0.1)), Affine.between([-0.5, -9], [2, 4]))
    targets, values = teacher.label(states, data, values=True)
    seen = torch.from_numpy(((states - np.linspace(-1, 1, D)) / np.linspace(0.3, 3, D)).astype(np.float32))
    with torch.no_grad():
        raw = network_teacher.actor(seen)
        q = torch.stack([critic(torch.cat([seen, raw], 1)) for critic in network_teacher.critic.networks]).amin(0)
    actions = np.array(low) + (np.array(high) - low) * (raw.double().numpy() + 1) / 2
    np.testing.assert_allclose(targets, (actions - [-0.5, -9]) / [2.5, 13] * 2 - 1, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values, q.squeeze(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(teacher.actions(states), actions, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(teacher.values(states, actions), q.squeeze(1), rtol=1e-4, atol=1e-5)
    assert targets.dtype == values.dtype == np.float32
    assert teacher.label(states, data, values=False)[1] is None


def test_labels_in_the_teachers_own_units_make_no_round_trip(network_teacher: Teacher, states: np.ndarray) -> None:
    teacher = between(network_teacher, [-0.3, 0.1], [0.7, 0.4])
    own = Units.from_dict(teacher.units.to_dict())  # equal, not the same
    targets, values = teacher.label(states, own, values=True)
    seen = STATES.normalize(torch.from_numpy(states))
    with torch.no_grad():
        expected = network_teacher.actor(seen)
        q = network_teacher.critic(seen, expected)
    np.testing.assert_array_equal(targets, expected)
    np.testing.assert_array_equal(values, q)
    assert not np.array_equal(own.actions.normalize(teacher.actions(states)), expected)  # the round trip shows


def test_callables_label_in_the_environments_units(states: np.ndarray) -> None:
    teacher = Teacher(lambda s: s[:, :A], lambda s, a: s[:, 0] - a[:, 1])
    data = Units(STATES, Affine.between([-4, 0], [4, 1]))
    targets, values = teacher.label(states, data, values=True)
    np.testing.assert_allclose(targets, np.stack([states[:, 0] / 4, 2 * states[:, 1] - 1], 1), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(values, states[:, 0] - states[:, 1])
    with pytest.raises(ValueError, match="bounds are not known"):
        teacher.label(states, Units(STATES), values=False)


def test_values_are_the_minimum_over_the_critics(network_teacher: Teacher, states: np.ndarray) -> None:
    actions = network_teacher.actions(states)
    inputs = torch.from_numpy(np.concatenate([STATES.normalize(states), actions], axis=1))
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


def test_batches_do_not_show(network_teacher: Teacher) -> None:
    teacher = between(network_teacher, [-2, 0], [1, 6])
    states = np.random.default_rng(1).normal(size=(40_000, D)).astype(np.float32)
    sizes: list[int] = []
    hook = teacher.actor.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    targets, labels = teacher.label(states, teacher.units, values=True)
    hook.remove()
    assert max(sizes) < 20_000  # memory stays bounded
    assert sum(size for size in sizes if size > 100) == 40_000  # a few are asked again
    seen = torch.from_numpy(STATES.normalize(states))
    with torch.no_grad():
        expected = network_teacher.actor(seen)
        q = network_teacher.critic(seen, expected)
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    np.testing.assert_allclose(labels, q, atol=1e-5)
    np.testing.assert_allclose(teacher.values(states, teacher.actions(states)), q, atol=1e-5)


def test_unusual_but_sound_inputs(network_teacher: Teacher, states: np.ndarray) -> None:
    expected = network_teacher.actions(states)
    np.testing.assert_array_equal(network_teacher.actions(states.astype(np.float64)), expected)
    read_only = states.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(network_teacher.actions(read_only), expected)
    np.testing.assert_allclose(network_teacher.actions(np.asfortranarray(states)[::-2]), expected[::-2], atol=1e-6)
    assert network_teacher.actions(states[:0]).shape == (0, A)
    assert network_teacher.values(states[:0], expected[:0]).shape == (0,)


def test_bad_inputs_are_refused(network_teacher: Teacher, states: np.ndarray) -> None:
    with pytest.raises(ValueError, match="5 dimensions, got 4"):
        network_teacher.actions(states[:, :4])
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        network_teacher.actions(states[0])
    with pytest.raises(ValueError, match=r"shape \(203,\)"):
        network_teacher.values(states, states[:, 0])
    with pytest.raises(ValueError, match="203 and 202"):
        network_teacher.values(states, network_teacher.actions(states)[1:])
    with pytest.raises(ValueError, match="NaN"):
        network_teacher.actions(np.where(np.arange(D) == 2, np.nan, states))
    with pytest.raises(ValueError, match="NaN"):
        network_teacher.values(states, np.full((203, A), np.inf, np.float32))
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


# Users' own modules


class Critic(nn.Module):
    """Dropout and batch norm, and Q under another name than `forward` as well."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D + A, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([states, actions], dim=-1))

    def q(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self(states, actions)


@pytest.mark.parametrize("as_method", [False, True])
def test_modules_are_asked_in_evaluation_mode_and_put_back(states: np.ndarray, as_method: bool) -> None:
    actor = nn.Sequential(nn.Linear(D, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, A))
    critic = Critic()
    critic.net[0].eval()  # parts of a user's network may be in another mode than the whole
    before = {name: tensor.clone() for name, tensor in [*actor.state_dict().items(), *critic.state_dict().items()]}
    teacher = Teacher(actor.forward if as_method else actor, critic.q if as_method else critic)
    actions = teacher.actions(states)
    values = teacher.values(states, actions)
    targets, labels = teacher.label(states, Units(STATES, Affine.between([-1] * A, [1] * A)), values=True)
    np.testing.assert_array_equal(teacher.actions(states), actions)
    np.testing.assert_array_equal(targets, actions)
    np.testing.assert_array_equal(labels, values)
    np.testing.assert_allclose(teacher.actions(states[:50]), actions[:50], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(teacher.values(states[:50], actions[:50]), values[:50], rtol=1e-5, atol=1e-6)
    assert all(part.training for part in actor.modules())
    assert [part.training for part in critic.modules()] == [True, True, False, True, True, True, True]
    after = {**actor.state_dict(), **critic.state_dict()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(RuntimeError):
        teacher.actions(states[:, :3])
    assert all(part.training for part in actor.modules())


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


def test_equal_answers_are_a_fault_from_a_hundred_rows_on(states: np.ndarray) -> None:
    constant = Teacher(lambda s: torch.ones(len(s), A), lambda s, a: torch.ones(len(s)))
    actions = states[:, :A]
    assert constant.actions(states[:99]).shape == (99, A)
    assert constant.values(states[:99], actions[:99]).shape == (99,)
    with pytest.raises(ValueError, match="for all 100 states"):
        constant.actions(states[:100])
    with pytest.raises(ValueError, match="for all 100 states"):
        constant.values(states[:100], actions[:100])


# The shipped teachers


def test_a_shipped_teacher_beats_the_behavior_policy() -> None:
    """It was measured at 86 ± 10 (normalized, 20 episodes); the data it learned from has a mean of 47."""
    pytest.importorskip("mujoco")
    teacher = Teacher.pretrained("hopper/medium")
    result = evaluate(teacher.actions, "Hopper-v5", episodes=4, seed=0)
    assert result.normalized_mean > 60
    states = np.random.default_rng(0).normal(size=(1000, 11)).astype(np.float32)
    states = teacher.units.states.denormalize(states)
    values = teacher.values(states, teacher.actions(states))
    assert (values > 0).mean() > 0.9
    assert teacher.provenance["env_id"] == teacher.units.env_id == "Hopper-v5"
    np.testing.assert_array_equal(teacher.units.action_bounds, [[-1] * 3, [1] * 3])


def test_shipped_teachers_go_by_the_names_of_their_datasets() -> None:
    states = np.random.default_rng(0).normal(size=(10, 11)).astype(np.float32)
    first, second = (Teacher.pretrained(name) for name in ("hopper/medium", "sdw/hopper/medium-v0"))
    np.testing.assert_array_equal(first.actions(states), second.actions(states))
    with pytest.raises(ValueError, match=r"no teacher for 'ant/medium' .* \['hopper/medium'.*\], or use train_teacher"):
        Teacher.pretrained("ant/medium")
