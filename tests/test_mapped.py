"""Datasets as memory maps are those in memory, to the bit, and stay on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sdw_fast as sdw
from sdw_fast.batches import OuterBatches
from sdw_fast.cli import app

ROWS = 3000


def columns(next_observations: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(ROWS, 5)).astype(np.float32)
    numbers = np.arange(ROWS)
    found = {
        "observations": states,
        "actions": np.tanh(states[:, :2]),
        "rewards": rng.normal(size=ROWS).astype(np.float32),
        "terminals": numbers % 700 == 699,
        "timeouts": numbers % 100 == 99,
    }
    return {**found, "next_observations": states + 1} if next_observations else found


def on_disk(array: np.ndarray) -> bool:
    """Whether an array lies in a file: some map is at the bottom of its views."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


def write_folder(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


@pytest.mark.parametrize("next_observations", [False, True])
def test_a_folder_of_npy_files(tmp_path: Path, next_observations: bool) -> None:
    arrays = columns(next_observations)
    folder = write_folder(tmp_path / "data", {**arrays, "env_id": np.array("Pendulum-v1"), "notes": np.arange(3)})
    data = sdw.load_dataset(folder)
    expected = sdw.load_dataset({**arrays, "env_id": "Pendulum-v1"})
    assert data == expected
    assert data.name == "data"
    assert all(on_disk(x) for x in (data.observations, data.actions, data.rewards))
    assert not any(on_disk(x) for x in (expected.observations, expected.actions))


def test_hdf5_and_minari_as_maps(tmp_path: Path, monkeypatch) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for name, array in columns(False).items():
            file.create_dataset(name, data=array, compression="gzip")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    pytest.importorskip("mujoco")
    sdw.collect("hopper/medium", steps=300)
    for source in (tmp_path / "data.hdf5", "hopper/medium"):
        mapped, read = sdw.load_dataset(source, mapped=True), sdw.load_dataset(source)
        assert mapped == read
        assert all(on_disk(x) for x in (mapped.observations, mapped.actions))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.hdf5", "minari"]  # no temporary file in sight


def test_a_distillation_from_maps_is_that_from_memory_and_copies_nothing(tmp_path: Path) -> None:
    arrays = columns(True)
    settings = {"objective": "dbc", "density": True, "size": 8, "hidden": (8,), "inner_steps": 3, "steps": 3}
    sets, folder = [], write_folder(tmp_path / "data", arrays)
    for source in (folder, arrays):
        data = sdw.load_dataset(source)
        problem = sdw.outer_problem(data, None, sdw.DistillConfig(objective="dbc"))
        batches = OuterBatches(problem, torch.device("cpu"))
        assert np.shares_memory(batches._tensors[0].numpy(), data.observations)
        sets.append(sdw.distill(data, progress=False, **settings))
    assert np.array_equal(sets[0].observations, sets[1].observations)
    assert np.array_equal(np.load(folder / "observations.npy"), arrays["observations"])


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    arrays = columns(True)
    folder = write_folder(tmp_path / "data", arrays)
    with (folder / "actions.npy").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"not a readable folder of \.npy files"):
        sdw.load_dataset(folder)
    (folder / "actions.npy").unlink()
    with pytest.raises(ValueError, match=r"data lacks actions.*It holds: next_observations, observations"):
        sdw.load_dataset(folder)
    np.save(folder / "actions.npy", np.full(ROWS, None), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        sdw.load_dataset(folder)
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ValueError, match="mapped=True takes Minari datasets"):
        sdw.load_dataset(tmp_path / "data.npz", mapped=True)


def test_a_full_disk_is_an_error_before_anything_is_mapped(tmp_path: Path, monkeypatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = write_folder(tmp_path / "data", columns(False))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left") as error:
        sdw.load_dataset(folder)
    assert str(folder) in str(error.value)


def test_commands_keep_the_columns_on_disk(tmp_path: Path, monkeypatch) -> None:
    """Distillation, its resumption and the density: the bits of a run in memory, from maps."""
    h5py = pytest.importorskip("h5py")
    source = tmp_path / "data.hdf5"
    with h5py.File(source, "w") as file:
        for name, array in columns(True).items():
            file.create_dataset(name, data=array)
    loaded: list[bool] = []
    load = sdw.load_dataset

    def watched(path: str, **options: object) -> sdw.TransitionDataset:
        data = load(path, **options)
        loaded.append(on_disk(data.observations))
        return data

    monkeypatch.setattr(sdw, "load_dataset", watched)
    settings = ["--objective", "dbc", "--size", "8", "--hidden", "8", "--inner-steps", "3", "--steps", "4"]
    for out, mapped in (("memory", []), ("maps", ["--mapped"])):
        command = ["distill", str(source), *settings, *mapped, "--out", str(tmp_path / out)]
        assert CliRunner().invoke(app, command).exit_code == 0
    (tmp_path / "maps/checkpoint").unlink()
    assert CliRunner().invoke(app, ["distill", "--resume", str(tmp_path / "maps")]).exit_code == 0
    sets = [sdw.SyntheticDataset.load(tmp_path / out / "last.npz") for out in ("memory", "maps")]
    assert np.array_equal(sets[0].observations, sets[1].observations)
    assert CliRunner().invoke(app, ["density", str(source), "--mapped", "--json"]).exit_code == 0
    assert loaded == [False, True, True, True]
