"""The synthetic set: chosen among real pairs, saved and loaded bit for bit, exported, refused where it is no set."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HIGH, LOW

import sdw_fast as sdw
from sdw_fast.files import read_npz, write_npz
from sdw_fast.synthetic import SyntheticDataset, _kmeans_plus_plus, real_pairs
from sdw_fast.units import Affine, Units


@pytest.fixture
def synthetic(bounded_data: sdw.TransitionDataset) -> SyntheticDataset:
    return SyntheticDataset(
        observations=bounded_data.observations[:9],
        actions=bounded_data.actions[:9] * 1.5,
        units=dataclasses.replace(bounded_data.units, returns=Affine.scores(1.0, 2.7)),
        config={"objective": "sdw", "hidden": [4, 4]},
        dataset_name="somewhere",
        dataset_hash=bounded_data.content_hash,
    )


# --- files -----------------------------------------------------------------------------------------------------------


def test_save_and_load_keep_everything(synthetic: SyntheticDataset, tmp_path: Path) -> None:
    path = synthetic.save(tmp_path / "set")
    assert path == tmp_path / "set.npz"
    assert list(tmp_path.iterdir()) == [path]
    loaded = SyntheticDataset.load(path)
    for name in ("observations", "actions"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(synthetic, name))
        assert getattr(loaded, name).dtype == np.float32
    assert loaded.units == synthetic.units
    assert (loaded.env_id, loaded.version) == ("Hopper-v5", sdw.__version__)
    for name in ("config", "dataset_name", "dataset_hash", "version"):
        assert getattr(loaded, name) == getattr(synthetic, name)
    again = loaded.save(tmp_path / "again.npz")
    assert SyntheticDataset.load(again).units == synthetic.units


def test_a_set_without_environment_or_returns_comes_back(synthetic: SyntheticDataset, tmp_path: Path) -> None:
    units = Units(synthetic.units.states, synthetic.units.actions)
    bare = SyntheticDataset(synthetic.observations, synthetic.actions, units)
    loaded = SyntheticDataset.load(bare.save(tmp_path / "bare"))
    assert loaded.units == units
    assert (loaded.config, loaded.dataset_name, loaded.env_id) == ({}, None, None)


@pytest.mark.parametrize("where", ["numpy.savez", "os.replace"])
def test_a_kill_while_writing_leaves_the_old_set(
    synthetic: SyntheticDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = synthetic.save(tmp_path / "set.npz")
    other = dataclasses.replace(synthetic, observations=synthetic.observations + 1)

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, kill)
        with pytest.raises(KeyboardInterrupt):
            other.save(path)
    np.testing.assert_array_equal(SyntheticDataset.load(path).observations, synthetic.observations)
    assert list(tmp_path.iterdir()) == [path]
    other.save(path)
    np.testing.assert_array_equal(SyntheticDataset.load(path).observations, other.observations)


def test_damaged_and_foreign_files_are_refused(synthetic: SyntheticDataset, tmp_path: Path) -> None:
    path = synthetic.save(tmp_path / "set.npz")
    whole = path.read_bytes()
    for content in (whole[:-200], whole[:20], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"set.npz is not a readable synthetic set"):
            SyntheticDataset.load(path)
    write_npz(tmp_path / "other.npz", observations=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="keys missing"):
        SyntheticDataset.load(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match="no synthetic set at"):
        SyntheticDataset.load(tmp_path / "absent.npz")


def test_a_set_of_another_format_names_it(synthetic: SyntheticDataset, tmp_path: Path) -> None:
    path = synthetic.save(tmp_path / "set.npz")
    with np.load(path) as file:
        content = dict(file)
    header = json.loads(str(content["header"])) | {"format": 1, "version": "0.0.9"}
    write_npz(path, **{**content, "header": np.array(json.dumps(header))})
    with pytest.raises(ValueError, match=r"its format is 1 \(sdw_fast 0.0.9\), not 2"):
        SyntheticDataset.load(path)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", observations=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="not a readable synthetic set"):
        SyntheticDataset.load(tmp_path / "evil.npz")


# --- what a set is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": np.zeros((3, 11), np.float32)}, "same N"),
        ({"observations": np.zeros(9, np.float32)}, "same N"),
        ({"observations": np.zeros((0, 11), np.float32), "actions": np.zeros((0, 3), np.float32)}, "at least one pair"),
        ({"observations": np.full((9, 11), np.nan, np.float32)}, "observations hold NaN or Inf"),
        ({"actions": np.full((9, 3), np.inf, np.float32)}, "actions hold NaN or Inf"),
        ({"actions": np.zeros((9, 2), np.float32)}, "do not fit together"),
        ({"observations": np.zeros((9, 4), np.float32)}, "do not fit together"),
        ({"units": Units(Affine(np.zeros(11), np.ones(11)))}, "action bounds are not known"),
    ],
)
def test_bad_sets_are_refused(synthetic: SyntheticDataset, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(synthetic, **changes)


def test_normalized_is_what_a_network_sees(synthetic: SyntheticDataset) -> None:
    states, actions = synthetic.normalized()
    units = synthetic.units.states
    np.testing.assert_allclose(states, (synthetic.observations - units.offset) / units.scale, rtol=1e-5, atol=1e-6)
    expected = (synthetic.actions - (HIGH + LOW) / 2) / ((HIGH - LOW) / 2)
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-6)
    assert states.dtype == actions.dtype == np.float32


def test_export_to_minari(synthetic: SyntheticDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    exported = synthetic.to_minari("sdw/test/synthetic-v0")
    assert exported.total_steps == len(synthetic)
    episodes = list(exported.iterate_episodes())
    np.testing.assert_array_equal(np.stack([e.observations[0] for e in episodes]), synthetic.observations)
    np.testing.assert_array_equal(np.stack([e.actions[0] for e in episodes]), np.clip(synthetic.actions, LOW, HIGH))
    for episode in episodes:
        assert (episode.rewards.tolist(), episode.terminations.tolist(), episode.truncations.tolist()) == (
            [0],
            [False],
            [True],
        )
        np.testing.assert_array_equal(episode.observations[1], episode.observations[0])
    metadata = exported.storage.metadata
    assert metadata["description"] == synthetic.dataset_card()
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == pytest.approx((1.0, 2.7))
    back = sdw.load_dataset("sdw/test/synthetic-v0")
    assert (len(back), back.env_id) == (9, "Hopper-v5")
    for bound, expected in zip((exported.action_space.low, exported.action_space.high), (LOW, HIGH), strict=True):
        np.testing.assert_array_equal(bound, expected)


# --- real pairs ------------------------------------------------------------------------------------------------------


def rows_of(pairs: SyntheticDataset, data: sdw.TransitionDataset) -> np.ndarray:
    """The dataset's row of each pair; states are all different here."""
    places = {observation.tobytes(): row for row, observation in enumerate(data.observations)}
    return np.array([places[observation.tobytes()] for observation in pairs.observations])


