"""The dataset: what follows what, parts and joins against a naive reference, names of content, statistics by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from conftest import STATES, three_episodes

from sdw_fast.data import TransitionDataset, concatenate
from sdw_fast.readers import load_dataset
from sdw_fast.units import Affine, Units

# --- a naive reference: a list of transitions ------------------------------------------------------------------------

Transition = tuple[float, float, float, float, bool, bool]  # s, a, r, s', terminated, truncated


def random_transitions(rng: np.random.Generator, *, follow: bool = True) -> list[Transition]:
    """Episodes of 1 to 6 steps, each state a number of its own; every end has a successor that no row has."""
    transitions: list[Transition] = []
    for _ in range(rng.integers(1, 8)):
        states = rng.normal(size=rng.integers(2, 8)).astype(np.float32)
        terminated = bool(rng.integers(2))
        for step in range(len(states) - 1):
            last = step == len(states) - 2
            action, reward = rng.uniform(-1, 1), rng.normal()
            ends = (last and terminated, last and not terminated)
            transitions.append((states[step], np.float32(action), np.float32(reward), states[step + 1], *ends))
    return transitions


def columns(transitions: list[Transition], *, next_observations: bool = True) -> dict[str, np.ndarray]:
    """The transitions as arrays; states and next states get a second number, their negation."""
    states, actions, rewards, following, terminations, truncations = (
        np.array(x) for x in zip(*transitions, strict=True)
    )
    values = {
        "observations": np.stack([states, -states], axis=1),
        "actions": actions[:, None],
        "rewards": rewards,
        "terminations": terminations,
        "truncations": truncations,
    }
    return values | ({"next_observations": np.stack([following, -following], axis=1)} if next_observations else {})


def assert_holds(data: TransitionDataset, transitions: list[Transition]) -> None:
    expected = columns(transitions)
    for name in ("observations", "actions", "rewards", "terminations", "truncations"):
        np.testing.assert_array_equal(getattr(data, name), expected[name], err_msg=name)
    np.testing.assert_array_equal(data.next_observations(), expected["next_observations"])
    rows = np.random.default_rng(0).integers(len(data), size=2 * len(data))
    np.testing.assert_array_equal(data.next_observations(rows), expected["next_observations"][rows])


def shift(transitions: list[Transition]) -> list[Transition]:
    """D4RL's rule without next observations: a truncated row is left out, and its predecessor cut before it."""
    kept = []
    for row, (s, a, r, _, terminated, truncated) in enumerate(transitions):
        if terminated:
            kept.append((s, a, r, s, True, truncated))  # what follows is never used
        elif not truncated:
            following, *_, cut = transitions[row + 1]
            kept.append((s, a, r, following, False, cut and not transitions[row + 1][4]))
    return kept


def take(transitions: list[Transition], rows: list[int]) -> list[Transition]:
    """Rows as pieces of episodes that stay apart."""
    taken = []
    for place, row in enumerate(rows):
        s, a, r, following, terminated, truncated = transitions[row]
        goes_on = place + 1 < len(rows) and rows[place + 1] == row + 1
        taken.append((s, a, r, following, terminated, truncated or not (goes_on or terminated)))
    return taken


@pytest.mark.parametrize("seed", range(20))
def test_next_observations_are_those_of_the_source(seed: int) -> None:
    transitions = random_transitions(np.random.default_rng(seed))
    assert_holds(load_dataset(columns(transitions)), transitions)


@pytest.mark.parametrize("seed", range(20))
def test_next_observations_are_derived_where_the_source_has_none(seed: int) -> None:
    transitions = random_transitions(np.random.default_rng(seed))
    expected = shift(transitions)
    source = columns(transitions, next_observations=False)
    if expected:
        assert_holds(load_dataset(source), expected)
    else:  # episodes of one truncated row
        with pytest.raises(ValueError, match="no transition is left"):
            load_dataset(source)


@pytest.mark.parametrize("seed", range(10))
def test_shuffled_rows_keep_what_follows_each(seed: int) -> None:
    rng = np.random.default_rng(seed)
    transitions = random_transitions(rng)
    shuffled = [transitions[row] for row in rng.permutation(len(transitions))]
    data = load_dataset(columns(shuffled))
    expected = columns(shuffled)
    np.testing.assert_array_equal(data.next_observations(), expected["next_observations"])
    np.testing.assert_array_equal(data.truncations[:-1], expected["truncations"][:-1])


