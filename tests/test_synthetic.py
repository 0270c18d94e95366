import json

import numpy as np
import pytest

import sdw_fast as sdw
from sdw_fast.synthetic import choose_pairs


@pytest.fixture
def synthetic(small_data: sdw.TransitionDataset) -> sdw.SyntheticDataset:
    return sdw.SyntheticDataset(
        observations=small_data.observations[:9],
        actions=small_data.actions[:9] * 1.5,
        normalizer=small_data.normalizer,
        action_low=small_data.action_low,
        action_high=small_data.action_high,
        env_id="Hopper-v5",
        reference_scores=(1.0, 2.0),
        config={"objective": "sdw", "hidden": [4, 4]},
        dataset_name="somewhere",
        dataset_hash=small_data.content_hash,
    )


def test_save_and_load_keep_everything(synthetic: sdw.SyntheticDataset, tmp_path) -> None:
    path = synthetic.save(tmp_path / "set")
    assert path == tmp_path / "set.npz"
    assert list(tmp_path.iterdir()) == [path]
    loaded = sdw.SyntheticDataset.load(path)
    np.testing.assert_array_equal(loaded.observations, synthetic.observations)
    np.testing.assert_array_equal(loaded.actions, synthetic.actions)
    np.testing.assert_array_equal(loaded.normalizer.scale, synthetic.normalizer.scale)
    for name in ("env_id", "reference_scores", "config", "dataset_name", "dataset_hash", "version"):
        assert getattr(loaded, name) == getattr(synthetic, name)


def test_damaged_and_foreign_files_are_refused(synthetic: sdw.SyntheticDataset, tmp_path) -> None:
    path = synthetic.save(tmp_path / "set.npz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="not a readable synthetic set"):
        sdw.SyntheticDataset.load(path)
    np.savez(tmp_path / "other.npz", observations=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="keys missing"):
        sdw.SyntheticDataset.load(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match="no synthetic set at"):
        sdw.SyntheticDataset.load(tmp_path / "absent.npz")


def test_a_pickle_is_not_run(tmp_path) -> None:
    np.savez(tmp_path / "evil.npz", observations=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="not a readable synthetic set"):
        sdw.SyntheticDataset.load(tmp_path / "evil.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": np.zeros((3, 11), np.float32)}, "same N"),
        ({"observations": np.zeros((0, 11), np.float32), "actions": np.zeros((0, 3), np.float32)}, "at least one pair"),
        ({"observations": np.full((9, 11), np.nan, np.float32)}, "NaN or Inf"),
        ({"action_low": np.zeros(2, np.float32)}, "do not fit together"),
    ],
)
def test_bad_sets_are_refused(synthetic: sdw.SyntheticDataset, changes: dict, message: str) -> None:
    fields = {name: getattr(synthetic, name) for name in synthetic.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        sdw.SyntheticDataset(**{**fields, **changes})


def test_export_to_minari(synthetic: sdw.SyntheticDataset, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    exported = synthetic.to_minari("sdw/test/synthetic-v0")
    assert exported.total_steps == len(synthetic)
    episodes = list(exported.iterate_episodes())
    np.testing.assert_array_equal(np.stack([e.observations[0] for e in episodes]), synthetic.observations)
    np.testing.assert_array_equal(np.stack([e.actions[0] for e in episodes]), np.clip(synthetic.actions, -1, 1))
    assert json.loads(exported.storage.metadata["description"])["objective"] == "sdw"


@pytest.mark.parametrize("method", ["random", "kmeans++", "top-q"])
def test_choose_pairs(small_data, small_teacher, method: str) -> None:
    def choose() -> np.ndarray:
        return choose_pairs(small_data, 15, method=method, teacher=small_teacher, rng=np.random.default_rng(5))

    rows = choose()
    assert len(set(rows.tolist())) == 15
    assert rows.min() >= 0
    assert rows.max() < len(small_data)
    np.testing.assert_array_equal(rows, choose())


def test_kmeans_plus_plus_spreads(small_data) -> None:
    states = small_data.normalized_observations

    def nearest(method: str) -> float:
        distances = []
        for seed in range(5):
            chosen = states[choose_pairs(small_data, 20, method=method, rng=np.random.default_rng(seed))]
            gaps = np.linalg.norm(chosen[:, None] - chosen[None], axis=-1) + 1e9 * np.eye(20)
            distances.append(gaps.min(axis=1).mean())
        return float(np.mean(distances))

    assert nearest("kmeans++") > 1.1 * nearest("random")


def test_top_q_takes_valuable_pairs(small_data, small_teacher) -> None:
    rows = choose_pairs(small_data, 10, method="top-q", teacher=small_teacher, rng=np.random.default_rng(0))
    values = small_teacher.values(small_data.observations, small_data.actions)
    assert values[rows].min() >= np.quantile(values, 0.89)


def test_kmeans_plus_plus_survives_duplicates() -> None:
    data = sdw.load_dataset(
        {
            "observations": np.zeros((8, 2)),
            "next_observations": np.zeros((8, 2)),
            "actions": np.zeros((8, 1)),
            "rewards": np.zeros(8),
            "truncations": np.eye(8)[7] > 0,
            "terminations": np.zeros(8, bool),
        }
    )
    assert sorted(choose_pairs(data, 8, method="kmeans++", rng=np.random.default_rng(0))) == list(range(8))


@pytest.mark.parametrize(
    ("size", "method", "message"),
    [(0, "random", "between 1"), (401, "random", "between 1"), (5, "best", "one of"), (5, "top-q", "teacher")],
)
def test_choose_pairs_refuses(small_data, size: int, method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_pairs(small_data, size, method=method, rng=np.random.default_rng(0))