@pytest.mark.parametrize("init", ["random", "kmeans++", "top-q"])
def test_real_pairs_are_different_rows_and_follow_their_seed(bounded_data, small_teacher, init: str) -> None:
    def choose(seed: int) -> SyntheticDataset:
        return real_pairs(bounded_data, 15, init=init, teacher=small_teacher, seed=seed)

    pairs = choose(5)
    rows = rows_of(pairs, bounded_data)
    assert len(set(rows.tolist())) == 15
    np.testing.assert_array_equal(pairs.actions, bounded_data.actions[rows])
    assert pairs.units == bounded_data.units
    assert (pairs.dataset_name, pairs.dataset_hash) == (bounded_data.name, bounded_data.content_hash)
    assert pairs.config == {}
    np.testing.assert_array_equal(pairs.observations, choose(5).observations)
    assert (pairs.observations != choose(6).observations).any()


def test_real_pairs_are_random_by_default_and_may_be_all(small_data) -> None:
    plain = real_pairs(small_data, 15)
    np.testing.assert_array_equal(plain.observations, real_pairs(small_data, 15, init="random", seed=0).observations)
    assert sorted(rows_of(real_pairs(small_data, 400), small_data)) == list(range(400))


def test_real_pairs_are_copies(small_data) -> None:
    before = small_data.content_hash
    real_pairs(small_data, 5).observations[:] = 0
    assert small_data.content_hash == before


def test_kmeans_plus_plus_spreads(small_data) -> None:
    def nearest(init: str) -> float:
        distances = []
        for seed in range(5):
            chosen, _ = real_pairs(small_data, 20, init=init, seed=seed).normalized()
            gaps = np.linalg.norm(chosen[:, None] - chosen[None], axis=-1) + 1e9 * np.eye(20)
            distances.append(gaps.min(axis=1).mean())
        return float(np.mean(distances))

    assert nearest("kmeans++") > 1.1 * nearest("random")


