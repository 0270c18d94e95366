"""Damaged files: seeded mutations of every format, refused by a sentence that names the file, or read as if whole.

Our own files carry checksums, and the parts of a zip archive a CRC: what is read must be what was written. HDF5 files
and PyTorch's old format of other programs have neither: there what is read may silently be something else, and only the
kind of the error is promised. A dataset that we collect is Minari's HDF5, with its checksum in the metadata. Lines at
the end of metrics.jsonl may be missing, as after a crash.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from campaign import Attack, Trial
from conftest import three_episodes

import sdw_fast as sdw
from sdw_fast.files import computed_once
from sdw_fast.folder import load_checkpoint, read_metrics, read_run
from sdw_fast.networks import MLP, MinCritic


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
    """What was read, or the sentence that refused it; an exception of any other kind is the caller's, a crash."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(), None
        except ValueError as error:
            return None, str(error)


@dataclass
class Format:
    """A good file, what reads it, and what a refusal must name (nothing: what is damaged is computed again)."""

    path: Path
    read: Callable[[], Any]
    name: str


def _dataset(path: Path) -> Format:
    return Format(path, lambda: sdw.load_dataset(path).content_hash, path.name)


def npz(folder: Path) -> Format:
    np.savez(folder / "data.npz", **three_episodes())
    return _dataset(folder / "data.npz")


def compressed_npz(folder: Path) -> Format:
    np.savez_compressed(folder / "data.npz", **three_episodes())
    return _dataset(folder / "data.npz")


def _hdf5(folder: Path, **options: Any) -> Format:
    with h5py.File(folder / "data.hdf5", "w") as file:
        for name, array in three_episodes().items():
            file.create_dataset(name, data=array, **options)
    return _dataset(folder / "data.hdf5")


def hdf5(folder: Path) -> Format:
    return _hdf5(folder)


def hdf5_fletcher32(folder: Path) -> Format:
    return _hdf5(folder, fletcher32=True)


def synthetic_set(folder: Path) -> Format:
    path = sdw.real_pairs(sdw.load_dataset(three_episodes()), 4).save(folder / "set.npz")

    def read() -> list[Any]:
        one = sdw.SyntheticDataset.load(path)
        return [one.observations.tolist(), one.actions.tolist(), one.units.to_dict(), one.dataset_hash, one.version]

    return Format(path, read, path.name)


def teacher(folder: Path) -> Format:
    path = folder / "teacher.safetensors"
    sdw.Teacher(MLP([2, 4, 1], tanh=True), MinCritic([MLP([3, 4, 1], tanh=False)])).save(path)

    def read() -> list[Any]:
        one = sdw.Teacher.load(path)
        return [p.tolist() for network in (one.actor, one.critic) for p in network.parameters()]

    return Format(path, read, path.name)


def _corl(folder: Path, *, is_zip: bool) -> Format:
    path = folder / "corl.pt"
    state = {f"net.{name}": tensor for name, tensor in MLP([2, 4, 1], tanh=False).state_dict().items()}
    torch.save({"actor": state}, path, _use_new_zipfile_serialization=is_zip)

    def read() -> list[Any]:
        return [p.tolist() for p in sdw.Teacher.from_corl(path, [0, 0], [1, 1]).actor.parameters()]

    return Format(path, read, path.name)


def corl_checkpoint(folder: Path) -> Format:
    return _corl(folder, is_zip=True)


def old_corl_checkpoint(folder: Path) -> Format:
    return _corl(folder, is_zip=False)


def a_run(folder: Path) -> Path:
    settings = {"objective": "dbc", "size": 4, "hidden": (4,), "inner_steps": 2, "batch_size": 4, "steps": 3}
    distiller = sdw.run.new_distiller(sdw.load_dataset(three_episodes()), None, sdw.DistillConfig(**settings))
    sdw.run.run(distiller, folder, source={"dataset": "data.npz", "teacher": None}, progress=False)
    return folder


def checkpoint(folder: Path) -> Format:
    path = a_run(folder) / "checkpoint"
    return Format(path, lambda: repr(load_checkpoint(path)), path.name)


def config_json(folder: Path) -> Format:
    return Format(a_run(folder) / "config.json", lambda: read_run(folder), "config.json")


def metrics_jsonl(folder: Path) -> Format:
    whole = read_metrics(a_run(folder))

    def read() -> bool:
        found = read_metrics(folder)
        return found == whole[: len(found)]

    return Format(folder / "metrics.jsonl", read, "metrics.jsonl")


def density_cache(folder: Path) -> Format:
    def read() -> list[float]:
        arrays = {"x": np.arange(5.0), "y": np.float32(2)}
        return [x.tolist() for x in computed_once(folder, "knn", lambda: arrays, {"x": (5,), "y": ()}).values()]

    read()
    [path] = (folder / ".sdw_cache").iterdir()
    return Format(path, read, "")


def _minari(folder: Path, dataset_id: str, name: str) -> Format:
    path = folder / dataset_id / "data" / name

    def read() -> list[Any]:
        data = sdw.load_dataset(dataset_id)
        return [data.content_hash, data.env_id, data.units.to_dict()]

    return Format(path, read, dataset_id)


def collected(folder: Path) -> Format:
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    return _minari(folder, sdw.collect("hopper/medium", steps=40, progress=False), "main_data.hdf5")


def collected_metadata(folder: Path) -> Format:
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    return _minari(folder, sdw.collect("hopper/medium", steps=40, progress=False), "metadata.json")


def _foreign_minari(folder: Path, name: str) -> Format:
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sdw.real_pairs(sdw.load_dataset(three_episodes()), 4).to_minari("toy/set-v0")
    return _minari(folder, "toy/set-v0", name)


def minari(folder: Path) -> Format:
    return _foreign_minari(folder, "main_data.hdf5")


def minari_metadata(folder: Path) -> Format:
    return _foreign_minari(folder, "metadata.json")


OURS = [synthetic_set, teacher, checkpoint, config_json, metrics_jsonl, density_cache, collected, collected_metadata]
WITH_CRC = [npz, compressed_npz, corl_checkpoint]
UNCHECKED = [hdf5, hdf5_fletcher32, minari, minari_metadata, old_corl_checkpoint]  # foreign, some parts or all


def mutating(make: Callable[[Path], Format]) -> Callable[[Path, int], Trial]:
    """One mutation of a file of this format a trial."""

    def prepare(folder: Path, seed: int) -> Trial:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            given = make(folder)
        good, content = given.path.read_bytes(), given.read()

        def trial(number: int) -> str | None:
            changed = mutate(good, np.random.default_rng([seed, number]))
            given.path.write_bytes(changed)
            found, refusal = outcome(given.read)
            if refusal is not None:
                assert given.name, f"not computed again: {refusal}"
                assert given.name in refusal, refusal
                return None
            return None if found == content else f"read otherwise than written: {found}"[:300]

        return trial

    return prepare


ATTACKS = [
    Attack(f"mutation of {make.__name__}", mutating(make), trials=600, foreign=make in UNCHECKED, patience=30)
    for make in (*OURS, *WITH_CRC, *UNCHECKED)
]
