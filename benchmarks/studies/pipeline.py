"""Seconds and peak memory of each stage of the main job on a hopper dataset, one after another in one process.

    sdw-fast collect hopper/medium --steps 1000000
    python -m benchmarks.studies.pipeline --transitions 100000 1000000

Each number of transitions gets a fresh process and the dataset's first rows; the density is computed anew, without
its cache. Peak memory is the process's, imports included, up to the end of the stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

import sdw_fast as sdw

Result = TypeVar("Result")
STEPS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="hopper/medium")
    parser.add_argument("--transitions", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(stages(options.dataset, options.transitions[0])))
        return
    print(f"{'transitions':>11}  {'stage':<28} {'seconds':>8}  {'peak MiB':>8}")
    for transitions in options.transitions:
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            "--child",
            "--dataset",
            options.dataset,
            "--transitions",
            str(transitions),
        ]
        for stage in json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout):
            print(f"{transitions:>11,}  {stage['stage']:<28} {stage['seconds']:>8.3f}  {stage['peak_mib']:>8.0f}")


def stages(dataset: str, transitions: int) -> list[dict[str, Any]]:
    """Runs the main job's stages and measures each."""
    measured: list[dict[str, Any]] = []

    def measure(stage: str, work: Callable[[], Result], *, calls: int = 1) -> Result:
        began = time.perf_counter()
        result = work()
        seconds = (time.perf_counter() - began) / calls
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        measured.append({"stage": stage, "seconds": seconds, "peak_mib": peak})
        return result

    measure("(imports)", lambda: None)
    data = measure("load the dataset", lambda: sdw.load_dataset(dataset))
    if len(data) < transitions:
        raise SystemExit(f"{dataset} holds {len(data)} transitions: collect {transitions} first")
    if len(data) > transitions:
        data = data.subset(slice(transitions))
    data = dataclasses.replace(data, path=None)  # nothing is kept
    measure("k-NN log-density", lambda: sdw.log_density(data))
    teacher = sdw.Teacher.pretrained("hopper/medium")
    config = sdw.DistillConfig(objective="av-pbc")
    problem = measure("targets and action values", lambda: sdw.outer_problem(data, teacher, config))
    distiller = sdw.Distiller(problem, sdw.real_pairs(data, config.size), config)
    distiller.step()
    measure("outer step (T = 100)", lambda: [distiller.step() for _ in range(STEPS)], calls=STEPS)
    policy = measure("behavior cloning", lambda: sdw.behavior_clone(distiller.synthetic))
    measure("evaluation, the clone, 10 ep.", lambda: sdw.evaluate(policy, "Hopper-v5"))
    actor = teacher.actions
    result = measure("evaluation, the teacher, 10 ep.", lambda: sdw.evaluate(actor, "Hopper-v5"))
    measured[-1]["stage"] += f" of {int(np.mean(result.lengths))} steps"
    return measured


if __name__ == "__main__":
    main()