def test_kmeans_plus_plus_measures_normalized_states() -> None:
    """Two clusters apart in a column of small numbers; the other column is large and says nothing."""
    rng = np.random.default_rng(0)
    states = np.stack([1e3 * rng.normal(size=200), 1e-1 * rng.normal(size=200)], axis=1)
    states[:3, 1] += 20  # three of 200
    flags = np.zeros(200, bool)
    data = sdw.load_dataset(
        {"observations": states, "next_observations": states, "actions": np.zeros((200, 1)), "rewards": flags}
        | {"terminations": flags}
    )
    found = [real_pairs(data, 6, init="kmeans++", seed=seed).observations[:, 1].max() > 10 for seed in range(20)]
    assert sum(found) >= 15  # among random rows it is 2 of 20


def test_top_q_takes_the_best_tenth_and_all_of_it(small_data, small_teacher) -> None:
    values = np.asarray(small_teacher.values(small_data.observations, small_data.actions))
    best = set(np.argsort(-values)[:40].tolist())
    taken: set[int] = set()
    for seed in range(40):
        rows = rows_of(real_pairs(small_data, 10, init="top-q", teacher=small_teacher, seed=seed), small_data)
        assert set(rows.tolist()) <= best
        taken.update(rows.tolist())
    assert taken == best
    more = rows_of(real_pairs(small_data, 50, init="top-q", teacher=small_teacher), small_data)  # more than a tenth
    assert set(more.tolist()) == set(np.argsort(-values)[:50].tolist())


def test_kmeans_plus_plus_survives_duplicates() -> None:
    data = sdw.load_dataset(
        {
            "observations": np.zeros((8, 2)),
            "next_observations": np.zeros((8, 2)),
            "actions": np.arange(8)[:, None] / 10,
            "rewards": np.zeros(8),
            "truncations": np.eye(8)[7] > 0,
            "terminations": np.zeros(8, bool),
        }
    )
    pairs = real_pairs(data, 8, init="kmeans++")
    np.testing.assert_allclose(np.sort(pairs.actions[:, 0]), np.arange(8) / 10, rtol=1e-6)


@pytest.mark.parametrize("dimensions", [3, 17, 3_000])
def test_kmeans_plus_plus_takes_every_point_once_before_it_takes_duplicates(dimensions: int) -> None:
    """Distances of zero are not exact: a product of floats leaves something of them, of either sign."""
    rng = np.random.default_rng(0)
    distinct = (100 + rng.standard_normal((5, dimensions))).astype(np.float32)
    points = np.repeat(distinct, 300, axis=0)  # more than a block
    chosen = _kmeans_plus_plus(points, 200, rng)
    assert len(set(chosen.tolist())) == 200
    points = np.repeat(rng.standard_normal((5, dimensions), np.float32), 300, axis=0)
    chosen = _kmeans_plus_plus(points, 200, rng)
    assert len(set((chosen[:5] // 300).tolist())) == 5
    assert len(set(chosen.tolist())) == 200


@pytest.mark.parametrize(
    ("size", "init", "message"),
    [(0, "random", "between 1"), (401, "random", "between 1"), (5, "best", "one of"), (5, "top-q", "teacher")],
)
def test_real_pairs_refuses(small_data, size: int, init: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        real_pairs(small_data, size, init=init)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("action_low", HIGH, "low < high"),
        ("action_high", LOW - 1, "low < high"),
        ("action_low", np.array([np.nan, 0, 0]), "must be finite"),
        ("scale", np.zeros(11), "positive"),
        ("mean", np.zeros(10), "must both have shape"),
        ("observations", np.zeros((9, 10)), "do not fit together"),
        ("observations", np.zeros(11), r"observations \(N, D\)"),
        ("actions", np.zeros((8, 3)), "the same N"),
        ("actions", np.full((9, 3), 1e30), "numbers beyond 1e\\+06 in normalized units"),
        ("actions", np.full((9, 3), np.inf), "hold NaN or Inf"),
        ("header", np.array("{}"), "KeyError"),
        ("header", np.array("{"), "Expecting property name"),
    ],
)
def test_files_of_impossible_content_are_refused(
    synthetic: SyntheticDataset, tmp_path: Path, name: str, value: np.ndarray, message: str
) -> None:
    path = synthetic.save(tmp_path / "set.npz")
    write_npz(path, **{**read_npz(path), name: value})
    with pytest.raises(ValueError, match=rf"set.npz is not a readable synthetic set .*{message}"):
        SyntheticDataset.load(path)


def test_a_flipped_bit_is_refused(synthetic: SyntheticDataset, tmp_path: Path) -> None:
    path = synthetic.save(tmp_path / "set.npz")
    content = bytearray(path.read_bytes())
    content[content.index(synthetic.actions.tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its checksum does not fit"):
        SyntheticDataset.load(path)
