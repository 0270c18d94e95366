"""Tables, files of tables and lists of episodes, each of which says the same as the arrays that it was made of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_is_the_three_episodes, three_episodes

import sdw_fast as sdw
from sdw_fast.readers import load_dataset

pa = pytest.importorskip("pyarrow")

INDEX = np.array([4, 4, 4, 7, 7, 9, 9])  # of the three episodes
FRAME = np.array([0, 1, 2, 0, 1, 0, 1])


def table(values: dict[str, Any]) -> Any:
    """A pyarrow table whose vectors are lists."""
    lists = {name: list(x) if isinstance(x, np.ndarray) and x.ndim > 1 else x for name, x in values.items()}
    return pa.table(lists)


def lerobot(**changes: Any) -> dict[str, Any]:
    """The three episodes under LeRobot's names, which know no next observation."""
    ours = three_episodes()
    names = {"observation.state": "observations", "action": "actions", "next.reward": "rewards"}
    values = {name: ours[own] for name, own in names.items()} | {"next.done": ours["terminations"]}
    return {**values, "episode_index": INDEX, "frame_index": FRAME, "timestamp": FRAME / 30} | changes


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["table", "batch", "pandas", "parquet", "arrow", "stream", "feather", "huggingface"])
def test_tables_of_every_kind(tmp_path: Path, kind: str) -> None:
    from pyarrow import feather, parquet

    arrow = table(three_episodes())
    path = tmp_path / f"data.{'arrow' if kind == 'stream' else kind}"
    if kind == "parquet":
        parquet.write_table(arrow, path)
    elif kind in ("arrow", "stream"):
        with (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)(str(path), arrow.schema) as writer:
            writer.write_table(arrow)
    elif kind == "feather":
        feather.write_feather(arrow, str(path))
    source: Any = path
    if kind == "table":
        source = pa.concat_tables([arrow.slice(0, 2), arrow.slice(2)])  # more than one chunk
    elif kind == "batch":
        source = arrow.to_batches()[0]
    elif kind == "pandas":
        pytest.importorskip("pandas")
        source = arrow.to_pandas()
    elif kind == "huggingface":
        source = pytest.importorskip("datasets").Dataset(arrow).select(range(7))
    data = load_dataset(source)
    assert_is_the_three_episodes(data)
    assert data.content_hash == load_dataset(three_episodes()).content_hash
    assert data.path == (path if source is path else None)


def test_a_csv_file_holds_numbered_columns(tmp_path: Path) -> None:
    from pyarrow import csv

    values = three_episodes()
    columns = {name: values[name] for name in ("rewards", "terminations", "truncations")}
    for name in ("observations", "next_observations"):
        columns |= {f"{name}_{number}": values[name][:, number] for number in (1, 0)}
    csv.write_csv(pa.table({**columns, "u": values["actions"][:, 0]}), tmp_path / "data.csv")
    assert_is_the_three_episodes(load_dataset(tmp_path / "data.csv", columns={"actions": "u"}))


