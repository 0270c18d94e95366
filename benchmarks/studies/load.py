"""Seconds and peak memory to load a Minari dataset, beside Minari's own episodes gathered with NumPy.

    python -m benchmarks.studies.load [--transitions 100000 1000000] [--episode 500]

Writes datasets of random numbers, HalfCheetah's shapes in float64, to a temporary folder; each reader runs in a fresh
process, and its peak is taken above what the process held once everything was imported.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings

import numpy as np

OBSERVATION_DIM, ACTION_DIM = 17, 6
READERS = ("sdw_fast", "minari")


def write(dataset_id: str, transitions: int, length: int) -> None:
    import gymnasium as gym
    import minari
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(0)
    episodes = [
        EpisodeBuffer(
            observations=rng.normal(size=(length + 1, OBSERVATION_DIM)),
            actions=rng.uniform(-1, 1, (length, ACTION_DIM)).astype(np.float32),
            rewards=rng.normal(size=length),
            terminations=np.zeros(length, bool),
            truncations=np.arange(length) == length - 1,
            infos={},
        )
        for _ in range(transitions // length)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari would like an author, an e-mail address and more
        minari.create_dataset_from_buffers(
            dataset_id,
            episodes,
            observation_space=gym.spaces.Box(-np.inf, np.inf, (OBSERVATION_DIM,), np.float64),
            action_space=gym.spaces.Box(-1, 1, (ACTION_DIM,), np.float32),
        )


def read(reader: str, dataset_id: str) -> dict[str, float]:
    """Loads in this process: seconds, and the peak in MB above the memory held before."""
    import minari.dataset._storages.hdf5_storage  # imported at the first load otherwise, with its image library

    import sdw_fast

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if reader == "sdw_fast":
        data = sdw_fast.load_dataset(dataset_id)
        arrays = [data.observations, data.next_observations, data.actions, data.rewards]
    else:
        episodes = list(minari.load_dataset(dataset_id).iterate_episodes())
        arrays = [
            np.concatenate([e.observations[:-1] for e in episodes]).astype(np.float32),
            np.concatenate([e.observations[1:] for e in episodes]).astype(np.float32),
            np.concatenate([e.actions for e in episodes]).astype(np.float32),
            np.concatenate([e.rewards for e in episodes]).astype(np.float32),
        ]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "peak": peak * 1024 / 1e6, "arrays": sum(a.nbytes for a in arrays) / 1e6}  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--episode", type=int, default=500, help="steps of each episode")
    parser.add_argument("--read", nargs=2, metavar=("READER", "ID"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(*arguments.read)))
        return
    print("| transitions | episodes | reader | seconds | peak, MB | its arrays, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        for transitions in arguments.transitions:
            dataset_id = f"benchmark/load{transitions}-v0"
            write(dataset_id, transitions, arguments.episode)
            for reader in READERS:
                command = [sys.executable, "-m", "benchmarks.studies.load", "--read", reader, dataset_id]
                runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(3)]
                best = min(runs, key=lambda run: run["seconds"])
                print(
                    f"| {transitions:,} | {transitions // arguments.episode:,} | {reader} | {best['seconds']:.2f} "
                    f"| {best['peak']:.0f} | {best['arrays']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
