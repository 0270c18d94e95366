"""Datasets from every source, against arrays worked out by hand, and every way of refusing one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

from sdw_fast import Normalizer, TransitionDataset, concatenate, load_dataset, normalized_return

# Three episodes of a two-number state: [0 1 2] terminated, [10 11] truncated, [20 21] cut by the end of the data.
STATES = np.array([0, 1, 2, 10, 11, 20, 21], np.float32)
NEXT = np.array([1, 2, 3, 11, 12, 21, 22], np.float32)


def arrays(**changes: Any) -> dict[str, Any]:
    """The three episodes under Gymnasium's names; a change of None leaves an array out."""
    values: dict[str, Any] = {
        "observations": np.stack([STATES, -STATES], axis=1),
        "actions": STATES[:, None] / 100,
        "rewards": np.array([1, 2, 3, 10, 20, 100, 200], np.float32),
        "terminations": np.array([0, 0, 1, 0, 0, 0, 0], bool),
        "truncations": np.array([0, 0, 0, 0, 1, 0, 0], bool),
        "next_observations": np.stack([NEXT, -NEXT], axis=1),
    }
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def d4rl(values: dict[str, Any]) -> dict[str, Any]:
    return {{"terminations": "terminals", "truncations": "timeouts"}.get(k, k): v for k, v in values.items()}