@pytest.mark.parametrize("seed", range(20))
def test_subsets_and_joins_against_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = random_transitions(rng), random_transitions(rng)
    rows = sorted(rng.choice(len(first), rng.integers(1, len(first) + 1), replace=False).tolist())
    if seed % 2:
        rng.shuffle(rows)
    part = load_dataset(columns(first)).subset(rows)
    assert_holds(part, take(first, rows))
    derived = load_dataset(columns([*second, first[0]], next_observations=False))
    both = concatenate([part, load_dataset(columns(second)), derived])
    assert_holds(both, [*take(first, rows), *second, *shift([*second, (*first[0][:4], first[0][4], not first[0][4])])])


def test_next_observations_takes_row_numbers_only() -> None:
    data = load_dataset(three_episodes())
    following = data.next_observations()
    following[:] = 0  # an array of its own
    np.testing.assert_array_equal(data.next_observations(np.array([6, 0, 0]))[:, 0], [22, 1, 1])
    assert data.next_observations(np.array([], np.int64)).shape == (0, 2)
    for bad in ([7], [-1], np.ones(7, bool), [0.5]):
        with pytest.raises(IndexError, match="row numbers from 0 to 6"):
            data.next_observations(bad)


# --- one array, frozen -----------------------------------------------------------------------------------------------


