"""The synthetic sets that come with the package: distilled, evaluated, written into sdw_fast/assets.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.sets hopper/medium --steps 2000
    OMP_NUM_THREADS=1 python -m benchmarks.studies.sets hopper/medium-replay --histories FOLDER --objective av-pbc
    OMP_NUM_THREADS=1 python -m benchmarks.studies.sets hopper/medium --large --inner-width 128

No task: medium and medium-expert of all robots. Of medium-replay the data and the teacher are a learner's history and
the learner itself, in a FOLDER as `benchmarks.studies.histories` takes it. With --large dataset, teacher and settings
are those of `benchmarks.studies.large`, which says where such datasets should lie.

A set replaces the one that is there only if its policies return more: both were run with the same seeds, ten policies
for twenty episodes in all. Prints the row for sdw_fast/assets/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import sdw_fast as sdw
from benchmarks.studies import histories, large, tasks
from benchmarks.studies.cells import PUBLISHED
from sdw_fast import shipped

CLONES, EPISODES, SEED = 10, 20, 1000


def evaluated(synthetic: sdw.SyntheticDataset) -> sdw.SyntheticDataset:
    """The set with what its policies return."""
    result = sdw.evaluate_synthetic(synthetic, clones=CLONES, episodes=EPISODES, seed=SEED)
    return dataclasses.replace(synthetic, evaluation={**result.to_dict(), "clones": CLONES})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help="such as hopper/medium; none: all but medium-replay")
    parser.add_argument("--objective", default="sdw", help="of the distillation")
    parser.add_argument("--histories", type=Path, metavar="FOLDER", help="of learners' histories")
    parser.add_argument("--large", action="store_true", help="a dataset of D4RL's size, and its teacher")
    width = sdw.DistillConfig().inner_width
    parser.add_argument("--inner-width", type=int, default=width, metavar="UNITS", help="unrolled a layer")
    parser.add_argument("--state-noise", type=float, default=0.0, metavar="SHARE", help="of the states' deviation")
    parser.add_argument("--steps", type=int, default=2_000, help="outer steps")
    options = parser.parse_args()
    settings: dict[str, Any] = {**large.SETTINGS} if options.large else {}
    settings |= {name: getattr(options, name) for name in ("objective", "steps", "inner_width", "state_noise")}
    for task in options.tasks or PUBLISHED:
        if options.large:
            data, teacher = large.dataset(task), large.teacher(task)
        elif task in histories.TASKS:
            if options.histories is None:
                parser.error(f"{task} is made from a learner's history: say where it lies by --histories")
            data, teacher = histories.of_task(options.histories, task)
        else:
            data, teacher = tasks.dataset(task), tasks.teacher(task)
        synthetic = sdw.distill(data, teacher, **settings, seed=0)
        new = evaluated(synthetic).evaluation
        assert new is not None
        known = task in shipped.names("set")
        old = sdw.SyntheticDataset.pretrained(task).evaluation if known else None
        kept = old is not None and old["mean"] >= new["mean"]
        if not kept:
            path = shipped.ASSETS / f"{task.replace('/', '-')}-set.npz"
            dataclasses.replace(synthetic, evaluation=new).save(path)
        print(
            f"| {task} | {len(data):,} | {options.steps:,} | {new['mean']:.0f} ± {new['std']:.0f} "
            f"| {new['normalized_mean']:.1f} ± {new['normalized_std']:.1f} |{' the one before is better' * kept}"
        )


if __name__ == "__main__":
    main()
