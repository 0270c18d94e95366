"""The outer problem of every objective against its definition, and that each setting reaches it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HIGH, LOW

import sdw_fast as sdw
from sdw_fast.config import DistillConfig
from sdw_fast.density import density_weights, effective_sample_size, knn_log_density
from sdw_fast.networks import MLP, MinCritic
from sdw_fast.objectives import OuterProblem, outer_problem, teacher_agreement, value_weights
from sdw_fast.units import Affine, Units


def make(data: sdw.TransitionDataset, teacher: sdw.Teacher | None = None, **settings: Any) -> OuterProblem:
    return outer_problem(data, teacher, DistillConfig(**settings))


def teacher_values(data: sdw.TransitionDataset) -> np.ndarray:
    """The values of `small_teacher` at its own actions."""
    return 100 + 10 * data.observations[:, 0] + np.tanh(data.observations[:, :3]).sum(axis=1)


# --- targets and weights of each objective ---------------------------------------------------------------------------


def test_dbc_matches_the_dataset(small_data) -> None:
    problem = make(small_data, objective="dbc")
    np.testing.assert_array_equal(problem.targets, small_data.actions)
    np.testing.assert_array_equal(problem.weights, np.ones(400))
    assert problem.observations is small_data.observations  # held once; batches are normalized
    assert problem.units == small_data.units
    assert len(problem) == 400


def test_pbc_matches_the_teacher(small_data, small_teacher) -> None:
    problem = make(small_data, small_teacher, objective="pbc")
    np.testing.assert_allclose(problem.targets, np.tanh(small_data.observations[:, :3]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(problem.weights, np.ones(400))
    actor_only = sdw.Teacher(small_teacher.actor)
    np.testing.assert_array_equal(make(small_data, actor_only, objective="pbc").targets, problem.targets)


def test_av_pbc_weighs_by_value(small_data, small_teacher) -> None:
    """A fifth of the largest weight up to the quantile 0.01 of Q, the largest from 0.99 on, a line in between."""
    problem = make(small_data, small_teacher, objective="av-pbc")
    values = teacher_values(small_data)
    low, high = np.quantile(values, [0.01, 0.99])
    expected = np.interp(values, [low, high], [0.2, 1.0])
    np.testing.assert_allclose(problem.weights, expected / expected.mean(), rtol=1e-4)


def test_av_pbc_weighs_by_the_papers_rule_where_asked(small_data, small_teacher) -> None:
    problem = make(small_data, small_teacher, objective="av-pbc", value_weights="paper", beta=0.5)
    np.testing.assert_allclose(problem.weights, 0.5 * teacher_values(small_data), rtol=1e-5)
    usual = make(small_data, small_teacher, objective="av-pbc", value_weights="paper")
    np.testing.assert_allclose(usual.weights, 0.02 * teacher_values(small_data), rtol=1e-5)
    paper = outer_problem(small_data, small_teacher, DistillConfig.preset("paper", objective="av-pbc"))
    np.testing.assert_array_equal(paper.weights, usual.weights)


def test_sdw_is_av_pbc_times_density_weights(small_data, small_teacher) -> None:
    problem = make(small_data, small_teacher, objective="sdw", tau=0.2)
    plain = make(small_data, small_teacher, objective="av-pbc")
    logd = knn_log_density(small_data.normalized_observations(), k=10)
    factor = density_weights(logd, tau=0.2, clip=0.99).weights
    np.testing.assert_allclose(problem.weights, plain.weights * factor, rtol=1e-5)
    np.testing.assert_array_equal(problem.targets, plain.targets)
    assert factor.mean() == pytest.approx(1.0)
    assert problem.report["density"]["tau"] == pytest.approx(0.2)


def test_without_a_configuration_it_is_sdw_with_the_defaults(small_data, small_teacher) -> None:
    problem = outer_problem(small_data, small_teacher)
    np.testing.assert_array_equal(problem.weights, make(small_data, small_teacher, objective="sdw").weights)
    logd = knn_log_density(small_data.normalized_observations(), k=10)
    factor = density_weights(logd, ess=0.5, clip=0.99).weights
    np.testing.assert_allclose(problem.weights, value_weights(teacher_values(small_data)) * factor, rtol=1e-4)


def test_any_objective_can_carry_the_density(small_data, small_teacher) -> None:
    weighted = make(small_data, objective="dbc", density=True, ess=0.6)
    assert effective_sample_size(weighted.weights) == pytest.approx(0.6, abs=0.01)
    plain = make(small_data, small_teacher, objective="sdw", density=False)
    reference = make(small_data, small_teacher, objective="av-pbc")
    np.testing.assert_array_equal(plain.weights, reference.weights)


# --- rewards of any scale ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "shift"), [(1.0, -150.0), (1.0, 1000.0), (1e-3, 0.0), (1e4, -1e6)])
@pytest.mark.parametrize("objective", ["av-pbc", "sdw"])
def test_values_on_another_scale_give_the_same_weights(small_data, small_teacher, objective, scale, shift) -> None:
    """Rewards in cents, rewards that are costs: Q → aQ + b is the same problem."""
    critic = small_teacher.critic
    other = sdw.Teacher(small_teacher.actor, lambda s, a: scale * critic(s, a) + shift)
    first, second = (make(small_data, teacher, objective=objective) for teacher in (small_teacher, other))
    np.testing.assert_allclose(first.weights, second.weights, rtol=1e-3)
    for name in ("effective_sample_size", "value_effective_sample_size", "mean_weight", "largest_weight"):
        assert first.report[name] == pytest.approx(second.report[name], rel=1e-3)


@pytest.mark.filterwarnings("error")
def test_a_teacher_of_negative_values_gives_a_problem_to_learn_from(small_data, small_teacher) -> None:
    critic = small_teacher.critic
    problem = make(small_data, sdw.Teacher(small_teacher.actor, lambda s, a: critic(s, a) - 1e4), objective="sdw")
    assert (problem.weights > 0).all()
    assert problem.report["weights_floored"] == 0
    assert problem.report["effective_sample_size"] > 0.3
    assert problem.report["mean_q"] < -9_000


@pytest.mark.parametrize(
    "values",
    [
        np.full(1000, -3.0),
        np.full(1000, 7.0) + 1e-6 * np.arange(1000) / 1000,  # rounding
        np.r_[np.zeros(999), 1.0],
        np.r_[-1e9, np.linspace(0, 1, 998), 1e9],
        np.random.default_rng(0).standard_cauchy(1000),
        np.r_[np.zeros(900), np.ones(100)],
    ],
    ids=["equal", "rounding", "one other", "outliers", "heavy tails", "two"],
)
def test_no_distribution_of_values_leaves_few_states_to_learn_from(values: np.ndarray) -> None:
    weights = value_weights(values)
    assert weights.mean() == pytest.approx(1)
    assert weights.max() <= 5.0001 * weights.min()
    assert effective_sample_size(weights) >= 4 * 0.2 / 1.2**2
    assert (np.diff(weights[np.argsort(values, kind="stable")]) >= 0).all()  # more for what is worth more
    if np.ptp(values) < 1e-5:
        assert (weights == 1).all()


def test_negative_values_are_floored_counted_and_told_by_the_papers_rule(small_data) -> None:
    teacher = sdw.Teacher(actor=lambda s: s[:, :3].tanh(), critic=lambda s, a: s[:, 5])
    with pytest.warns(
        UserWarning, match=r"5\d% of the 400 states have weight 0, .* sample size is .*use value_weights="
    ):
        problem = make(small_data, teacher, objective="av-pbc", value_weights="paper")
    negative = small_data.observations[:, 5] < 0
    assert problem.report["weights_floored"] == negative.sum() > 0
    assert not problem.weights[negative].any()
    assert (problem.weights[~negative] > 0).all()


def test_a_tiny_effective_sample_size_is_told(small_data, small_teacher) -> None:
    with pytest.warns(UserWarning, match=r"0% of the 400 states .*sample size is [0-9.]+% of them: .*; raise ess"):
        make(small_data, small_teacher, objective="sdw", tau=3.0, clip=1.0)


def episodes(actions: list[list[float]], rewards: list[float] | None) -> sdw.TransitionDataset:
    """Episodes of two steps each, one action a step."""
    flat = np.array(actions, np.float32).reshape(-1, 1)
    columns: dict[str, np.ndarray] = {"observations": flat + np.float32(0.5), "actions": flat}
    if rewards is not None:
        columns["rewards"] = np.repeat(np.array(rewards, np.float32), 2)
    columns["terminations"] = np.arange(len(flat)) % 2 == 1
    columns["truncations"] = np.zeros(len(flat), bool)
    return sdw.load_dataset(columns)


def test_agreement_of_a_teacher_with_the_best_quarter_by_hand() -> None:
    bad = [[1.0, -1.0]] * 3
    data = episodes([*bad, [0.2, 0.6]], [1, 2, 3, 4])  # the best episode's mean is 0.4, its spread 0.04
    targets = np.array([[0.9]] * 6 + [[0.2], [0.4]], np.float32)
    assert teacher_agreement(targets, data) == pytest.approx(1 - 0.04 / 2 / 0.04, abs=1e-5)
    assert teacher_agreement(data.actions, data) == pytest.approx(1)
    without = episodes([*bad, [0.2, 0.6]], None)  # all of them count: mean 0.1, spread 0.79 - 0.01 + 0.01
    spread = np.mean([0.9**2, 1.1**2] * 3 + [0.1**2, 0.5**2])
    error = np.mean([0.1**2, 1.9**2] * 3 + [0, 0.2**2])
    assert teacher_agreement(targets, without) == pytest.approx(1 - error / spread, abs=1e-5)
    assert teacher_agreement(targets, episodes([[0.5, 0.5]] * 4, None)) is None


@pytest.mark.parametrize("objective", ["pbc", "av-pbc", "sdw"])
def test_a_teacher_that_acts_unlike_the_data_is_told(small_data, objective: str) -> None:
    other = sdw.Teacher(actor=lambda s: -(3 * s[:, :3]).tanh(), critic=lambda s, a: s[:, 0])
    data = dataclasses.replace(small_data, actions=np.tanh(small_data.observations[:, :3]))
    with pytest.warns(UserWarning, match=r"acts unlike the dataset: .* \(R² = -\d\.\d\d; "):
        problem = make(data, other, objective=objective, k=10)
    assert problem.report["teacher_agreement"] < -1
    near = sdw.Teacher(actor=lambda s: (0.5 * s[:, :3]).tanh(), critic=lambda s, a: s[:, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = make(data, near, objective=objective, k=10)
        assert 0.3 < problem.report["teacher_agreement"] < 1
        assert "teacher_agreement" not in make(data, objective="dbc").report


# --- settings --------------------------------------------------------------------------------------------------------


def weights_of(data: sdw.TransitionDataset, **options: Any) -> np.ndarray:
    logd = sdw.log_density(data, options.pop("method", "knn"), **{k: options.pop(k) for k in ("k",) if k in options})
    return density_weights(logd, **{"ess": 0.5, "clip": 0.99, **options}).weights


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"k": 3}, {"k": 3}),
        ({"k": 40}, {"k": 40}),
        ({"ess": 0.8}, {"ess": 0.8}),
        ({"tau": 0.3}, {"tau": 0.3, "ess": None}),
        ({"tau": 0.0, "ess": 0.8}, {"tau": 0.0, "ess": None}),  # tau comes first
        ({"clip": 0.7}, {"clip": 0.7}),
    ],
)
def test_every_density_setting_reaches_the_weights(small_data, settings: dict, options: dict) -> None:
    weights = make(small_data, objective="dbc", density=True, **settings).weights
    np.testing.assert_allclose(weights, weights_of(small_data, **options), rtol=1e-6)
    assert not np.allclose(weights, make(small_data, objective="dbc", density=True).weights)


def test_density_method_reaches_the_weights(small_data, tmp_path) -> None:
    pytest.importorskip("zuko")
    data = dataclasses.replace(small_data.subset(slice(0, 100)), path=tmp_path)  # the flow is fitted once
    weights = make(data, objective="dbc", density=True, density_method="flow").weights
    np.testing.assert_allclose(weights, weights_of(data, method="flow"), rtol=1e-6)
    assert not np.allclose(weights, weights_of(data), rtol=0.1)


def test_beta_scales_the_weights(small_data, small_teacher) -> None:
    settings = {"objective": "sdw", "value_weights": "paper"}
    small, large = (make(small_data, small_teacher, **settings, beta=beta).weights for beta in (0.01, 0.04))
    np.testing.assert_allclose(large, 4 * small, rtol=1e-6)


# --- units -----------------------------------------------------------------------------------------------------------


def test_targets_are_scaled_to_the_bounds(bounded_data, small_teacher) -> None:
    center, half = (HIGH + LOW) / 2, (HIGH - LOW) / 2
    targets = make(bounded_data, objective="dbc").targets
    np.testing.assert_allclose(targets, (bounded_data.actions - center) / half, rtol=1e-5, atol=1e-5)
    assert np.abs(targets).max() <= 1 + 1e-5
    targets = make(bounded_data, small_teacher, objective="pbc").targets  # acts in the environment's units
    expected = (np.tanh(bounded_data.observations[:, :3]) - center) / half
    np.testing.assert_allclose(targets, expected, rtol=1e-5, atol=1e-5)


def network_teacher(units: Units) -> sdw.Teacher:
    torch.manual_seed(0)
    return sdw.Teacher(MLP([11, 16, 3], tanh=True), MinCritic([MLP([14, 16, 1], tanh=False)]), units=units)


def test_a_teacher_of_the_same_units_makes_no_round_trip(bounded_data) -> None:
    """Its network's output is the target, bit for bit; through the environment's units some bits would be lost."""
    teacher = network_teacher(bounded_data.units)
    problem = make(bounded_data, teacher, objective="pbc")
    with torch.no_grad():
        output = teacher.actor(torch.from_numpy(bounded_data.normalized_observations())).numpy()
    np.testing.assert_array_equal(problem.targets, output)
    round_trip = bounded_data.units.require_actions().normalize(teacher.actions(bounded_data.observations))
    assert (round_trip != output).any()


def test_a_teacher_of_other_units_means_the_same_actions(bounded_data) -> None:
    units = Units(Affine(np.full(11, 0.5), np.full(11, 2.0)), Affine.between([-1, -2, -3], [4, 5, 6]))
    teacher = network_teacher(units)
    problem = make(bounded_data, teacher, objective="pbc")
    expected = (teacher.actions(bounded_data.observations) - (HIGH + LOW) / 2) / ((HIGH - LOW) / 2)
    np.testing.assert_allclose(problem.targets, expected, rtol=1e-5, atol=1e-5)
    weights = make(bounded_data, teacher, objective="av-pbc", value_weights="paper", beta=1.0).weights
    values = teacher.values(bounded_data.observations, teacher.actions(bounded_data.observations))
    np.testing.assert_allclose(weights, np.maximum(values, 0), rtol=1e-4, atol=1e-5)


# --- the report and the fingerprint ----------------------------------------------------------------------------------


def test_report_by_hand(small_data, small_teacher) -> None:
    problem = make(small_data, small_teacher, objective="sdw", ess=0.6)
    report = json.loads(json.dumps(problem.report))
    values = teacher_values(small_data)
    assert report["mean_q"] == pytest.approx(values.mean(), rel=1e-5)
    assert report["weights_floored"] == 0
    assert (report["objective"], report["states"]) == ("sdw", 400)
    assert report["effective_sample_size"] == pytest.approx(effective_sample_size(problem.weights), rel=1e-5)
    assert report["mean_weight"] == pytest.approx(problem.weights.mean(), rel=1e-5)
    assert report["largest_weight"] == pytest.approx(problem.weights.max(), rel=1e-5)
    assert report["density"]["effective_sample_size"] == pytest.approx(0.6, abs=0.01)
    plain = make(small_data, objective="dbc").report
    assert "density" not in plain
    assert "mean_q" not in plain
    assert report["value_effective_sample_size"] == pytest.approx(
        effective_sample_size(value_weights(values)), rel=1e-5
    )


def test_fingerprint_knows_each_part(bounded_data, small_teacher) -> None:
    problem = make(bounded_data, small_teacher, objective="av-pbc")
    own = problem.fingerprint()
    assert own == make(bounded_data, small_teacher, objective="av-pbc").fingerprint()
    units = dataclasses.replace(problem.units, env_id="Toy-v0")
    changes: dict[str, Any] = {name: getattr(problem, name) + 1 for name in ("observations", "targets", "weights")}
    for name, value in {**changes, "units": units}.items():
        other = dataclasses.replace(problem, **{name: value}).fingerprint()
        assert {part for part in own if own[part] != other[part]} == {name}


def test_fingerprint_of_a_teacher_that_gives_views(small_data) -> None:
    teacher = sdw.Teacher(actor=lambda s: s.T[:3].contiguous().T)
    assert set(make(small_data, teacher, objective="pbc").fingerprint()) == {
        "observations",
        "targets",
        "weights",
        "units",
    }


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(small_data, small_teacher) -> None:
    with pytest.raises(ValueError, match="one of"):
        make(small_data, small_teacher, objective="bc")
    for objective in ("pbc", "av-pbc", "sdw"):
        with pytest.raises(ValueError, match="pass a teacher"):
            make(small_data, objective=objective, tau=0.1)
    for objective in ("av-pbc", "sdw"):
        with pytest.raises(ValueError, match="no critic"):
            make(small_data, sdw.Teacher(small_teacher.actor), objective=objective)
    hopeless = sdw.Teacher(actor=lambda s: s[:, :3].tanh(), critic=lambda s, a: -s[:, 5].abs() - 1)
    with pytest.raises(ValueError, match="every weight"):
        make(small_data, hopeless, objective="av-pbc", value_weights="paper")


def test_unknown_action_bounds_are_refused(small_data, small_teacher) -> None:
    unknown = dataclasses.replace(small_data, units=Units(small_data.units.states))
    for objective in ("dbc", "pbc", "sdw"):
        with pytest.raises(ValueError, match="action bounds are not known"):
            make(unknown, small_teacher, objective=objective)
