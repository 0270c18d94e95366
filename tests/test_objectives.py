import numpy as np
import pytest

import sdw_fast as sdw
from sdw_fast.objectives import outer_problem


def test_dbc_matches_the_dataset(small_data) -> None:
    problem = outer_problem(small_data, objective="dbc")
    np.testing.assert_array_equal(problem.targets, small_data.actions)
    np.testing.assert_array_equal(problem.weights, np.ones(400))
    np.testing.assert_array_equal(problem.states, small_data.normalized_observations)


def test_pbc_matches_the_teacher(small_data, small_teacher) -> None:
    problem = outer_problem(small_data, small_teacher, objective="pbc")
    np.testing.assert_allclose(problem.targets, np.tanh(small_data.observations[:, :3]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(problem.weights, np.ones(400))


def test_av_pbc_weighs_by_value(small_data, small_teacher) -> None:
    problem = outer_problem(small_data, small_teacher, objective="av-pbc", beta=0.5)
    expected = 0.5 * (100 + 10 * small_data.observations[:, 0] + np.tanh(small_data.observations[:, :3]).sum(axis=1))
    np.testing.assert_allclose(problem.weights, expected, rtol=1e-5)


def test_sdw_is_av_pbc_times_density_weights(small_data, small_teacher) -> None:
    problem = outer_problem(small_data, small_teacher, objective="sdw", tau=0.2)
    plain = outer_problem(small_data, small_teacher, objective="av-pbc")
    logd = sdw.knn_log_density(small_data.normalized_observations, k=10)
    factor = sdw.density_weights(logd, tau=0.2, clip=0.99).weights
    np.testing.assert_allclose(problem.weights, plain.weights * factor, rtol=1e-5)
    assert factor.mean() == pytest.approx(1.0)
    assert problem.report["density"]["tau"] == pytest.approx(0.2)


def test_any_objective_can_carry_the_density(small_data, small_teacher) -> None:
    weighted = outer_problem(small_data, objective="dbc", density=True, ess=0.6)
    assert sdw.effective_sample_size(weighted.weights) == pytest.approx(0.6, abs=0.01)
    plain = outer_problem(small_data, small_teacher, objective="sdw", density=False)
    reference = outer_problem(small_data, small_teacher, objective="av-pbc")
    np.testing.assert_array_equal(plain.weights, reference.weights)


def test_negative_values_are_floored_and_counted(small_data) -> None:
    teacher = sdw.Teacher(actor=lambda s: s[:, :3].tanh(), critic=lambda s, a: s[:, 5])
    problem = outer_problem(small_data, teacher, objective="av-pbc")
    negative = small_data.observations[:, 5] < 0
    assert problem.report["weights_floored"] == negative.sum() > 0
    assert not problem.weights[negative].any()
    assert (problem.weights >= 0).all()


def test_refusals(small_data, small_teacher) -> None:
    with pytest.raises(ValueError, match="one of"):
        outer_problem(small_data, small_teacher, objective="bc")
    with pytest.raises(ValueError, match="pass a teacher"):
        outer_problem(small_data, objective="sdw", tau=0.1)
    hopeless = sdw.Teacher(actor=lambda s: s[:, :3].tanh(), critic=lambda s, a: -s[:, 5].abs() - 1)
    with pytest.raises(ValueError, match="every weight"):
        outer_problem(small_data, hopeless, objective="av-pbc")
