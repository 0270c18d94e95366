"""Prints a hash of what the package computes from fixed input: two versions that agree print the same lines.

    python -m benchmarks.bits

On one machine and thread count (OMP_NUM_THREADS) the lines are the same in every run. They cover a density, its
weights, distillations by "dbc" and "sdw" with every setting written out (action bounds −1 and 1), one of them with a
teacher of the package's own networks, two runs side by side, and what a saved set holds.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import torch

import sdw_fast as sdw

ROWS, STATES, ACTIONS = 6_000, 11, 3
SETTINGS = {
    "value_weights": "shifted",
    "density": None,
    "density_method": "knn",
    "k": 10,
    "tau": None,
    "ess": 0.5,
    "clip": 0.99,
    "size": 64,
    "init": "random",
    "hidden": (256, 256, 256),
    "inner_width": 64,
    "gain": 1.0,
    "inner_steps": 100,
    "inner_lr": 0.1,
    "inner_momentum": 0.9,
    "adapt_inner_lr": True,
    "window": None,
    "steps": 50,
    "batch_size": 512,
    "optimizer": "adam",
    "lr": 0.03,
    "schedule": "cosine",
    "momentum": 0.9,
    "average": 0.9,
    "clip_norm": 0.02,
    "select": "held-out",
    "seed": 0,
}


def main() -> None:
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(ROWS, STATES)).cumsum(axis=1).astype(np.float32)
    data = sdw.load_dataset(
        {
            "observations": observations,
            "actions": np.tanh(observations[:, :ACTIONS]),
            "rewards": rng.normal(size=ROWS).astype(np.float32),
            "terminations": np.zeros(ROWS, bool),
            "truncations": np.arange(ROWS) % 100 == 99,
            "next_observations": np.roll(observations, -1, axis=0),
            "action_low": np.full(ACTIONS, -1.0),
            "action_high": np.full(ACTIONS, 1.0),
        }
    )
    functions = sdw.Teacher(
        actor=lambda states: torch.tanh(states[:, :ACTIONS] - states[:, 3:6]),
        critic=lambda states, actions: 100 + 10 * states[:, 0] + actions.sum(dim=1),
    )
    networks = sdw.Teacher.load(Path(sdw.__file__).parent / "assets" / "hopper-medium-teacher.safetensors")

    logd = sdw.log_density(data, k=10)
    show("density", logd)
    show("density weights", sdw.density_weights(logd, ess=0.5).weights)
    sets = {
        "dbc": sdw.distill(data, objective="dbc", progress=False, **SETTINGS),
        "sdw": sdw.distill(data, functions, objective="sdw", progress=False, **SETTINGS),
        "sdw, networks, sgd": sdw.distill(
            data, networks, objective="sdw", progress=False, **{**SETTINGS, "optimizer": "sgd", "average": 0.0}
        ),
    }
    for run, syn in enumerate(sdw.distill(data, functions, n_runs=2, objective="sdw", progress=False, **SETTINGS)):
        sets[f"sdw, run {run} of 2"] = syn
    for name, syn in sets.items():
        show(name, syn.observations, syn.actions)
    arrays = ("observations", "actions", "mean", "scale", "action_low", "action_high")
    with tempfile.TemporaryDirectory() as folder, np.load(sets["sdw"].save(Path(folder) / "set.npz")) as file:
        show("saved set", *(file[name] for name in arrays))
    policy = sdw.behavior_clone(sets["sdw"], seed=3)
    with torch.no_grad():
        show("cloned policy", policy(torch.from_numpy(observations)).numpy())


def show(name: str, *arrays: np.ndarray) -> None:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    print(f"{name:<20} {digest.hexdigest()[:32]}", flush=True)


if __name__ == "__main__":
    main()