def test_nothing_of_a_dataset_can_be_replaced() -> None:
    data = load_dataset(three_episodes())
    for name in (field.name for field in dataclasses.fields(data)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(data, name, None)


def test_only_next_observations_that_are_no_row_are_held() -> None:
    data = load_dataset(three_episodes())
    held = {name: value.nbytes for name, value in vars(data).items() if isinstance(value, np.ndarray)}
    assert held["observations"] == 7 * 2 * 4
    assert held["jump_observations"] == 3 * 2 * 4  # one an episode
    data.normalized_observations()
    assert held == {name: value.nbytes for name, value in vars(data).items() if isinstance(value, np.ndarray)}


def test_normalized_observations_follow_the_units() -> None:
    data = load_dataset(three_episodes())
    np.testing.assert_allclose(data.normalized_observations().mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(data.normalized_observations().std(0), 1, atol=1e-3)
    other = dataclasses.replace(data, units=Units(Affine([1, 2], [3, 4])))
    np.testing.assert_allclose(other.normalized_observations(), (data.observations - [1, 2]) / [3, 4], rtol=1e-6)


# --- names of content ------------------------------------------------------------------------------------------------


def test_content_hash_knows_every_array_and_the_units() -> None:
    data = load_dataset(three_episodes())
    units = data.units
    hashes = {load_dataset(three_episodes()).content_hash}
    assert hashes == {data.content_hash}
    for name in ("observations", "actions", "rewards", "next_observations"):
        changed = three_episodes()
        changed[name] = changed[name].copy()
        changed[name].flat[3] += 0.5
        hashes.add(load_dataset(changed).content_hash)
    hashes.add(load_dataset(three_episodes(terminations=np.arange(7) == 3)).content_hash)
    hashes.add(load_dataset(three_episodes(truncations=np.arange(7) == 1)).content_hash)
    hashes.add(load_dataset(three_episodes(action_low=-2, action_high=1)).content_hash)
    hashes.add(load_dataset(three_episodes(), env_id="Toy-v0").content_hash)
    for other in (Affine([1, 2], [3, 4]), units.states):
        hashes.add(dataclasses.replace(data, units=Units(other, units.actions, Affine.scores(0, 1))).content_hash)
    assert len(hashes) == 11
    assert all(len(one) == 32 for one in hashes)


def test_content_hash_is_that_of_the_arrays_as_they_are() -> None:
    data = load_dataset(three_episodes())
    before = data.content_hash
    data.rewards[2] += 1
    changed = data.content_hash
    assert changed != before
    data.rewards[2] -= 1
    assert data.content_hash == before


# --- parts and statistics --------------------------------------------------------------------------------------------


def test_subset_keeps_pieces_apart_and_the_units() -> None:
    data = load_dataset(three_episodes(action_low=-2, action_high=[3]), env_id="Hopper-v5")
    part = data.subset([0, 1, 4, 5, 2])
    np.testing.assert_array_equal(part.observations[:, 0], [0, 1, 11, 20, 2])
    np.testing.assert_array_equal(part.next_observations()[:, 0], [1, 2, 12, 21, 3])
    np.testing.assert_array_equal(part.episode_ends, [1, 2, 3, 4])
    np.testing.assert_array_equal(part.terminations, [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(part.truncations, [0, 1, 1, 1, 0])
    assert part.units == data.units
    assert (part.env_id, part.action_bounds) == ("Hopper-v5", (-2, 3))
    mask = data.rewards > 5
    np.testing.assert_array_equal(data.subset(mask).rewards, [10, 20, 100, 200])
    assert data.subset(slice(0, 3)).episode_returns == [6]
    assert data.subset(slice(None)).content_hash == data.content_hash
    for nothing in ([], np.zeros(7, bool)):
        with pytest.raises(ValueError, match="non-empty"):
            data.subset(nothing)
    for beyond in ([7], np.ones(6, bool)):
        with pytest.raises(IndexError):
            data.subset(beyond)


def test_concatenate_keeps_episodes_apart_and_what_all_agree_on() -> None:
    bounds = {"action_low": -2, "action_high": 3}
    first = load_dataset(three_episodes(**bounds), env_id="Hopper-v5")
    second = first.subset([3])
    both = concatenate([first, second])
    np.testing.assert_array_equal(both.episode_returns, [6, 30, 300, 10])
    np.testing.assert_array_equal(both.observations[:, 0], [*STATES, 10])
    np.testing.assert_allclose(both.units.states.offset, both.observations.mean(0), rtol=1e-6)
    np.testing.assert_allclose(both.units.states.scale, both.observations.std(0) + 1e-3, rtol=1e-6)
    assert (both.env_id, both.action_bounds, both.units.returns) == ("Hopper-v5", (-2, 3), first.units.returns)
    assert both.path is None
    elsewhere = concatenate([first, load_dataset(three_episodes(**bounds))])
    assert (elsewhere.env_id, elsewhere.units.returns) == (None, None)


def test_concatenate_refuses_what_does_not_fit() -> None:
    first = load_dataset(three_episodes())
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])
    for changes in (
        {"actions": np.zeros((7, 2))},
        {"observations": np.zeros((7, 1)), "next_observations": np.ones((7, 1))},
    ):
        with pytest.raises(ValueError, match="widths"):
            concatenate([first, load_dataset(three_episodes(**changes))])
    wide: dict[str, Any] = {"actions": np.full((7, 1), 1.5)}  # no bounds are known
    for changes in ({"action_low": -2, "action_high": 2}, {"action_low": -1, "action_high": 2}, wide):
        other = load_dataset(three_episodes(**changes))
        for pair in ([first, other], [other, first]):
            with pytest.raises(ValueError, match="differ in their action bounds"):
                concatenate(pair)


def test_returns_are_summed_in_float64() -> None:
    rewards = np.full(7, 1.0, np.float32)
    rewards[0] = 2.0**25
    data = load_dataset(three_episodes(rewards=rewards))
    np.testing.assert_array_equal(data.episode_returns, [2.0**25 + 2, 2, 2])


def test_summary_by_hand() -> None:
    summary = load_dataset(three_episodes(), env_id="Walker2d-v5").summary()
    returns = np.array([6.0, 30.0, 300.0])
    assert summary == {
        "name": None,
        "env_id": "Walker2d-v5",
        "transitions": 7,
        "episodes": 3,
        "observation_dim": 2,
        "action_dim": 1,
        "mean_episode_length": pytest.approx(7 / 3),
        "return_mean": pytest.approx(112.0),
        "return_std": pytest.approx(returns.std()),
        "return_min": 6.0,
        "return_max": 300.0,
        "normalized_return_mean": pytest.approx(100 * (112 - 1.629008) / (4592.3 - 1.629008)),
    }
    assert load_dataset(three_episodes(), env_id="Other-v0").summary()["normalized_return_mean"] is None
