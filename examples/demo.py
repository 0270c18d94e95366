"""The main job on real input: hopper-medium, 100,000 transitions, distilled into 256 pairs.

Collects the dataset (once), weighs its states by density, distills it with and without the density weights, clones a
policy on each set, and compares them in MuJoCo with 256 random real pairs and with the teacher. Writes summary.json and
report.png. Run by `make demo`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import sdw_fast as sdw
from sdw_fast import plots
from sdw_fast.files import write_text
from sdw_fast.folder import read_metrics

ENV, DATASET = "Hopper-v5", "hopper/medium"
CLONES, EPISODES = 20, 60  # a set's score: policies cloned on it from different initializations, episodes in all
SETTINGS: dict[str, Any] = {"size": 256, "ess": 0.8, "eval_every": 250}
TEST_SEED = 10_000  # episodes unlike those that chose the best set during distillation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where to write (default: demo)")
    parser.add_argument("--transitions", type=int, default=100_000, help="of the dataset (default: 100000)")
    parser.add_argument("--steps", type=int, default=1_500, help="outer steps of each distillation (default: 1500)")
    parser.add_argument("--seed", type=int, default=0, help="of the distillations and the random pairs (default: 0)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    with timed("collect", seconds):
        sdw.collect(DATASET, steps=options.transitions, seed=0)
        data = sdw.load_dataset(DATASET)
        teacher = sdw.Teacher.pretrained(DATASET)
    print_values("dataset", data.summary())

    with timed("density", seconds):
        logd = sdw.log_density(data)
        weights = sdw.density_weights(logd, ess=SETTINGS["ess"])
    print_values("density weights", weights.to_dict())

    sets = {"random": sdw.real_pairs(data, SETTINGS["size"], seed=options.seed)}
    for objective in ("av-pbc", "sdw"):
        with timed(f"distill {objective}", seconds):
            folder = options.out / f"{objective}-seed{options.seed}"
            print(f"\ndistilling with objective {objective} into {folder}")
            settings = SETTINGS | {"objective": objective, "steps": options.steps, "seed": options.seed}
            sets[objective] = sdw.distill(data, teacher, out=folder, **settings)

    with timed("evaluate", seconds):
        returns = {name: score(pairs) for name, pairs in sets.items()}
        returns["teacher"] = sdw.evaluate(teacher.actions, ENV, episodes=EPISODES, seed=TEST_SEED).normalized
    means = {name: float(np.mean(values)) for name, values in returns.items()}

    write_text(options.out / "summary.json", json.dumps({"returns": means, "seconds": seconds}, indent=2) + "\n")
    runs = {name: read_metrics(options.out / f"{name}-seed{options.seed}") for name in ("av-pbc", "sdw")}
    baselines = {"teacher": means["teacher"], "random pairs": means["random"]}
    points = {name: sets[name].normalized()[0] for name in runs}
    report = plots.plot_report(runs, baselines, data.normalized_observations(), logd, weights, points)
    plots.save(report, options.out / "report.png")
    print_table(returns, options.out)


def score(pairs: sdw.SyntheticDataset) -> np.ndarray:
    """D4RL-normalized returns of policies cloned on a set: (EPISODES,), the same episodes for every set."""
    return sdw.evaluate_synthetic(pairs, clones=CLONES, episodes=EPISODES, seed=TEST_SEED).normalized


@contextlib.contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 2)


def print_values(title: str, values: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in values.items():
        print(f"  {name:<24} {f'{value:.4g}' if isinstance(value, float) else value}")


def print_table(returns: dict[str, np.ndarray], out: Path) -> None:
    print(f"\nD4RL-normalized return in {ENV}, {EPISODES} episodes, the same for all, of {CLONES} clones")
    print(f"  {'policy cloned on':<24} {'mean':>6}  {'std over episodes':>18}")
    for name, values in returns.items():
        label = {"random": "256 random real pairs", "teacher": "(the teacher itself)"}.get(name, f"256 pairs by {name}")
        print(f"  {label:<24} {values.mean():6.1f}  {values.std():18.1f}")
    print(f"\nwrote {out / 'summary.json'} and {out / 'report.png'}")


if __name__ == "__main__":
    main()
