"""A whole distillation of hopper's shape on a GPU: `python -m benchmarks.gpu_distill --out FOLDER`.

Without an environment: smooth random states under the shipped teacher; outer steps a second, the loss, and the first
steps beside the CPU's. With --returns, where MuJoCo and Minari are installed: hopper-medium itself, and the returns of
policies cloned on the distilled set and on random real pairs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import sdw_fast as sdw
from benchmarks.table import append, origin
from sdw_fast import distiller as distiller_module
from sdw_fast import inner, networks
from sdw_fast.run import new_distiller, run

TINY: dict[str, Any] = {"size": 8, "hidden": (8,), "inner_steps": 3, "batch_size": 32}


def smooth_dataset(transitions: int, teacher: sdw.Teacher, seed: int = 0) -> sdw.TransitionDataset:
    """Episodes of 200 steps that swing about the teacher's states as slow waves, with its actions and some noise."""
    length, waves = min(200, transitions), 4
    episodes = transitions // length
    rng = np.random.default_rng(seed)
    states = teacher.units.states
    shape = (episodes, 1, len(states.offset), waves)
    frequency, phase, height = rng.uniform(0.02, 0.3, shape), rng.uniform(0, 2 * np.pi, shape), rng.normal(size=shape)
    normalized = (height * np.sin(frequency * np.arange(length)[None, :, None, None] + phase)).sum(-1) / waves**0.5
    observations = states.denormalize(normalized.reshape(episodes * length, -1)).astype(np.float32)
    actions = teacher.actions(observations)
    actions = np.clip(actions + 0.2 * rng.standard_normal(actions.shape), -1, 1).astype(np.float32)
    ends = np.arange(len(observations)) % length == length - 1
    return sdw.load_dataset(
        {
            "observations": observations,
            "actions": actions,
            "rewards": np.zeros(len(observations), dtype=np.float32),
            "terminations": np.zeros(len(observations), dtype=bool),
            "truncations": ends,
        }
    )


@contextmanager
def draws_of_the_cpu() -> Iterator[None]:
    """Whatever the device, distillers take the random numbers that a CPU's generators of their seeds give."""
    generators: dict[torch.Generator, torch.Generator] = {}

    def of_cpu(generator: torch.Generator) -> torch.Generator:
        return generators.setdefault(generator, torch.Generator().manual_seed(generator.initial_seed()))

    def orthogonal_parameters(
        sizes: Sequence[int], *, gain: float, generators: Sequence[torch.Generator]
    ) -> list[Tensor]:
        drawn = networks.orthogonal_parameters(sizes, gain=gain, generators=[of_cpu(g) for g in generators])
        return [parameter.to(generators[0].device) for parameter in drawn]

    class Batches:
        def __init__(self, problem: sdw.OuterProblem, device: torch.device, rows: np.ndarray | None = None) -> None:
            self.device = device
            self._batches = outer_batches(problem, torch.device("cpu"), rows)

        def draw(self, size: int, generator: torch.Generator) -> list[Tensor]:
            return [part.to(self.device) for part in self._batches.draw(size, of_cpu(generator))]

    outer_batches = distiller_module.OuterBatches
    with (
        mock.patch.object(inner, "orthogonal_parameters", orthogonal_parameters),
        mock.patch.object(distiller_module, "OuterBatches", Batches),
        mock.patch.object(distiller_module, "WARM_UP", float("inf")),  # what a CPU draws cannot be captured
    ):
        yield


def difference_to_the_cpu(
    data: sdw.TransitionDataset, teacher: sdw.Teacher, device: str, steps: int = 3, **settings: Any
) -> dict[str, float]:
    """The largest relative differences of the first steps' losses and hypergradient norms, same draws, in float32.

    Of 20 inner steps: of a hundred, training is chaotic, and each device is right along a trajectory of its own.
    """
    config = sdw.DistillConfig(**{"inner_steps": 20, "precision": "ieee", **settings})
    with draws_of_the_cpu():
        distillers = [new_distiller(data, teacher, config, device=where) for where in ("cpu", device)]
        pairs = [[distiller.step() for distiller in distillers] for _ in range(steps)]
    return {
        name: max(abs(other[name] - one[name]) / abs(one[name]) for one, other in pairs)
        for name in ("loss", "gradient_norm")
    }


def distill(data: sdw.TransitionDataset, name: str, device: str, steps: int, **settings: Any) -> tuple[dict, Any]:
    """Distills with the default settings; steps a second, the loss of the first and the last steps, and the set."""
    teacher = sdw.Teacher.pretrained("hopper/medium")
    began = time.perf_counter()
    distiller = new_distiller(data, teacher, sdw.DistillConfig(steps=steps, **settings), device=device)
    results: dict[str, Any] = {"dataset": name, "transitions": len(data), "steps": steps, "device": device}
    results["seconds_to_prepare"] = round(time.perf_counter() - began, 3)
    results["first_loss"] = float(distiller.step()["loss"])  # makes libraries ready, too
    began = time.perf_counter()
    kept = run(distiller, progress=False)[0]
    seconds = time.perf_counter() - began
    results |= {"seconds": round(seconds, 3), "steps_per_second": (steps - 1) / seconds}
    results["last_loss"] = float(distiller.step()["loss"])  # one more, of the finished set
    return results, kept


def report(out: Path, results: dict[str, Any]) -> None:
    print(json.dumps(results, indent=2), flush=True)
    append(out / "distill.jsonl", {**results, **origin()})


def without_environment(out: Path, device: str) -> None:
    real = device != "cpu"
    teacher = sdw.Teacher.pretrained("hopper/medium")
    data = smooth_dataset(200_000 if real else 1_000, teacher)
    settings = {} if real else TINY
    name = "smooth states of hopper's shape"
    difference = difference_to_the_cpu(data, teacher, device, **settings)
    print(f"the first three steps differ from the CPU's by {difference}", flush=True)
    results, _ = distill(data, name, device, 2_000 if real else 5, **settings)
    report(out, {**results, "difference_to_the_cpu": difference})
    if not max(difference.values()) < 1e-3:  # NaN too; float32 in another order moves them by 1e-6
        raise SystemExit(f"the first steps differ from the CPU's by {difference}")


def with_returns(out: Path, device: str) -> None:
    missing = [name for name in ("gymnasium", "mujoco", "minari") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"no returns: {', '.join(missing)} not installed")
        return
    real = device != "cpu"
    os.environ.setdefault("MINARI_DATASETS_PATH", str(out / "minari"))
    clones, episodes = (10, 20) if real else (1, 1)
    sdw.collect("hopper/medium", steps=50_000 if real else 1_000, seed=0, overwrite=True)
    data = sdw.load_dataset("hopper/medium")
    settings = {} if real else TINY
    results, best = distill(data, "hopper-medium", device, 2_000 if real else 5, **settings)
    report(out, results)
    pairs = {"distilled": best, "random_pairs": sdw.real_pairs(data, len(best), seed=0)}
    for name, synthetic in pairs.items():
        score = sdw.evaluate_synthetic(synthetic, clones=clones, episodes=episodes, seed=10_000)
        results[name] = [float(x) for x in (score.normalized_mean, score.normalized_std)]
        report(out, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu_check"), help="folder of the tables of results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--returns", action="store_true", help="hopper-medium and returns, where MuJoCo is installed")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False")
    options.out.mkdir(parents=True, exist_ok=True)
    (with_returns if options.returns else without_environment)(options.out, options.device)


if __name__ == "__main__":
    main()
