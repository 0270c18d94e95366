"""What users' actors and critics answer: taken for what is meant, or told in one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from sdw_fast.teacher import Teacher
from sdw_fast.units import Affine, Units

DATA = Units(Affine(np.zeros(3), np.ones(3)), Affine.between([-2], [2]))


@pytest.fixture
def states() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)


def mean(states: Tensor) -> Tensor:
    """The actions that are meant, in the bounds ±2."""
    return 2 * torch.tanh(states[:, :1])


def labels(states: np.ndarray, actor: Callable, critic: Any = None, *, units: Units | None = None) -> Any:
    """Targets in environment units, values, and the sentences that were said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        targets, values = Teacher(actor, critic, units=units).label(states, DATA, values=critic is not None)
    return 2 * targets, values, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    "actor",
    [
        mean,
        lambda s: mean(s).numpy(),
        lambda s: mean(s).double(),
        lambda s: Normal(mean(s), 1.0),
        lambda s: Independent(Normal(mean(s), torch.ones(len(s), 1)), 1),
        lambda s: {"action": mean(s), "log_prob": s[:, 0]},
    ],
)
def test_answers_that_say_what_is_meant_are_taken(states: np.ndarray, actor: Callable) -> None:
    targets, _, said = labels(states, actor)
    np.testing.assert_allclose(targets, mean(torch.from_numpy(states)), atol=1e-6)
    assert said == []


def test_a_squashed_distribution_is_asked_for_its_mean_before_the_squashing(states: np.ndarray) -> None:
    """Its own mean has no closed form, and PyTorch raises NotImplementedError; the papers use tanh(μ)."""
    squashed = [TanhTransform(), torch.distributions.AffineTransform(0, 2)]
    targets, _, said = labels(states, lambda s: TransformedDistribution(Normal(s[:, :1], 1.0), squashed))
    np.testing.assert_allclose(targets, mean(torch.from_numpy(states)), atol=1e-6)
    assert said == []


def test_a_tensordict_is_asked_for_its_entries(states: np.ndarray) -> None:
    TensorDict = pytest.importorskip("tensordict").TensorDict
    targets, values, said = labels(
        states,
        lambda s: TensorDict({"action": mean(s)}, [len(s)]),
        lambda s, a: TensorDict({"state_action_value": s[:, 1:2] + a}, [len(s)]),
    )
    np.testing.assert_allclose(targets, mean(torch.from_numpy(states)), atol=1e-6)
    np.testing.assert_allclose(values, states[:, 1] + targets[:, 0], atol=1e-5)
    assert said == []


def test_of_a_tuple_the_first_action_and_the_smallest_value_are_taken_and_said(states: np.ndarray) -> None:
    targets, values, said = labels(states, lambda s: (mean(s), s[:, 0]), lambda s, a: (s[:, 1], s[:, 2:3]))
    np.testing.assert_allclose(targets, mean(torch.from_numpy(states)), atol=1e-6)
    np.testing.assert_array_equal(values, states[:, 1:].min(axis=1))
    assert said == [
        "the teacher's actor returns 2 things; the first is taken for the action",
        "the teacher's critic returns 2 values of a pair; the smallest is taken",
    ]


def test_an_actor_or_critic_that_samples_is_told(states: np.ndarray) -> None:
    state = torch.random.get_rng_state()
    _, _, said = labels(states, lambda s: mean(s + torch.randn_like(s)), lambda s, a: s[:, 1] + torch.rand(len(s)))
    assert [sentence[:52] for sentence in said] == [
        "the teacher's actor gives two answers to one questio",
        "the teacher's critic gives two answers to one questi",
    ]
    probed = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    with torch.no_grad():  # the answers that were used, and no more, have been drawn
        torch.randn(200, 3), torch.rand(200)
    assert torch.equal(torch.random.get_rng_state(), probed)


def test_actions_that_were_never_scaled_are_told(states: np.ndarray) -> None:
    _, _, said = labels(states, lambda s: mean(s) / 2)
    assert [sentence[:86] for sentence in said] == [
        "all of the teacher's actions lie within ±1, and the bounds are [-2.] to [2.]: if its a"
    ]
    scaled = Units(DATA.states, DATA.actions)
    assert labels(states, lambda s: mean(s) / 2, units=scaled)[2] == []


@pytest.mark.parametrize("scale", [1.5, 20, -3])
def test_actions_beyond_the_bounds_are_told(states: np.ndarray, scale: float) -> None:
    _, _, said = labels(states, lambda s: scale * mean(s))
    assert len(said) == 1
    assert "beyond the bounds [-2.] to [2.] in " in said[0]


def test_bounds_other_than_the_datas_are_told(states: np.ndarray) -> None:
    """The actions are converted: −1 … 1 of the teacher is −1 … 2 here."""
    other = Units(DATA.states, Affine.between([-1], [2]))
    targets, _, said = labels(states, lambda s: mean(s) / 2, units=other)
    np.testing.assert_allclose(targets, 0.5 + 1.5 * mean(torch.from_numpy(states)) / 2, atol=1e-6)
    assert said == [
        "the teacher's action bounds are [-1.] to [2.], the data's [-2.] to [2.]; its actions are converted"
    ]


@pytest.mark.parametrize(
    ("actor", "critic", "message"),
    [
        (lambda s: "left", None, "actions must be a tensor, got str"),
        (lambda s: (), None, "actions must be a tensor, got tuple"),
        (lambda s: {"act": mean(s)}, None, r"holds \['act'\], and no 'action'"),
        (lambda s: (s[:, 0], mean(s)), None, r"actions for 200 states must have shape \(200, action dimensions\)"),
        (mean, lambda s, a: (s[:, 0], None), "values must be a tensor, got NoneType"),
        (mean, lambda s, a: (s[:, 0], s), r"values for 200 states must have shape \(200,\), got \(200, 3\)"),
        (mean, lambda s, a: s[:, :1] + s[:, 0], r"must have shape \(200,\), got \(200, 200\)"),
    ],
)
def test_answers_that_say_nothing_are_refused(states: np.ndarray, actor: Any, critic: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels(states, actor, critic)


def test_objects_of_other_libraries_are_shown_their_door() -> None:
    class Model:
        def predict(self) -> None: ...

    class Module:
        in_keys = ("observation",)

        def __call__(self) -> None: ...

    with pytest.raises(TypeError, match=r"actor must be a callable on tensors, got Model; .* Teacher.from_sb3"):
        Teacher(Model())
    with pytest.raises(TypeError, match=r"critic is a module on TensorDicts: use Teacher.from_torchrl"):
        Teacher(mean, Module())
