"""Units: maps between an environment's numbers and normalized ones, by their definitions, and back without loss."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdw_fast.units import Affine, Units, d4rl_returns, d4rl_scores

STATES = Affine([1.0, -2.0], [0.5, 3.0])


# --- Affine ----------------------------------------------------------------------------------------------------------


def test_fit_matches_the_definition_and_its_inverse() -> None:
    rng = np.random.default_rng(0)
    x = (1000 + rng.normal(size=(100_001, 3)) * [1e-3, 1, 100]).astype(np.float32)
    x[:, 1] = 5.0  # a constant column
    states = Affine.fit(x)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(states.offset, exact.mean(0), rtol=1e-7)
    np.testing.assert_allclose(states.scale[[0, 2]], exact.std(0)[[0, 2]] + 1e-3, rtol=1e-5)
    y = states.normalize(x)
    np.testing.assert_array_equal(y, (x - states.offset.astype(np.float32)) / states.scale.astype(np.float32))
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y[:, 1], 0)
    np.testing.assert_allclose(states.denormalize(y), x, rtol=1e-6)


@pytest.mark.parametrize(
    ("what", "mean", "deviation", "scale"),
    [
        ("a constant", 5.0, 0.0, 5.0),
        ("zero", 0.0, 0.0, 1.0),
        ("a small constant", 1e-9, 0.0, 1.0),
        ("float32's rounding of a large constant", 1e6, 0.03, 1e6),
        ("noise on a constant", 0.3, 1e-6, 1.0),
        ("noise on a large constant", 1e8, 4.0, 1e8),
        ("a large offset", 1e5, 50.0, 50.001),
        ("D4RL's ordinary column", 1.2, 0.15, 0.151),
        ("a small deviation", 1.0, 2e-3, 3e-3),
        ("tiny units", 0.0, 1e-5, 2e-5),
        ("tiny units around another number", 2e-5, 1e-5, 2e-5),
        ("where the rules for tiny units and others meet", 0.0, 1e-3, 2e-3),
    ],
)
def test_what_hardly_varies_is_not_blown_up_and_tiny_units_are_not_lost(
    what: str, mean: float, deviation: float, scale: float
) -> None:
    noise = np.random.default_rng(0).normal(size=(20_000, 1))
    x = (mean + deviation * (noise - noise.mean()) / noise.std()).astype(np.float32)
    states = Affine.fit(x)
    np.testing.assert_allclose(states.scale, [scale], rtol=2e-2)
    normalized = states.normalize(x).std()
    assert normalized < 1e-5 if scale == max(1, abs(mean)) else 0.1 < normalized <= 1.01, what


def test_fit_sums_in_float64() -> None:
    """300,000 rows of 1000 and 1001: summed in float32 the mean is off by several units."""
    x = np.full((300_000, 1), 1000, np.float32)
    x[::2] = 1001
    states = Affine.fit(x)
    np.testing.assert_array_equal(states.offset, 1000.5)
    np.testing.assert_allclose(states.scale, 0.5 + 1e-3, rtol=1e-6)


def test_fitted_maps_are_float32_numbers() -> None:
    """So that a file of float32 holds them exactly."""
    states = Affine.fit(np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32))
    for x in (states.offset, states.scale):
        np.testing.assert_array_equal(x, x.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_and_tensors_keep_type_and_dtype(dtype: type) -> None:
    x = np.array([[1, 1], [2, 4], [0.5, -8]], dtype)
    expected = [[0, 1], [2, 2], [-1, -2]]
    for given_, back in ((x, STATES.normalize(x)), (torch.from_numpy(x), STATES.normalize(torch.from_numpy(x)))):
        assert type(back) is type(given_)
        assert back.dtype == given_.dtype
        np.testing.assert_array_equal(back, expected)
        np.testing.assert_array_equal(STATES.denormalize(back), x)
    np.testing.assert_array_equal(x, [[1, 1], [2, 4], [0.5, -8]])  # the input stays
    np.testing.assert_array_equal(STATES.normalize(x[0]), expected[0])  # a single row too


def test_integers_become_floats() -> None:
    x = np.array([[1, 1], [2, 4]])
    np.testing.assert_array_equal(STATES.normalize(x), [[0, 1], [2, 2]])
    np.testing.assert_array_equal(STATES.denormalize(x), [[1.5, 1], [2, 10]])
    for method in (STATES.normalize, STATES.denormalize):
        np.testing.assert_array_equal(method(torch.from_numpy(x)), method(x))


def test_gradients_pass() -> None:
    x = torch.ones(5, 2, dtype=torch.float64, requires_grad=True)
    STATES.normalize(x).sum().backward()
    np.testing.assert_allclose(x.grad, np.broadcast_to(1 / STATES.scale, (5, 2)))


def test_bounds_become_minus_one_and_one() -> None:
    actions = Affine.between([-2, 0.1, -3], [1, 0.7, 5])
    low, high = np.array([-2, 0.1, -3], np.float32), np.array([1, 0.7, 5], np.float32)
    np.testing.assert_allclose(
        actions.normalize(np.stack([low, high, (low + high) / 2])).T, [[-1, 1, 0]] * 3, atol=1e-6
    )
    np.testing.assert_allclose(actions.denormalize(np.array([[-1.0] * 3, [1.0] * 3])), [low, high], rtol=1e-6)


def test_maps_are_equal_by_value() -> None:
    assert Affine.between([-1, -2], [1, 2]) == Affine([0, 0], [1, 2])
    assert Affine.between([-1, -2], [1, 2]) != Affine.between([-1, -2], [1, 3])
    assert Affine.between([-1, -2], [1, 2]) != Affine.between([-1, -1], [1, 3])
    assert Affine.between([-1], [1]) != Affine.between([-1, -1], [1, 1])
    assert Affine.between([-1], [1]) != None  # noqa: E711 (what an unknown map is)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Affine(np.zeros(3), np.ones(2)), "shape"),
        (lambda: Affine(np.zeros((2, 2)), np.ones((2, 2))), "shape"),
        (lambda: Affine(np.zeros(2), np.array([1.0, 0.0])), "positive"),
        (lambda: Affine(np.zeros(2), np.array([1.0, np.inf])), "finite"),
        (lambda: Affine(np.array([np.nan]), np.ones(1)), "finite"),
        (lambda: Affine.between([-1, 1], [1, 1]), "low < high"),
        (lambda: Affine.between([-1, 1], [1]), "low < high"),
        (lambda: Affine.between(-1, 1), "low < high"),
        (lambda: Affine.between([-np.inf], [np.inf]), "must be finite"),
        (lambda: Affine.between([-1], [1e300]), "must be finite"),
        (lambda: Affine.between(["left"], ["right"]), "must be arrays of numbers"),
        (lambda: Affine.scores(1.0, 1.0), r"random < expert, got 1.0 and 1.0"),
        (lambda: Affine.scores(1.0, float("nan")), "reference scores must be finite"),
        (lambda: STATES.normalize(np.zeros((4, 3))), r"expected rows of 2 numbers, got shape \(4, 3\)"),
        (lambda: STATES.denormalize(torch.zeros(3)), r"expected rows of 2 numbers, got shape \(3,\)"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_no_map_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- Units -----------------------------------------------------------------------------------------------------------

magnitudes = st.floats(min_value=2**-10, max_value=2**13, width=32)
numbers = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda x: -x))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(numbers, numbers).filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=4))
def test_float32_bounds_come_back_exactly(pairs: list[tuple[float, float]]) -> None:
    low, high = np.sort(np.array(pairs, np.float32), axis=1).T
    units = Units(STATES, Affine.between(low, high))
    for known in (units, Units.from_dict(json.loads(json.dumps(units.to_dict())))):
        for bound, expected in zip(known.action_bounds, (low, high), strict=True):
            assert bound.dtype == np.float32
            np.testing.assert_array_equal(bound, expected)


def test_unknown_bounds_say_how_to_give_them() -> None:
    for ask in (lambda: Units(STATES).action_bounds, Units(STATES).require_actions):
        with pytest.raises(ValueError, match=r"action bounds are not known.*action_low"):
            ask()


@pytest.mark.parametrize(
    "units",
    [
        Units(STATES),
        Units(
            Affine.fit(np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)),
            Affine.between([-0.1, 1 / 3], [0.7, 2 / 3]),
            Affine.scores(-20.272305, 3234.3),
            "Hopper-v5",
        ),
    ],
)
def test_units_come_back_exactly_through_json(units: Units) -> None:
    back = Units.from_dict(json.loads(json.dumps(units.to_dict())))
    assert back == units
    assert back.to_dict() == units.to_dict()


def test_units_that_hold_the_id_alone_are_read() -> None:
    """As files of older versions do."""
    values = Units(STATES, env_id="Hopper-v5").to_dict()
    assert sorted(values) == ["actions", "env_id", "returns", "states"]
    assert Units.from_dict(values).env_spec is None


def test_a_recorded_environment_has_the_units_id() -> None:
    spec = json.dumps({"id": "Hopper-v5", "kwargs": {}})
    for env_id in ("Hopper-v5", "module:Hopper-v5"):
        units = Units(STATES, env_id=env_id, env_spec=spec)
        assert Units.from_dict(json.loads(json.dumps(units.to_dict()))) == units
        assert units != Units(STATES, env_id=env_id)
    for other in (None, "Hopper-v4"):
        with pytest.raises(ValueError, match=f"the recorded environment is not {other!r}"):
            Units(STATES, env_id=other, env_spec=spec)


def test_units_differ_where_any_part_does() -> None:
    units = Units(STATES, Affine.between([-1], [1]), Affine.scores(0, 10), "Hopper-v5")
    others = [
        Units(Affine([1, -2], [0.5, 4]), units.actions, units.returns, units.env_id),
        Units(STATES, Affine.between([-1], [2]), units.returns, units.env_id),
        Units(STATES, None, units.returns, units.env_id),
        Units(STATES, units.actions, Affine.scores(0, 11), units.env_id),
        Units(STATES, units.actions, units.returns, "Hopper-v4"),
    ]
    assert units == Units(STATES, Affine.between([-1], [1]), Affine.scores(0, 10), "Hopper-v5")
    assert all(other != units for other in others)


@pytest.mark.parametrize("bad", [{}, {"states": 3, "actions": None, "returns": None, "env_id": None}])
def test_what_is_no_units_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Units.from_dict(bad)


# --- returns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "random", "expert"),
    [
        ("HalfCheetah-v5", -280.178953, 12135.0),
        ("Hopper-v5", -20.272305, 3234.3),
        ("Hopper-v2", -20.272305, 3234.3),
        ("Walker2d-v4", 1.629008, 4592.3),
    ],
)
def test_d4rl_scores(env_id: str, random: float, expert: float) -> None:
    returns = d4rl_returns(env_id)
    assert returns is not None
    middle = (random + expert) / 2
    np.testing.assert_allclose(returns.normalize(np.array([random, middle, expert])), [0, 50, 100], atol=1e-12)
    np.testing.assert_allclose(returns.denormalize(np.array([0.0, 100.0])), [random, expert])
    assert d4rl_scores(env_id) == (random, expert)


def test_d4rl_knows_three_environments() -> None:
    for unknown in ("Ant-v5", "Hop-v5", None):
        assert d4rl_returns(unknown) is None
        assert d4rl_scores(unknown) is None


def test_returns_are_the_units_own_in_their_environment_and_d4rl_s_in_another() -> None:
    own = Affine.scores(0.0, 10.0)
    units = Units(STATES, returns=own, env_id="Hopper-v5")
    assert units.returns_in("Hopper-v5") == own
    assert units.returns_in("Hopper-v4") == own  # another version is the same task
    assert units.returns_in("Walker2d-v5") == d4rl_returns("Walker2d-v5")
    assert units.returns_in("Ant-v5") is None
    assert Units(STATES, env_id="Hopper-v5").returns_in("Hopper-v5") == d4rl_returns("Hopper-v5")
    assert Units(STATES, env_id="Toy-v0").returns_in("Toy-v0") is None
    assert Units(STATES, returns=own).returns_in("Hopper-v5") == d4rl_returns("Hopper-v5")  # own, but of which?