def write_hdf5(path: Path, values: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in values.items():
            file[name] = value
    return path


def write_npz(path: Path, values: dict[str, Any]) -> Path:
    np.savez(path, **values)
    return path


@pytest.fixture(autouse=True)
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def make_minari(dataset_id: str, episodes: list[dict[str, Any]] | None = None, **options: Any) -> minari.MinariDataset:
    """The three episodes as a Minari dataset: T + 1 observations each."""
    if episodes is None:
        values = arrays()
        episodes = [
            {
                "observations": np.concatenate([values["observations"][a:b], values["next_observations"][b - 1 : b]]),
                **{k: values[k][a:b] for k in ("actions", "rewards", "terminations", "truncations")},
            }
            for a, b in ((0, 3), (3, 5), (5, 7))
        ]
    options = {
        "observation_space": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
        "action_space": gym.spaces.Box(-1, 1, (1,), np.float32),
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari would like an author, an e-mail address and more
        return minari.create_dataset_from_buffers(dataset_id, [EpisodeBuffer(**e) for e in episodes], **options)


def assert_is_the_three_episodes(data: TransitionDataset) -> None:
    expected = arrays()
    for name in ("observations", "actions", "rewards", "next_observations", "terminations"):
        np.testing.assert_array_equal(getattr(data, name), expected[name], err_msg=name)
    np.testing.assert_array_equal(data.truncations, [0, 0, 0, 0, 1, 0, 1])  # the end of the data ends an episode
    for name in ("observations", "actions", "rewards", "next_observations"):
        assert getattr(data, name).dtype == np.float32
        assert getattr(data, name).flags.c_contiguous
    assert data.terminations.dtype == data.truncations.dtype == np.bool_
    np.testing.assert_array_equal(data.episode_ends, [2, 4, 6])
    np.testing.assert_array_equal(data.episode_returns, [6, 30, 300])


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", [dict, d4rl])
@pytest.mark.parametrize("kind", ["dict", "npz", "hdf5"])
def test_arrays_and_files_in_both_styles(tmp_path: Path, kind: str, style: Callable[..., dict[str, Any]]) -> None:
    values = style(arrays(observations=arrays()["observations"].astype(np.float64)))
    source: Any = {
        "dict": lambda: values,
        "npz": lambda: write_npz(tmp_path / "data.npz", values),
        "hdf5": lambda: write_hdf5(tmp_path / "data.hdf5", values),
    }[kind]()
    data = load_dataset(source, env_id="Hopper-v5")
    assert_is_the_three_episodes(data)
    assert data.env_id == "Hopper-v5"
    assert (data.path, data.name) == ((None, None) if kind == "dict" else (source, "data"))
    assert load_dataset(str(source) if kind != "dict" else source).env_id is None


def test_minari_by_id_and_as_object(minari_root: Path) -> None:
    dataset = make_minari("toy/three-v0", env="Pendulum-v1")
    by_id = load_dataset("toy/three-v0")
    assert_is_the_three_episodes(by_id)
    assert_is_the_three_episodes(load_dataset(dataset))
    assert (by_id.name, by_id.env_id, by_id.reference_scores) == ("toy/three-v0", "Pendulum-v1", None)
    assert by_id.path == minari_root / "toy" / "three-v0"


def test_minari_storage_other_than_hdf5(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_minari("toy/three-v0")
    monkeypatch.setattr(type(dataset.storage), "FORMAT", "other")
    assert_is_the_three_episodes(load_dataset(dataset))


def test_minari_object_gives_the_episodes_that_it_selects() -> None:
    dataset = make_minari("toy/three-v0").filter_episodes(lambda episode: len(episode) == 2)
    data = load_dataset(dataset)
    np.testing.assert_array_equal(data.observations[:, 0], [10, 11, 20, 21])
    np.testing.assert_array_equal(data.next_observations[:, 0], [11, 12, 21, 22])  # type: ignore[index]


def test_minari_reference_scores_come_first_and_suite_names_may_be_short() -> None:
    dataset = make_minari("sdw/toy/medium-v0", env="Pendulum-v1")
    dataset.storage.update_metadata({"ref_min_score": 0.0, "ref_max_score": 224.0})
    for name in ("sdw/toy/medium-v0", "toy/medium-v0", "toy/medium"):
        data = load_dataset(name)
        assert data.reference_scores == (0.0, 224.0)
        assert data.summary()["normalized_return_mean"] == pytest.approx(50.0)  # the mean return is 112


def test_every_source_of_the_same_data_has_the_same_content_hash(tmp_path: Path) -> None:
    make_minari("toy/three-v0")
    hashes = {
        load_dataset(source).content_hash
        for source in ("toy/three-v0", arrays(), write_npz(tmp_path / "a.npz", d4rl(arrays())))
    }
    assert len(hashes) == 1
    for name in ("observations", "actions", "rewards", "next_observations"):
        changed = arrays()
        changed[name] = changed[name].copy()
        changed[name].flat[3] += 1
        assert load_dataset(changed).content_hash not in hashes, name
    assert load_dataset(arrays(truncations=np.array([0, 1, 0, 0, 1, 0, 1]))).content_hash not in hashes


def test_next_observations_by_shifting() -> None:
    data = load_dataset(arrays(next_observations=None))
    # The truncated rows (state 11 and the last, 21) have no known successor and are left out; the terminated row stays.
    np.testing.assert_array_equal(data.observations[:, 0], [0, 1, 2, 10, 20])
    np.testing.assert_array_equal(data.next_observations[:, 0], [1, 2, 2, 11, 21])  # type: ignore[index]
    np.testing.assert_array_equal(data.terminations, [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(data.truncations, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(data.rewards, [1, 2, 3, 10, 100])


def test_shifting_past_an_episode_of_one_truncated_row() -> None:
    values = arrays(next_observations=None, truncations=np.array([0, 0, 0, 1, 1, 0, 0], bool))
    data = load_dataset(values)
    np.testing.assert_array_equal(data.observations[:, 0], [0, 1, 2, 20])
    np.testing.assert_array_equal(data.truncations, [0, 0, 0, 1])


def test_truncations_are_found_where_next_observations_do_not_follow() -> None:
    assert_is_the_three_episodes(load_dataset(d4rl(arrays(truncations=None))))


def test_columns_of_shape_m_1_and_numbers_as_flags_are_taken() -> None:
    values = arrays()
    for name in ("rewards", "terminations", "truncations"):
        values[name] = values[name].astype(np.float64)[:, None]
    assert_is_the_three_episodes(load_dataset(values))


def test_matching_float32_arrays_are_not_copied() -> None:
    values = arrays(truncations=np.array([0, 0, 0, 0, 1, 0, 1], bool))
    data = load_dataset(values)
    for name, value in values.items():
        assert np.shares_memory(getattr(data, name), value), name


def test_the_callers_truncations_are_not_changed() -> None:
    values = arrays()
    load_dataset(values)
    assert not values["truncations"][-1]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None}, "lacks rewards. It holds: observations, actions, terminations"),
        ({"terminations": None, "actions": None}, r"lacks actions, terminations \(or terminals\)"),
        (
            {"truncations": None, "next_observations": None},
            r"lacks truncations \(or timeouts\); .* only beside next_obs",
        ),
        ({"actions": np.arange(7)}, "discrete actions"),
        ({"observations": {"position": np.zeros((7, 2))}}, "observations is a dict"),
        ({"observations": np.zeros((7, 8, 8, 3), np.uint8)}, r"observations must have shape \(M, dim\).*images"),
        ({"observations": np.zeros(7)}, r"observations must have shape \(M, dim\), got \(7,\)"),
        ({"observations": np.zeros((7, 0))}, "no columns"),
        ({"observations": np.zeros((0, 2))}, "empty"),
        ({"actions": np.zeros((6, 1))}, r"actions must have shape \(7, dim\) to match observations, got \(6, 1\)"),
        ({"next_observations": np.zeros((7, 3))}, r"next_observations must have shape \(7, 2\)"),
        ({"rewards": np.zeros((7, 2))}, r"rewards must have shape \(7,\)"),
        ({"truncations": np.zeros(5, bool)}, r"truncations must have shape \(7,\)"),
        ({"rewards": np.array([0, 0, 0, 0, np.inf, np.nan, 0])}, "rewards has a value .* first in row 4"),
        ({"actions": np.array([[0], [0], [np.nan], [0], [0], [0], [0.0]])}, "actions has a value .* first in row 2"),
        ({"observations": np.full((7, 2), 1e300)}, "observations has a value .* first in row 0"),
        ({"terminations": np.array([0, np.nan, 0, 0, 0, 0, 0])}, "terminations has a value .* first in row 1"),
        ({"actions": np.full((7, 1), "left")}, "array of numbers"),
        ({"actions": np.full((7, 1), None)}, "array of numbers"),
    ],
)
def test_bad_arrays_are_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(arrays(**changes))


def test_row_of_a_bad_value_is_exact_beyond_the_first_block() -> None:
    observations = np.zeros((150_000, 1), np.float32)
    observations[140_001] = np.nan
    flags = np.zeros(150_000, bool)
    with pytest.raises(ValueError, match="row 140001"):
        TransitionDataset(observations, observations, flags, flags, flags)


def test_nothing_left_after_shifting_is_reported() -> None:
    with pytest.raises(ValueError, match="no transition is left"):
        load_dataset(arrays(next_observations=None, terminations=np.zeros(7), truncations=np.ones(7)))


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_damaged_and_missing_files_are_reported(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    with pytest.raises(FileNotFoundError, match="no dataset file"):
        load_dataset(path)
    (write_hdf5 if suffix == ".hdf5" else write_npz)(path, arrays())
    whole = path.read_bytes()
    for size in (len(whole) // 2, 10, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"damaged or truncated\?"):
            load_dataset(path)


def test_npz_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    write_npz(tmp_path / "data.npz", arrays(rewards=np.array([{}] * 7, dtype=object)))
    with pytest.raises(ValueError, match="not of objects"):
        load_dataset(tmp_path / "data.npz")


def test_hdf5_of_groups_or_without_keys_is_reported(tmp_path: Path) -> None:
    values = arrays(observations=None)
    path = write_hdf5(tmp_path / "data.h5", {**values, "observations/position": np.zeros((7, 2))})
    with pytest.raises(ValueError, match="observations is a group"):
        load_dataset(path)
    with pytest.raises(ValueError, match=r"data.h5 lacks observations, .* It holds: actions, infos, rewards"):
        load_dataset(write_hdf5(path, {"actions": np.zeros((7, 1)), "rewards": np.zeros(7), "infos/x": np.zeros(7)}))


def test_unsupported_minari_spaces_are_reported() -> None:
    step = {"rewards": [0.0], "terminations": [True], "truncations": [False]}
    states = np.zeros((2, 2), np.float32)
    discrete = make_minari(
        "toy/discrete-v0",
        [{"observations": states, "actions": np.zeros(1, np.int64), **step}],
        action_space=gym.spaces.Discrete(3),
    )
    with pytest.raises(ValueError, match=r"action space Discrete\(3\)"):
        load_dataset(discrete)
    box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    nested = make_minari(
        "toy/dict-v0",
        [{"observations": {"goal": states}, "actions": np.zeros((1, 1), np.float32), **step}],
        observation_space=gym.spaces.Dict({"goal": box}),
    )
    with pytest.raises(ValueError, match="observation space Dict"):
        load_dataset(nested)
    image = make_minari(
        "toy/image-v0",
        [{"observations": np.zeros((2, 8, 8, 3), np.uint8), "actions": np.zeros((1, 1), np.float32), **step}],
        observation_space=gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
    )
    with pytest.raises(ValueError, match="observation space Box"):
        load_dataset(image)


def test_empty_and_damaged_minari_datasets_are_reported(minari_root: Path) -> None:
    make_minari("toy/empty-v0", [])
    with pytest.raises(ValueError, match="empty"):
        load_dataset("toy/empty-v0")
    make_minari("toy/three-v0")
    path = minari_root / "toy/three-v0/data/main_data.hdf5"
    with h5py.File(path, "a") as file:
        del file["episode_1/rewards"]
    with pytest.raises(ValueError, match="cannot read episode 1"):
        load_dataset("toy/three-v0")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"damaged or truncated\?"):
        load_dataset("toy/three-v0")
    make_minari(
        "toy/short-v0",
        [{"observations": np.zeros((2, 2)), "actions": np.zeros((2, 1)), "rewards": [0.0, 0.0],
          "terminations": [False, True], "truncations": [False, False]}],
    )  # fmt: skip
    with pytest.raises(ValueError, match="one observation more"):
        load_dataset("toy/short-v0")


def test_unknown_minari_id_lists_the_local_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    make_minari("toy/three-v0")

    def no_network(dataset_id: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("minari.storage.hosting.download_dataset", no_network)
    with pytest.raises(FileNotFoundError, match=r"toy/three-v0.*no route to host.*sdw-fast collect"):
        load_dataset("toy/four-v0")


def test_unknown_kinds_of_source_are_reported() -> None:
    with pytest.raises(TypeError, match="cannot load a dataset from ndarray"):
        load_dataset(np.zeros(3))  # type: ignore[arg-type]


# --- parts and statistics --------------------------------------------------------------------------------------------


def test_subset_keeps_pieces_apart_and_the_normalizer() -> None:
    data = load_dataset(arrays())
    part = data.subset([0, 1, 4, 5, 2])
    np.testing.assert_array_equal(part.observations[:, 0], [0, 1, 11, 20, 2])
    np.testing.assert_array_equal(part.episode_ends, [1, 2, 3, 4])
    np.testing.assert_array_equal(part.terminations, [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(part.truncations, [0, 1, 1, 1, 0])
    assert part.normalizer is data.normalizer
    mask = data.rewards > 5
    np.testing.assert_array_equal(data.subset(mask).rewards, [10, 20, 100, 200])
    assert data.subset(slice(0, 3)).episode_returns == [6]
    assert data.subset(slice(None)).content_hash == data.content_hash
    for nothing in ([], np.zeros(7, bool)):
        with pytest.raises(ValueError, match="non-empty"):
            data.subset(nothing)
    with pytest.raises(IndexError):
        data.subset([7])


def test_concatenate_keeps_episodes_apart() -> None:
    first = load_dataset(arrays(), env_id="Hopper-v5")
    second = first.subset([3])
    both = concatenate([first, second])
    np.testing.assert_array_equal(both.episode_returns, [6, 30, 300, 10])
    np.testing.assert_array_equal(both.observations[:, 0], [*STATES, 10])
    np.testing.assert_allclose(both.normalizer.mean, both.observations.mean(0), rtol=1e-6)
    assert both.env_id == "Hopper-v5"
    assert concatenate([first, load_dataset(arrays())]).env_id is None
    assert concatenate([first, TransitionDataset(**arrays(next_observations=None))]).next_observations is None
    with pytest.raises(ValueError, match="differ"):
        concatenate([first, load_dataset(arrays(actions=np.zeros((7, 2))))])
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])


def test_summary_by_hand() -> None:
    summary = load_dataset(arrays(), env_id="Walker2d-v5").summary()
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
    assert load_dataset(arrays(), env_id="Other-v0").summary()["normalized_return_mean"] is None


def test_normalized_return() -> None:
    np.testing.assert_allclose(normalized_return("Hopper-v5", np.array([-20.272305, 3234.3])), [0, 100], atol=1e-12)
    np.testing.assert_allclose(normalized_return("Hopper-v2", 3234.3), 100)
    np.testing.assert_allclose(normalized_return("Hopper-v5", 5.0, (0.0, 10.0)), 50)
    with pytest.raises(ValueError, match="no reference scores for environment 'Ant-v5'"):
        normalized_return("Ant-v5", 1.0)


def test_normalizer_matches_the_definition_and_its_inverse() -> None:
    rng = np.random.default_rng(0)
    x = (1000 + rng.normal(size=(100_001, 3)) * [1e-3, 1, 100]).astype(np.float32)
    x[:, 1] = 5.0  # a constant column
    normalizer = Normalizer.fit(x)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(normalizer.mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(normalizer.scale, exact.std(0) + 1e-3, rtol=1e-5)
    y = normalizer.normalize(x)
    np.testing.assert_array_equal(y, (x - normalizer.mean) / normalizer.scale)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y[:, 1], 0)
    np.testing.assert_allclose(normalizer.denormalize(y), x, rtol=1e-6)
    tensor = torch.from_numpy(x[:5]).double().requires_grad_()
    z = normalizer.normalize(tensor)
    assert z.dtype == torch.float64
    z.sum().backward()
    np.testing.assert_allclose(tensor.grad, np.broadcast_to(1 / normalizer.scale, (5, 3)), rtol=1e-6)
    assert normalizer.denormalize(z.detach()).allclose(tensor)
    np.testing.assert_allclose(normalizer.normalize(exact), (exact - normalizer.mean) / normalizer.scale, rtol=1e-12)


def test_normalizer_refusals() -> None:
    with pytest.raises(ValueError, match="shape"):
        Normalizer(np.zeros(3), np.ones(2))
    with pytest.raises(ValueError, match="positive"):
        Normalizer(np.zeros(2), np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="expected observations of 3 numbers"):
        Normalizer(np.zeros(3), np.ones(3)).normalize(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="the normalizer is for 3 numbers"):
        TransitionDataset(**arrays(), normalizer=Normalizer(np.zeros(3), np.ones(3)))


def test_normalized_observations_are_cached() -> None:
    data = load_dataset(arrays())
    assert data.normalized_observations is data.normalized_observations
    np.testing.assert_allclose(data.normalized_observations.mean(0), 0, atol=1e-6)
