"""The whole path over and over in one process, whose memory must not grow."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from campaign import Attack, Trial

import sdw_fast as sdw

_WARM_UP = 50  # rounds, after which buffers and caches are as large as they get
_GROWTH = 8 << 20  # bytes that the allocator may still move by


def resident() -> int:
    """Bytes of memory that this process takes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def whole_path(folder: Path, seed: int) -> torch.Tensor:
    """Load, density, weights, distill, save, load, clone, on small shapes; what the clone does."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(500, 5)).astype(np.float32)
    arrays = {"observations": observations, "actions": np.tanh(observations[:, :2]), "rewards": np.ones(500)}
    np.savez(folder / "data.npz", **arrays, terminals=np.zeros(500, bool), timeouts=np.arange(500) % 50 == 49)
    shutil.rmtree(folder / ".sdw_cache", ignore_errors=True)
    data = sdw.load_dataset(folder / "data.npz")
    settings = {
        "objective": "dbc",
        "density": True,
        "k": 5,
        "size": 8,
        "hidden": (8, 8),
        "inner_steps": 5,
        "batch_size": 16,
    }
    sdw.distill(data, **settings, steps=3, seed=seed, progress=False).save(folder / "set.npz")
    policy = sdw.behavior_clone(sdw.SyntheticDataset.load(folder / "set.npz"), seed=seed)
    return policy(torch.from_numpy(observations))


def rounds(folder: Path, seed: int) -> Trial:
    torch.set_num_threads(1)
    first = whole_path(folder, seed)
    for _ in range(_WARM_UP):
        whole_path(folder, seed)
    warm = resident()

    def trial(number: int) -> str | None:
        if not torch.equal(whole_path(folder, seed), first):
            return "another result than in the first round"
        growth = resident() - warm
        return f"memory has grown by {growth / 2**20:.1f} MiB" if growth > _GROWTH else None

    return trial


ATTACKS = [Attack("soak: rounds of the whole path, bits and memory", rounds, trials=150)]
