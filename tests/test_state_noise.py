"""State noise: the outer problem holds every state twice, as it is and beside."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import sdw_fast as sdw
from sdw_fast.config import DistillConfig
from sdw_fast.density import density_weights, knn_log_density
from sdw_fast.objectives import OuterProblem, outer_problem, value_weights


def make(data: sdw.TransitionDataset, teacher: sdw.Teacher | None = None, **settings: Any) -> OuterProblem:
    return outer_problem(data, teacher, DistillConfig(**settings))


def test_states_beside_the_datas_have_the_teachers_actions_there(small_data, small_teacher) -> None:
    """s + σ·std(s)·ε, and the teacher is tanh of the first three dimensions."""
    problem = make(small_data, small_teacher, objective="pbc", state_noise=0.5)
    assert len(problem) == 800
    np.testing.assert_array_equal(problem.observations[:400], small_data.observations)
    np.testing.assert_allclose(problem.targets, np.tanh(problem.observations[:, :3]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(problem.weights, np.ones(800))
    noise = (problem.observations[400:] - small_data.observations) / small_data.observations.std(axis=0)
    np.testing.assert_allclose(noise.std(axis=0), 0.5, rtol=0.15)
    assert abs(noise.mean()) < 0.05
    assert abs(np.corrcoef(noise.T) - np.eye(noise.shape[1])).max() < 0.25


def test_their_weights_are_of_their_own_value_and_the_density_of_where_they_came_from(
    small_data, small_teacher
) -> None:
    problem = make(small_data, small_teacher, objective="sdw", state_noise=0.5, tau=0.2)
    values = 100 + 10 * problem.observations[:, 0] + np.tanh(problem.observations[:, :3]).sum(axis=1)
    factor = density_weights(knn_log_density(small_data.normalized_observations(), k=10), tau=0.2, clip=0.99).weights
    np.testing.assert_allclose(problem.weights, value_weights(values) * np.tile(factor, 2), rtol=1e-4)
    assert problem.report["states"] == 800
    plain = make(small_data, small_teacher, objective="sdw", tau=0.2).report
    for name in ("density", "teacher_agreement"):  # of the data
        assert problem.report[name] == plain[name]


def test_without_noise_the_problem_holds_the_datas_own_array(small_data, small_teacher) -> None:
    assert make(small_data, small_teacher).observations is small_data.observations


def test_every_seed_has_the_same_noise(small_data, small_teacher) -> None:
    first, second = (make(small_data, small_teacher, state_noise=1.0, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(first.observations, second.observations)


def test_what_does_not_vary_gets_no_noise(small_data, small_teacher) -> None:
    observations = small_data.observations.copy()
    observations[:, -1] = 0.1
    data = dataclasses.replace(small_data, observations=observations)
    beside = make(data, small_teacher, state_noise=1.0).observations[400:]
    np.testing.assert_array_equal(beside[:, -1], observations[:, -1])
    assert (beside[:, :-1] != observations[:, :-1]).all()


def test_it_wants_a_teacher(small_data) -> None:
    with pytest.raises(ValueError, match=r"state_noise asks the teacher .* objective dbc has none"):
        make(small_data, objective="dbc", state_noise=0.5)
    with pytest.raises(ValueError, match="pass a teacher"):
        make(small_data, objective="pbc", state_noise=0.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("deviation", [1e38, 1e308])
def test_noise_beyond_all_bounds_is_refused(small_data, small_teacher, deviation: float) -> None:
    with pytest.raises(ValueError, match=r"state_noise=1e.* takes states beyond the range of float32"):
        make(small_data, small_teacher, objective="pbc", state_noise=deviation)


def test_a_distillation_with_it_goes_on_to_the_same_bits(small_data, small_teacher, tmp_path) -> None:
    settings: dict[str, Any] = {"size": 12, "hidden": (16,), "inner_steps": 5, "batch_size": 64, "state_noise": 1.0}
    whole = sdw.distill(small_data, small_teacher, **settings, steps=8, progress=False)

    def stop(distiller: sdw.Distiller, metrics: dict[str, Any]) -> None:
        if distiller.iteration == 5:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        sdw.distill(small_data, small_teacher, **settings, steps=8, progress=False, out=out, callback=stop)
    assert sdw.distill(small_data, small_teacher, **settings, steps=8, progress=False, out=out) == whole
    assert whole != sdw.distill(small_data, small_teacher, **{**settings, "state_noise": 0.0}, steps=8, progress=False)
