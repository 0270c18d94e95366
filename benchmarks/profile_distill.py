"""Where an outer step of the distillation loop goes: `python -m benchmarks.profile_distill`.

Runs a distillation with a folder, metrics and checkpoints, as a user does, under Python's profiler,
and prints the share of the time spent outside the compiled kernels and what it went to. The profiler slows Python
down and the kernels not, so that the share printed is an upper bound.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import sdw_fast as sdw
from sdw_fast import _C
from sdw_fast.run import new_distiller, run


def random_dataset(transitions: int) -> sdw.TransitionDataset:
    """HalfCheetah's shapes, random numbers: the time does not depend on what they are."""
    rng = np.random.default_rng(0)
    return sdw.load_dataset(
        {
            "observations": rng.standard_normal((transitions, 17), dtype=np.float32),
            "actions": np.tanh(rng.standard_normal((transitions, 6), dtype=np.float32)),
            "rewards": np.zeros(transitions, dtype=np.float32),
            "terminations": np.zeros(transitions, dtype=bool),
            "truncations": np.arange(transitions) % 1_000 == 999,
        }
    )


class TimedKernels:
    """Stands for the compiled module (or what it returns) and adds up the seconds spent in its calls."""

    seconds = 0.0

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._target, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            TimedKernels.seconds += time.perf_counter() - began
            return TimedKernels(result) if type(result).__name__ == "UnrolledBCTape" else result

        return timed if callable(function) else function


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, default=1_000_000, help="rows of the dataset")
    parser.add_argument("--steps", type=int, default=200, help="outer steps profiled")
    parser.add_argument("--inner-width", type=int, default=64, help="units of the policy unrolled; 256: the papers'")
    options = parser.parse_args()
    data = random_dataset(options.transitions)
    settings = sdw.DistillConfig(objective="dbc", inner_width=options.inner_width, steps=options.steps)
    distiller = new_distiller(data, None, settings)
    distiller.step()
    for op in ("unrolled_bc", "behavior_matching"):
        importlib.import_module(f"sdw_fast.ops.{op}")._C = TimedKernels(_C)  # type: ignore[attr-defined]
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        profile.runcall(run, distiller, folder, progress=False)
        seconds = time.perf_counter() - began
    steps = options.steps - 1
    inside = TimedKernels.seconds
    calls = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    spent_in = callees(calls, ("advance", "fetch", "run"))
    opening = spent_in.pop("__init__", 0.0)  # of the run's folder, once a run: TensorBoard's import
    seconds -= opening
    print(f"opening the run's folder, once: {opening:.2f} s")
    print(f"an outer step, dataset of {options.transitions:,} rows, mean of {steps}: {seconds / steps * 1e3:.1f} ms")
    print(f"in the kernels: {inside / seconds:.2%}; outside: {1 - inside / seconds:.2%}")
    print("\ncalled by the loop and its steps, kernels included:")
    for name, spent in sorted(spent_in.items(), key=lambda item: -item[1])[:14]:
        print(f"  {spent / steps * 1e3:9.3f} ms a step  {spent / seconds:7.2%}  {name}")


def callees(calls: dict, names: tuple[str, ...]) -> dict[str, float]:
    """Seconds spent in what the distiller's methods of these names call directly, by the callee's name."""
    total: dict[str, float] = {}
    for (_, _, callee), (_, _, _, _, callers) in calls.items():
        for (file, _, caller), (_, _, _, spent) in callers.items():
            if Path(file).name in ("distiller.py", "run.py") and caller in names and callee not in names:
                total[callee] = total.get(callee, 0.0) + spent
    return total


if __name__ == "__main__":
    main()
