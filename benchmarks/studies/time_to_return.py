"""Seconds from a loaded dataset to a set whose policies return what was published, on the six published tasks.

    python -m benchmarks.studies.time_to_return             # makes the missing rows, then fills docs/results.md
    python -m benchmarks.studies.time_to_return --tables    # fills the table, no more

A row of results/time_to_return.jsonl is a distillation of so many outer steps: density, teacher's labels, steps. STEPS
are tried in order, until twenty policies cloned on the set by seeds that nothing else used return the published number
or more on average. The seconds are those of that distillation alone, of one thread; the training of the teacher is not
among them, nor among the papers'. One thread a process; give several processes different tasks by --only.
"""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import report, tasks, work
from benchmarks.studies.cells import PUBLISHED

TABLE = table.RESULTS / "time_to_return.jsonl"
SETTINGS: dict[str, Any] = {"objective": "sdw", "size": 256, "k": 100, "ess": 0.8}
STEPS = (50, 100, 200, 400, 800)
SEEDS = range(3)
POLICIES, EPISODES = 20, 5

Case = tuple[int, str, int]  # seed, task, outer steps


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    return table.latest(table.read(TABLE, SETTINGS), "seed", "task", "steps")


def measure(case: Case) -> None:
    """Distills one set from a dataset that nothing is known of, and runs policies cloned on it."""
    seed, task, steps = case
    data, teacher = dataclasses.replace(tasks.dataset(task), path=None), tasks.teacher(task)
    began, cpu = time.perf_counter(), time.process_time()
    synthetic = sdw.distill(data, teacher, steps=steps, seed=seed, progress=False, **SETTINGS)
    row: dict[str, Any] = {"task": task, "seed": seed, "steps": steps}
    row |= {"seconds": round(time.perf_counter() - began, 1), "cpu": round(time.process_time() - cpu, 1)}
    row["policies"] = work.mean_returns(work.clones(synthetic, POLICIES), data, EPISODES)
    table.append(TABLE, {**row, "settings": SETTINGS, **table.origin()})
    print(row, flush=True)


def reached(found: dict[Case, table.Entries], seed: int, task: str) -> tuple[table.Entries | None, bool]:
    """The first row of a seed that returns the published number, if any, and whether none is left to be tried."""
    for steps in STEPS:
        row = found.get((seed, task, steps))
        if row is None:
            return None, False
        if np.mean(row["policies"]) >= PUBLISHED[task]:
            return row, True
    return None, True


def results_table(found: dict[Case, table.Entries]) -> str:
    lines = []
    for task, published in PUBLISHED.items():
        ended = [reached(found, seed, task) for seed in SEEDS]
        rows = [row for row, _ in ended if row]
        said = [f"{row['steps']}: {np.mean(row['policies']):.1f}" for row in rows]
        seconds = ", ".join(f"{row['cpu']:.0f}" for row in rows)
        missed = sum(done and row is None for row, done in ended)
        never = f"{missed} of {len(SEEDS)} not within {STEPS[-1]} steps" if missed else ""
        missing = sum(not done for _, done in ended)
        notes = "; ".join(filter(None, [never, f"{missing} of {len(SEEDS)} missing" if missing else ""]))
        lines.append([task, str(published), "; ".join(said), seconds, notes])
    return report.markdown(["task", "published", "outer steps: return, of each seed", "CPU seconds", ""], lines)


def write_page(page: Path = report.PAGE) -> None:
    """Fills the study's table."""
    report.fill("time to return", results_table(results()), page)


def main() -> None:
    options = work.options(__doc__)
    if not options.tables:
        work.one_thread()
        for seed in SEEDS:
            for task in PUBLISHED:
                while re.search(options.only, task) and not reached(found := results(), seed, task)[1]:
                    measure((seed, task, next(s for s in STEPS if (seed, task, s) not in found)))
    write_page()


if __name__ == "__main__":
    main()
