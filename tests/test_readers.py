"""Datasets from every source, against arrays worked out by hand, and every way of refusing one."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import assert_is_the_three_episodes, three_episodes

from sdw_fast.readers import load_dataset
from sdw_fast.units import d4rl_returns


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


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", [dict, d4rl])
@pytest.mark.parametrize("kind", ["dict", "npz", "hdf5"])
def test_arrays_and_files_in_both_styles(tmp_path: Path, kind: str, style: Callable[..., dict[str, Any]]) -> None:
    values = style(three_episodes(observations=three_episodes()["observations"].astype(np.float64)))
    source: Any = {
        "dict": lambda: values,
        "npz": lambda: write_npz(tmp_path / "data.npz", values),
        "hdf5": lambda: write_hdf5(tmp_path / "data.hdf5", values),
    }[kind]()
    data = load_dataset(source, env_id="Hopper-v5")
    assert_is_the_three_episodes(data)
    assert data.env_id == "Hopper-v5"
    assert data.units.returns == d4rl_returns("Hopper-v5")
    assert (data.path, data.name) == ((None, None) if kind == "dict" else (source, "data"))
    assert load_dataset(str(source) if kind != "dict" else source).env_id is None


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
@pytest.mark.parametrize("kind", ["dict", "npz", "hdf5"])
def test_numbers_of_every_kind_are_taken(tmp_path: Path, kind: str, dtype: type) -> None:
    values = three_episodes()
    values = {
        n: v.astype(dtype) if n in ("observations", "next_observations", "rewards") else v for n, v in values.items()
    }
    source = {"dict": lambda p, v: v, "npz": write_npz, "hdf5": write_hdf5}[kind](tmp_path / f"data.{kind}", values)
    assert_is_the_three_episodes(load_dataset(source))
    as_float32 = {name: value.astype(np.float32) if name != "terminations" else value for name, value in values.items()}
    assert load_dataset(source).content_hash == load_dataset(as_float32).content_hash


def test_lists_and_tensors_are_arrays_too() -> None:
    values = three_episodes()
    assert_is_the_three_episodes(load_dataset({name: torch.from_numpy(value) for name, value in values.items()}))
    assert_is_the_three_episodes(load_dataset({name: value.tolist() for name, value in values.items()}))


def test_none_is_nothing() -> None:
    values = {**three_episodes(), "truncations": None, "env_id": None, "action_low": None, "action_high": None}
    assert_is_the_three_episodes(load_dataset(values))
    assert load_dataset(values).env_id is None
    with pytest.raises(ValueError, match="lacks truncations"):
        load_dataset({**values, "next_observations": None})


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_npz(tmp_path / "data.npz", three_episodes())
    for source in ("~/data.npz", Path("~/data.npz")):
        assert load_dataset(source).path == path


def test_env_id_and_bounds_held_by_the_source(tmp_path: Path) -> None:
    values = three_episodes(action_low=-2.0, action_high=np.array([3.0]))
    npz = write_npz(tmp_path / "data.npz", {**values, "env_id": "Walker2d-v5"})
    for source in ({**values, "env_id": "Walker2d-v5"}, npz):
        data = load_dataset(source)
        assert (data.env_id, data.action_bounds) == ("Walker2d-v5", (-2, 3))
        assert data.units.returns == d4rl_returns("Walker2d-v5")
        other = load_dataset(source, env_id="Hopper-v5")  # the argument overrides
        assert (other.env_id, other.units.returns) == ("Hopper-v5", d4rl_returns("Hopper-v5"))
    assert load_dataset(write_hdf5(tmp_path / "data.h5", values)).action_bounds == (-2, 3)


def test_bounds_are_one_only_where_no_action_lies_beyond() -> None:
    assert load_dataset(three_episodes()).action_bounds == (-1, 1)
    assert load_dataset(three_episodes(actions=np.linspace(-1, 1, 7)[:, None])).action_bounds == (-1, 1)
    for actions in (np.linspace(-1.01, 0, 7), np.linspace(0, 1.01, 7)):
        data = load_dataset(three_episodes(actions=actions[:, None]))
        with pytest.raises(ValueError, match=r"leave \[-1, 1\]: give them as action_low and action_high"):
            _ = data.action_bounds


def test_every_source_of_the_same_data_has_the_same_content_hash(tmp_path: Path) -> None:
    hashes = {
        load_dataset(source).content_hash
        for source in (
            three_episodes(),
            write_npz(tmp_path / "a.npz", d4rl(three_episodes())),
            write_hdf5(tmp_path / "a.h5", three_episodes()),
        )
    }
    assert len(hashes) == 1


# --- completion ------------------------------------------------------------------------------------------------------


def test_next_observations_by_shifting() -> None:
    bounds = {"action_low": -2, "action_high": 3}
    data = load_dataset(three_episodes(next_observations=None, **bounds), env_id="Hopper-v5")
    # The truncated rows (state 11 and the last, 21) have no known successor and are left out; the terminated row stays.
    np.testing.assert_array_equal(data.observations[:, 0], [0, 1, 2, 10, 20])
    np.testing.assert_array_equal(data.next_observations()[:, 0], [1, 2, 2, 11, 21])
    np.testing.assert_array_equal(data.terminations, [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(data.truncations, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(data.rewards, [1, 2, 3, 10, 100])
    np.testing.assert_allclose(data.actions[:, 0], [0, 0.01, 0.02, 0.1, 0.2])
    np.testing.assert_allclose(data.units.states.offset, [6.6, -6.6], rtol=1e-6)  # of the rows that are left
    assert (data.env_id, data.action_bounds) == ("Hopper-v5", (-2, 3))


def test_shifting_past_an_episode_of_one_truncated_row() -> None:
    values = three_episodes(next_observations=None, truncations=np.array([0, 0, 0, 1, 1, 0, 0], bool))
    data = load_dataset(values)
    np.testing.assert_array_equal(data.observations[:, 0], [0, 1, 2, 20])
    np.testing.assert_array_equal(data.truncations, [0, 0, 0, 1])


def test_a_row_may_be_terminated_and_truncated_at_once() -> None:
    both = np.array([0, 0, 1, 0, 1, 0, 0], bool)
    np.testing.assert_array_equal(load_dataset(three_episodes(truncations=both)).truncations, [0, 0, 1, 0, 1, 0, 1])
    shifted = load_dataset(three_episodes(truncations=both, next_observations=None))
    np.testing.assert_array_equal(shifted.terminations, [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(shifted.truncations, [0, 0, 1, 1, 1])


def test_truncations_are_found_where_next_observations_do_not_follow() -> None:
    assert_is_the_three_episodes(load_dataset(d4rl(three_episodes(truncations=None))))


def test_jumps_are_found_across_blocks_of_rows() -> None:
    rows = 40_000
    states = np.arange(rows, dtype=np.float32)[:, None]
    following = states + 1
    cut = [16_383, 16_384, 32_767, 32_768]
    following[cut] = -1
    flags = np.zeros(rows, bool)
    data = load_dataset(
        {"observations": states, "actions": 0 * states, "rewards": flags, "terminations": flags}
        | {"next_observations": following}
    )
    np.testing.assert_array_equal(data.episode_ends, [*cut, rows - 1])
    np.testing.assert_array_equal(data.next_observations(), following)


def test_a_last_row_that_ends_nothing_is_truncated() -> None:
    last = np.arange(7) == 6
    for name in ("terminations", "truncations"):
        data = load_dataset(three_episodes(**{name: last}))
        assert (data.terminations[-1], data.truncations[-1]) == (name == "terminations", name == "truncations")
    assert load_dataset(three_episodes(truncations=np.zeros(7))).truncations[-1]


def test_columns_of_shape_m_1_and_numbers_as_flags_are_taken() -> None:
    values = three_episodes()
    for name in ("rewards", "terminations", "truncations"):
        values[name] = values[name].astype(np.float64)[:, None]
    assert_is_the_three_episodes(load_dataset(values))


def test_matching_float32_arrays_are_not_copied() -> None:
    values = three_episodes(truncations=np.array([0, 0, 0, 0, 1, 0, 1], bool))
    data = load_dataset(values)
    for name in set(values) - {"next_observations"}:
        assert np.shares_memory(getattr(data, name), values[name]), name


def test_the_caller_s_dict_and_arrays_are_not_changed() -> None:
    values = three_episodes()
    load_dataset(values)
    assert not values["truncations"][-1]
    assert values.keys() == three_episodes().keys()


def long_episodes(rows: int = 200_000) -> dict[str, np.ndarray]:
    """Episodes of 1,000 rows, 17 numbers a state, float32."""
    states = np.random.default_rng(0).normal(size=(rows + 1, 17)).astype(np.float32)
    return {
        "observations": states[:-1],
        "actions": np.zeros((rows, 6), np.float32),
        "rewards": np.zeros(rows, np.float32),
        "terminations": np.zeros(rows, bool),
        "truncations": np.arange(rows) % 1000 == 999,
        "next_observations": states[1:].copy(),
    }


@pytest.mark.parametrize(("left_out", "bound"), [("", 0.5), ("truncations", 0.5), ("next_observations", 2.0)])
def test_loading_float32_arrays_allocates_little(left_out: str, bound: float) -> None:
    """Nothing as large as the observations; without next observations once the rows that stay, of every column."""
    values = long_episodes()
    values.pop(left_out, None)
    tracemalloc.start()
    try:
        data = load_dataset(values)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < bound * data.observations.nbytes


# --- refusals --------------------------------------------------------------------------------------------------------

NAN_AT_3 = np.where(np.arange(7)[:, None] == 3, np.nan, three_episodes()["next_observations"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": None}, "the dict of arrays lacks actions. It holds: observations, rewards, terminations"),
        ({"terminations": None, "actions": None}, r"lacks actions, terminations \(or terminals\)"),
        (
            {"truncations": None, "next_observations": None},
            r"lacks truncations \(or timeouts\); .* only beside next_obs",
        ),
        ({"actions": None, **{f"x{i}": 0 for i in range(20)}}, "x6 and 13 more"),
        ({"actions": np.arange(7)}, "discrete actions"),
        ({"observations": {"position": np.zeros((7, 2))}}, "observations is a dict"),
        ({"next_observations": {"position": np.zeros((7, 2))}}, "next_observations is a dict"),
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
        ({"next_observations": NAN_AT_3}, "next_observations has a value .* first in row 3"),
        ({"next_observations": NAN_AT_3, "truncations": None}, "next_observations has a value .* first in row 3"),
        ({"next_observations": np.full((7, 2), 1e300)}, "next_observations has a value .* first in row 0"),
        ({"actions": np.full((7, 1), "left")}, "array of numbers"),
        ({"actions": np.full((7, 1), None)}, "array of numbers"),
        ({"observations": np.ones((7, 2), complex)}, "array of numbers, got dtype complex128"),
        ({"action_low": -1}, "both action_low and action_high"),
        ({"action_low": [-1, -1], "action_high": [1, 1]}, r"must be numbers or \(1,\) arrays, got \[-1, -1\]"),
        ({"action_low": "left", "action_high": "right"}, r"must be numbers or \(1,\) arrays, got 'left' and 'right'"),
        ({"action_low": 1, "action_high": -1}, "low < high"),
        ({"action_low": -1, "action_high": 1e300}, "must be finite"),
    ],
)
def test_bad_arrays_are_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(three_episodes(**changes))


def test_row_of_a_bad_value_is_exact_beyond_the_first_block() -> None:
    observations = np.zeros((150_000, 1), np.float32)
    flags = np.zeros(150_000, bool)
    values = {"observations": observations, "actions": observations, "rewards": flags}
    values |= {"terminations": flags, "truncations": flags}
    following = observations.copy()
    following[120_003] = np.nan
    with pytest.raises(ValueError, match=r"next_observations .* row 120003"):
        load_dataset({**values, "next_observations": following})
    observations[140_001] = np.nan
    with pytest.raises(ValueError, match=r"observations .* row 140001"):
        load_dataset(values)


def test_nothing_left_after_shifting_is_reported() -> None:
    with pytest.raises(ValueError, match="no transition is left"):
        load_dataset(three_episodes(next_observations=None, terminations=np.zeros(7), truncations=np.ones(7)))


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_damaged_and_missing_files_are_reported(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    with pytest.raises(FileNotFoundError, match="no dataset file"):
        load_dataset(path)
    (write_hdf5 if suffix == ".hdf5" else write_npz)(path, three_episodes())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"something else altogether"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"data{suffix}.*damaged or truncated\?"):
            load_dataset(path)


def test_npz_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    write_npz(tmp_path / "data.npz", three_episodes(rewards=np.array([{}] * 7, dtype=object)))
    with pytest.raises(ValueError, match="not of objects"):
        load_dataset(tmp_path / "data.npz")


def test_hdf5_of_groups_or_without_keys_is_reported(tmp_path: Path) -> None:
    values = three_episodes(observations=None)
    path = write_hdf5(tmp_path / "data.h5", {**values, "observations/position": np.zeros((7, 2))})
    with pytest.raises(ValueError, match="observations is a group"):
        load_dataset(path)
    with pytest.raises(ValueError, match=r"data.h5 lacks observations, .* It holds: actions, infos, rewards"):
        load_dataset(write_hdf5(path, {"actions": np.zeros((7, 1)), "rewards": np.zeros(7), "infos/x": np.zeros(7)}))


def test_unknown_kinds_of_source_are_reported() -> None:
    with pytest.raises(TypeError, match="cannot load a dataset from ndarray"):
        load_dataset(np.zeros(3))  # type: ignore[arg-type]


def linked(path: Path, kind: str) -> None:
    """Puts in place of the file's rewards numbers of another file, of as many rows."""
    other = write_hdf5(path.with_name("other.h5"), {"private": np.arange(7.0)})
    with h5py.File(path, "a") as file:
        del file["rewards"]
        if kind == "link":
            file["rewards"] = h5py.ExternalLink(other, "/private")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((7,), "f8")
            layout[:] = h5py.VirtualSource(other, "private", (7,))
            file.create_virtual_dataset("rewards", layout)
        else:
            file.create_dataset("rewards", (7,), "f8", external=[(str(other), 0, 56)])


