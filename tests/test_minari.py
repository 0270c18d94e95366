"""Minari datasets: by id and as an object, their episodes, bounds and scores, and every way of refusing one."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from conftest import assert_is_the_three_episodes, three_episodes
from gymnasium.wrappers import RescaleAction
from minari.data_collector import EpisodeBuffer

from sdw_fast.data import concatenate
from sdw_fast.environments import make_env, recorded
from sdw_fast.readers import load_dataset
from sdw_fast.synthetic import real_pairs
from sdw_fast.units import Affine


@pytest.fixture(autouse=True)
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def make_minari(dataset_id: str, episodes: list[dict[str, Any]] | None = None, **options: Any) -> minari.MinariDataset:
    """The three episodes as a Minari dataset: T + 1 observations each."""
    if episodes is None:
        values = three_episodes()
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


def test_minari_by_id_and_as_object(minari_root: Path) -> None:
    dataset = make_minari("toy/three-v0", env="Pendulum-v1")
    by_id = load_dataset("toy/three-v0")
    assert_is_the_three_episodes(by_id)
    assert_is_the_three_episodes(load_dataset(dataset))
    assert (by_id.name, by_id.env_id, by_id.units.returns) == ("toy/three-v0", "Pendulum-v1", None)
    assert by_id.path == minari_root / "toy" / "three-v0"
    assert load_dataset("toy/three-v0", env_id="Hopper-v5").env_id == "Hopper-v5"


def test_minari_storage_other_than_hdf5(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_minari("toy/three-v0")
    monkeypatch.setattr(type(dataset.storage), "FORMAT", "other")
    assert_is_the_three_episodes(load_dataset(dataset))


def test_minari_object_gives_the_episodes_that_it_selects() -> None:
    dataset = make_minari("toy/three-v0").filter_episodes(lambda episode: len(episode) == 2)
    data = load_dataset(dataset)
    np.testing.assert_array_equal(data.observations[:, 0], [10, 11, 20, 21])
    np.testing.assert_array_equal(data.next_observations()[:, 0], [11, 12, 21, 22])


def test_the_recorded_environment_is_kept_with_the_data() -> None:
    """Its arguments, time limit and wrappers go with parts, joined data, synthetic sets and their export."""
    env = RescaleAction(gym.make("Pendulum-v1", g=3.0, max_episode_steps=7), -1.0, 1.0)
    data = load_dataset(make_minari("toy/three-v0", env=env))
    part = data.subset([0, 1, 2])
    for kept in (
        data,
        part,
        concatenate([part, data]),
        concatenate([part, load_dataset(three_episodes(), env_id=env)]),
    ):
        assert kept.env_id == "Pendulum-v1"
        made = make_env(recorded(kept.units))
        assert (made.unwrapped.g, made.spec.max_episode_steps) == (3.0, 7)
        np.testing.assert_array_equal(made.action_space.high, 1)
    exported = real_pairs(data, 3).to_minari("toy/pairs-v0")
    assert load_dataset(exported).units.env_spec == data.units.env_spec
    plain = load_dataset(make_minari("toy/plain-v0", env="Pendulum-v1"))
    assert recorded(plain.units).kwargs == {}
    unknown = dataclasses.replace(plain, units=dataclasses.replace(plain.units, actions=data.units.actions))
    with pytest.warns(UserWarning, match="recorded in Pendulum-v1 with different arguments"):
        assert concatenate([data, unknown]).units.env_spec is None
    assert load_dataset("toy/three-v0", env_id="Pendulum-v1").units.env_spec is None  # the caller's comes first
    with pytest.raises(ValueError, match="the recorded environment is not 'Hopper-v5'"):
        dataclasses.replace(data.units, env_id="Hopper-v5")


def test_the_environment_to_evaluate_in_comes_first() -> None:
    options = {"env": "Pendulum-v1", "eval_env": gym.make("Pendulum-v1", max_episode_steps=5)}
    assert recorded(load_dataset(make_minari("toy/three-v0", **options)).units).max_episode_steps == 5


def test_a_dataset_without_a_recorded_environment_names_none() -> None:
    units = load_dataset(make_minari("toy/three-v0")).units
    assert (units.env_id, units.env_spec) == (None, None)


def test_minari_bounds_are_the_action_space_s() -> None:
    low, high = np.array([-2], np.float32), np.array([0.7], np.float32)
    assert load_dataset(make_minari("toy/b-v0", action_space=gym.spaces.Box(low, high))).action_bounds == (low, high)
    unbounded = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    assert load_dataset(make_minari("toy/u-v0", action_space=unbounded)).action_bounds == (-1, 1)  # no action beyond


def test_minari_reference_scores_come_first_and_suite_names_may_be_short() -> None:
    dataset = make_minari("sdw/toy/medium-v0", env="Pendulum-v1")
    dataset.storage.update_metadata({"ref_min_score": 0.0, "ref_max_score": 224.0})
    for name in ("sdw/toy/medium-v0", "toy/medium-v0", "toy/medium"):
        data = load_dataset(name, env_id="Hopper-v5")
        assert data.units.returns == Affine.scores(0.0, 224.0)
        assert data.summary()["normalized_return_mean"] == pytest.approx(50.0)  # the mean return is 112
    dataset.storage.update_metadata({"ref_max_score": 0.0})
    with pytest.raises(ValueError, match=r"reference scores must be finite with random < expert, got 0.0 and 0.0"):
        load_dataset("toy/medium")


def test_unsupported_minari_spaces_are_reported() -> None:
    step = {"rewards": [0.0], "terminations": [True], "truncations": [False]}
    states = np.zeros((2, 2), np.float32)
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
        file["episode_2/observations"][2, 0] = np.nan
    with pytest.raises(ValueError, match=r"next_observations has a value .* first in row 6"):
        load_dataset("toy/three-v0")
    with h5py.File(path, "a") as file:
        del file["episode_1/rewards"]
    with pytest.raises(ValueError, match=r"episode 1 in .*main_data.hdf5 is not a readable"):
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


@pytest.mark.parametrize("storage", ["hdf5", "other"])
def test_a_minari_dataset_has_the_content_of_its_arrays(monkeypatch: pytest.MonkeyPatch, storage: str) -> None:
    dataset = make_minari("toy/three-v0")
    monkeypatch.setattr(type(dataset.storage), "FORMAT", storage)
    assert load_dataset(dataset).content_hash == load_dataset(three_episodes()).content_hash


def test_an_episode_ends_where_its_record_does() -> None:
    """Some datasets set no flag there."""
    flags = np.zeros(2, bool)
    episode = {"actions": np.zeros((2, 1)), "rewards": flags, "terminations": flags, "truncations": flags}
    states = [np.arange(3)[:, None] + [start, start] for start in (0.0, 10.0)]
    data = load_dataset(make_minari("toy/unmarked-v0", [{"observations": s, **episode} for s in states]))
    np.testing.assert_array_equal(data.truncations, [0, 1, 0, 1])
    np.testing.assert_array_equal(data.next_observations()[:, 0], [1, 2, 11, 12])


def test_numbers_of_another_file_are_not_read(minari_root: Path) -> None:
    make_minari("toy/three-v0")
    path = minari_root / "toy/three-v0/data/main_data.hdf5"
    with h5py.File(minari_root / "other.h5", "w") as file:
        file["private"] = np.zeros(3)
    with h5py.File(path, "a") as file:
        del file["episode_1/rewards"]
        file["episode_1/rewards"] = h5py.ExternalLink(minari_root / "other.h5", "/private")
    with pytest.raises(ValueError, match=r"episode 1 in .*lie in another file"):
        load_dataset("toy/three-v0")


def test_damaged_metadata_are_reported(minari_root: Path) -> None:
    make_minari("toy/three-v0")
    path = minari_root / "toy/three-v0/data/metadata.json"
    content = json.loads(path.read_text())
    for damaged in ("{", "[]", "{}", json.dumps({**content, "total_steps": 1 << 50})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="toy/three-v0"):
            load_dataset("toy/three-v0")
