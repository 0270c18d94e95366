"""Damaged files: of every format 150 seeded mutations, which are refused by a sentence that names the file, or read as
if nothing had happened.

A file with a checksum is never read otherwise than whole. A zip archive's CRCs cover what its parts hold, so that a
mutation that is read must have left that as it was. HDF5 and JSON have neither: there the content may be another, and
only the kind of the error is promised.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import three_episodes

import sdw_fast as sdw
from sdw_fast.files import computed_once
from sdw_fast.folder import load_checkpoint, read_metrics, read_run
from sdw_fast.networks import MLP, MinCritic

MUTATIONS = 150


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """One change of a kind that disks, transfers and editors make."""
    changed = bytearray(content)
    start = int(rng.integers(len(content)))
    stop = min(len(content), start + int(rng.integers(1, 65)))
    kind = rng.choice(["bit", "bit", "bit", "byte", "bytes", "zeros", "cut", "lost", "twice", "swapped", "grown"])
    if kind == "bit":
        changed[start] ^= 1 << int(rng.integers(8))
    elif kind == "byte":
        changed[start] = int(rng.integers(256))
    elif kind == "bytes":
        changed[start:stop] = rng.bytes(stop - start)
    elif kind == "zeros":
        changed[start:stop] = bytes(stop - start)
    elif kind == "cut":
        del changed[start:]
    elif kind == "lost":
        del changed[start:stop]
    elif kind == "twice":
        changed[start:start] = content[start:stop]
    elif kind == "swapped":
        other = int(rng.integers(len(content)))
        changed[start], changed[other] = changed[other], changed[start]
    else:
        changed += rng.bytes(stop - start)
    return bytes(changed)


def outcome(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """What was read, or the sentence that refused it; any other kind of exception passes and fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(), None
        except ValueError as error:
            return None, str(error)


@dataclass
class Format:
    """A good file, what reads it, what it may be read as (None: anything), and whether the reader computes it again."""

    path: Path
    read: Callable[[], Any]
    content: Any
    again: bool = False


def numbers(data: sdw.TransitionDataset) -> list[Any]:
    return [data.content_hash]


def npz(folder: Path) -> Format:
    path = folder / "data.npz"
    np.savez(path, **three_episodes())
    return Format(path, lambda: numbers(sdw.load_dataset(path)), numbers(sdw.load_dataset(path)))


def compressed_npz(folder: Path) -> Format:
    path = folder / "data.npz"
    np.savez_compressed(path, **three_episodes())
    return Format(path, lambda: numbers(sdw.load_dataset(path)), numbers(sdw.load_dataset(path)))


def hdf5(folder: Path) -> Format:
    path = folder / "data.hdf5"
    with h5py.File(path, "w") as file:
        for name, array in three_episodes().items():
            file.create_dataset(name, data=array, compression="gzip" if name == "observations" else None)
    return Format(path, lambda: numbers(sdw.load_dataset(path)), None)


def synthetic(folder: Path) -> Format:
    path = sdw.real_pairs(sdw.load_dataset(three_episodes()), 4).save(folder / "set.npz")

    def read() -> list[Any]:
        one = sdw.SyntheticDataset.load(path)
        return [one.observations.tolist(), one.actions.tolist(), one.units.to_dict(), one.dataset_hash, one.version]

    return Format(path, read, read())


def teacher(folder: Path) -> Format:
    path = folder / "teacher.safetensors"
    sdw.Teacher(MLP([2, 4, 1], tanh=True), MinCritic([MLP([3, 4, 1], tanh=False)])).save(path)

    def read() -> list[Any]:
        one = sdw.Teacher.load(path)
        return [p.tolist() for network in (one.actor, one.critic) for p in network.parameters()]

    return Format(path, read, read())


def corl(folder: Path) -> Format:
    path = folder / "corl.pt"
    network = MLP([2, 4, 1], tanh=False)
    torch.save({"actor": {f"net.{name}": tensor for name, tensor in network.state_dict().items()}}, path)

    def read() -> list[Any]:
        return [p.tolist() for p in sdw.Teacher.from_corl(path, [0, 0], [1, 1]).actor.parameters()]

    return Format(path, read, read())


def old_corl(folder: Path) -> Format:
    path = folder / "corl.pt"
    state = {f"net.{name}": tensor for name, tensor in MLP([2, 4, 1], tanh=False).state_dict().items()}
    torch.save({"actor": state}, path, _use_new_zipfile_serialization=False)
    return Format(path, lambda: sdw.Teacher.from_corl(path, [0, 0], [1, 1]), None)


def a_run(folder: Path) -> Path:
    settings = {"objective": "dbc", "size": 4, "hidden": (4,), "inner_steps": 2, "batch_size": 4, "steps": 3}
    distiller = sdw.run.new_distiller(sdw.load_dataset(three_episodes()), None, sdw.DistillConfig(**settings))
    sdw.run.run(distiller, folder, source={"dataset": "data.npz", "teacher": None}, progress=False)
    return folder


def checkpoint(folder: Path) -> Format:
    path = a_run(folder) / "checkpoint"
    return Format(path, lambda: repr(load_checkpoint(path)), repr(load_checkpoint(path)))


def config(folder: Path) -> Format:
    path = a_run(folder) / "config.json"
    return Format(path, lambda: read_run(folder), None)


def metrics(folder: Path) -> Format:
    path = a_run(folder) / "metrics.jsonl"
    return Format(path, lambda: read_metrics(folder), None)


def cache(folder: Path) -> Format:
    def read() -> list[float]:
        arrays = {"x": np.arange(5.0), "y": np.float32(2)}
        return [x.tolist() for x in computed_once(folder, "knn", lambda: arrays, {"x": (5,), "y": ()}).values()]

    content = read()
    [path] = (folder / ".sdw_cache").iterdir()
    return Format(path, read, content, again=True)


FORMATS = [npz, compressed_npz, hdf5, synthetic, teacher, corl, old_corl, checkpoint, config, metrics, cache]


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_mutations_are_refused_by_name_or_change_nothing(make: Callable[[Path], Format], tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = make(tmp_path)
    good, refused = given.path.read_bytes(), 0
    for seed in range(MUTATIONS):
        changed = mutate(good, np.random.default_rng(seed))
        if changed == good:
            continue
        given.path.write_bytes(changed)
        content, sentence = outcome(given.read)
        refused += sentence is not None
        assert sentence is None or given.path.name in sentence, (seed, sentence)
        assert sentence is not None or given.content is None or content == given.content, seed
    assert refused or given.again
    if make in (synthetic, teacher, checkpoint):  # with a checksum
        assert refused >= 0.95 * MUTATIONS


@pytest.mark.parametrize("name", ["main_data.hdf5", "metadata.json"])
def test_mutations_of_a_minari_dataset_are_refused_by_name(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sdw.real_pairs(sdw.load_dataset(three_episodes()), 4).to_minari("toy/set-v0")
    path = tmp_path / "toy/set-v0/data" / name
    good = path.read_bytes()
    for seed in range(MUTATIONS):
        path.write_bytes(mutate(good, np.random.default_rng(seed)))
        sentence = outcome(lambda: sdw.load_dataset("toy/set-v0"))[1]
        assert sentence is None or "toy/set-v0" in sentence, (seed, sentence)