@pytest.mark.parametrize("kind", ["link", "virtual", "storage"])
def test_numbers_of_another_file_are_not_read(tmp_path: Path, kind: str) -> None:
    path = write_hdf5(tmp_path / "data.h5", three_episodes())
    linked(path, kind)
    with pytest.raises(ValueError, match=r"data.h5 is not .*lie in another file \(a link or a virtual dataset\)"):
        load_dataset(path)


def test_links_inside_the_file_and_compressed_numbers_are_read(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "data.h5", three_episodes())
    with h5py.File(path, "a") as file:
        file.move("rewards", "kept")
        file["rewards"] = h5py.SoftLink("/kept")
        states = file.pop("observations")[:]
        file.create_dataset("observations", data=states, compression="gzip", chunks=(2, 2))
    assert_is_the_three_episodes(load_dataset(path))


def test_hdf5_that_claims_more_than_memory_is_refused(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "data.h5", three_episodes(observations=None))
    with h5py.File(path, "a") as file:
        file.create_dataset("observations", (1 << 40, 3), "f4", chunks=(1024, 3))  # never written
    with pytest.raises(ValueError, match=r"says that it holds 1.23e\+04 GiB"):
        load_dataset(path)


def test_damage_inside_a_file_that_opens_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "data.h5"
    with h5py.File(write_hdf5(path, three_episodes(observations=None)), "a") as file:
        stored = file.create_dataset("observations", data=three_episodes()["observations"], compression="gzip")
        place = stored.id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place : place + 8] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data.h5 is not a readable HDF5 file \(damaged or truncated\?\)"):
        load_dataset(path)