@pytest.mark.parametrize("shuffled", [False, True])
def test_lerobots_columns_are_known_and_the_index_marks_the_ends(shuffled: bool) -> None:
    """Nothing follows the second and third episode's last frames, which no termination ends: they are left out."""
    order = np.random.default_rng(0).permutation(7) if shuffled else np.arange(7)
    data = load_dataset(table({name: array[order] for name, array in lerobot().items()}))
    np.testing.assert_array_equal(data.observations[:, 0], [0, 1, 2, 10, 20])
    np.testing.assert_array_equal(data.terminations, [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(data.truncations, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(data.next_observations()[[0, 1, 3, 4], 0], [1, 2, 11, 21])


def test_a_dropped_frame_ends_an_episode() -> None:
    kept = np.arange(7) != 1
    values = {name: array[kept] for name, array in lerobot().items() if name != "next.reward"}
    np.testing.assert_array_equal(load_dataset(values).episode_ends, [0, 1, 3, 5])


def test_demonstrations_keep_every_pair() -> None:
    ours = three_episodes()
    alone = {name: ours[name] for name in ("observations", "actions")}
    for values, ends in ((alone, [6]), ({**alone, "episode_index": INDEX}, [2, 4, 6])):
        data = load_dataset(values)
        np.testing.assert_array_equal(data.observations, ours["observations"])
        np.testing.assert_array_equal(data.actions, ours["actions"])
        np.testing.assert_array_equal(data.episode_ends, ends)
        assert data.rewards is None
        assert len(data.subset([0, 1])) == 2
    assert "unknown: no rewards" in repr(data)
    summary = data.summary()
    assert (summary["transitions"], summary["episodes"], summary["return_mean"]) == (7, 3, None)
    with pytest.raises(ValueError, match=r"of demonstrations, .* need rewards; objective 'dbc' needs none"):
        _ = data.episode_returns


@pytest.mark.parametrize("objective", ["dbc", "sdw"])
def test_demonstrations_are_distilled(small_data, small_teacher, objective: str) -> None:
    """Rewards are needed to train a teacher, not to use one."""
    arrays = {name: getattr(small_data, name) for name in ("observations", "actions")}
    settings = {"objective": objective, "size": 8, "inner_steps": 3, "batch_size": 32, "steps": 2, "progress": False}
    pairs = sdw.distill(load_dataset(arrays), small_teacher if objective == "sdw" else None, **settings)
    assert pairs.observations.shape == (8, 11)
    with pytest.raises(ValueError, match="of demonstrations"):
        sdw.train_teacher(load_dataset(arrays), steps=1)


def test_columns_side_by_side() -> None:
    ours = three_episodes()
    parts = {"position": ours["observations"][:, 0], "velocity": ours["observations"][:, 1:]}
    values = {**three_episodes(observations=None), **parts}
    assert_is_the_three_episodes(load_dataset(values, columns={"observations": ["position", "velocity"]}))


def test_columns_of_an_hdf5_file_may_lie_in_groups(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for name, value in three_episodes().items():
            file[f"data/{name}"] = value
    columns = {name: f"data/{name}" for name in three_episodes()}
    assert_is_the_three_episodes(load_dataset(tmp_path / "data.hdf5", columns=columns))


@pytest.mark.parametrize(
    ("changes", "columns", "message"),
    [
        ({}, {"observation": "state"}, r"columns names \['observation'\], which a dataset does not have"),
        (
            {},
            {"observations": "state"},
            "the Table has no column 'state' for observations. It holds: observation.state",
        ),
        ({}, {"actions": ["action", "b"]}, r"the Table has no column \['action', 'b'\] for actions"),
        ({"action": None}, None, "the Table lacks actions. It holds: .* columns={'observations': name"),
        ({"action": [[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0, 8.0]]}, None, "actions has rows of different"),
        ({"action": [[1.0]] * 6 + [None]}, None, "actions has rows of different lengths"),
        ({"action": [0.5] * 6 + [None]}, None, "actions has a value that is NaN .* first in row 6"),
        ({"observation.state": [[[1.0, 2.0], [3.0, 4.0]]] * 7}, None, r"got \(7, 2, 2\); encode images"),
        ({"action": ["left"] * 7}, None, "actions must be an array of numbers"),
        ({"next.done": [True] * 6 + [None]}, None, "terminations must be an array of numbers"),
    ],
)
def test_tables_that_hold_no_dataset_are_reported(changes: dict, columns: Any, message: str) -> None:
    values = {name: value for name, value in {**lerobot(), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_dataset(table(values), columns=columns)


def test_indices_that_do_not_fit_are_reported() -> None:
    with pytest.raises(ValueError, match=r"episode_index must have shape \(7,\)"):
        load_dataset(lerobot(episode_index=np.arange(6)))
    with pytest.raises(ValueError, match="a Minari dataset names its columns itself"):
        load_dataset("hopper/medium", columns={"actions": "u"})


@pytest.mark.parametrize("suffix", ["parquet", "csv", "arrow"])
def test_damaged_files_are_reported(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(b"" if suffix == "csv" else b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=rf"data.{suffix} is not a readable .{suffix} file"):
        load_dataset(path)


def test_a_file_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "data.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "sdw_fast\[tables\]"'):
        load_dataset(tmp_path / "data.parquet")


# --- lists of episodes ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Episode:
    """As d3rlpy has it: as many observations as actions, rewards (T, 1), one flag."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


class ReplayBuffer:
    def __init__(self, episodes: list[Episode]) -> None:
        self.episodes = episodes


def pieces(last: bool) -> list[dict[str, Any]]:
    """The three episodes, each with the observation that follows its last action, or without."""
    ours = three_episodes()
    found = []
    for number in (4, 7, 9):
        rows = np.flatnonzero(number == INDEX)
        states = np.concatenate([ours["observations"][rows], ours["next_observations"][rows[-1:]]][: 1 + last])
        found.append({"observations": states, "actions": ours["actions"][rows], "rewards": ours["rewards"][rows]})
    return found


def test_episodes_with_their_last_observation() -> None:
    flags = [np.array([0, 0, 1], bool), np.zeros(2, bool), np.zeros(2, bool)]
    episodes = [{**piece, "terminations": flag} for piece, flag in zip(pieces(last=True), flags, strict=True)]
    assert_is_the_three_episodes(load_dataset(episodes))


@pytest.mark.parametrize("held", [False, True])
def test_episodes_of_objects_without_their_last_observation(held: bool) -> None:
    episodes = [
        Episode(piece["observations"], piece["actions"], piece["rewards"][:, None], number == 0)
        for number, piece in enumerate(pieces(last=False))
    ]
    data = load_dataset(ReplayBuffer(episodes) if held else episodes)
    expected = load_dataset(lerobot())
    assert data.content_hash == expected.content_hash


def test_d3rlpys_own_dataset() -> None:
    d3rlpy = pytest.importorskip("d3rlpy")
    ours = three_episodes()
    dataset = d3rlpy.dataset.MDPDataset(
        observations=ours["observations"],
        actions=ours["actions"],
        rewards=ours["rewards"],
        terminals=ours["terminations"].astype(np.float32),
        timeouts=np.array([0, 0, 0, 0, 1, 0, 1], np.float32),
    )
    assert load_dataset(dataset).content_hash == load_dataset(lerobot()).content_hash


def test_demonstrations_in_episodes_of_other_names() -> None:
    """As imitation's Trajectory names them."""
    named = [{"obs": piece["observations"], "acts": piece["actions"], "terminal": True} for piece in pieces(last=True)]
    data = load_dataset(named)
    assert data.rewards is None
    np.testing.assert_array_equal(data.episode_ends, [2, 4, 6])
    np.testing.assert_array_equal(data.next_observations(), three_episodes()["next_observations"])
    states = [{"s": piece["observations"], "u": piece["actions"]} for piece in pieces(last=False)]
    data = load_dataset(states, columns={"observations": "s", "actions": "u"})
    np.testing.assert_array_equal(data.observations, three_episodes()["observations"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": None}, "episode 1 lacks actions. It holds: observations, rewards"),
        ({"rewards": None}, "some episodes hold what others do not"),
        ({"observations": np.zeros((2, 2))}, "some episodes hold what others do not"),
        ({"rewards": np.zeros(3)}, r"episode 1 has 2 actions, and these many rows of others: {'rewards': 3}"),
        ({"observations": {"position": np.zeros((3, 2))}}, "episode 1: observations is a dict"),
        ({"observations": np.zeros((5, 2))}, r"episode 1 has 2 actions, .* {'observations': 5}"),
    ],
)
def test_episodes_that_do_not_fit_are_reported(change: dict[str, Any], message: str) -> None:
    episodes = pieces(last=True)
    episodes[1] = {name: value for name, value in {**episodes[1], **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_dataset(episodes)
    with pytest.raises(TypeError, match="cannot load a dataset from list"):
        load_dataset([])


# --- ends that nothing marks ------------------------------------------------------------------------------------------


def walks(seed: int = 0) -> np.ndarray:
    """Twenty random walks of 50 steps, one after another, that all begin near one place."""
    steps = np.random.default_rng(seed).normal(size=(20, 50, 3)) * 0.1
    steps[:, 0] += [5, 0, -5]
    return steps.cumsum(axis=1).reshape(-1, 3).astype(np.float32)


@pytest.mark.filterwarnings("error")
def test_observations_that_leap_where_no_flag_ends_an_episode_are_told() -> None:
    states, nothing = walks(), np.zeros(1000, bool)
    values = {"observations": states, "actions": states[:, :1] / 100, "rewards": states[:, 0], "terminations": nothing}
    with pytest.raises(UserWarning, match="end no episode before the last row, but the observations leap"):
        load_dataset({**values, "truncations": nothing})
    load_dataset({**values, "truncations": np.arange(1000) % 50 == 49})
    load_dataset({**values, "episode_index": np.arange(1000) // 50})
    smooth = {**values, "observations": walks().cumsum(axis=0)}
    load_dataset({**smooth, "truncations": nothing})


@pytest.mark.filterwarnings("error")
def test_next_observations_that_no_flag_explains_are_told() -> None:
    values = three_episodes(truncations=np.zeros(7, bool))
    with pytest.raises(UserWarning, match=r"the next observation of 1 of 7 rows, first of row 4, is not the obs"):
        load_dataset(values)
    assert_is_the_three_episodes(load_dataset(three_episodes(truncations=None)))
