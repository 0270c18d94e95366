"""What value weights of any scale cost on the six published tasks: the papers' β·Q beside the shifted ones.

    python -m benchmarks.studies.value_weights             # makes the rows that are missing, then fills docs/results.md
    python -m benchmarks.studies.value_weights --tables    # fills the table, no more

A row of results/value_weights.jsonl is a task, a kind of weights and a seed. Everything else is the same in both, the
draws of the seed too. One thread a process; give several processes different tasks by --only.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import report, tasks, work
from benchmarks.studies.cells import PUBLISHED

TABLE = table.RESULTS / "value_weights.jsonl"
KINDS = {"paper": "β·Q", "shifted": "shifted"}
SETTINGS: dict[str, Any] = {"objective": "sdw", "size": 256, "steps": 1_000, "k": 100, "ess": 0.8}
SEEDS = range(5)
POLICIES, EPISODES = 10, 10

Case = tuple[int, str, str]  # seed, task, kind of weights


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    return table.latest(table.read(TABLE, SETTINGS), "seed", "task", "weights")


def cases() -> list[Case]:
    return [(seed, task, kind) for seed in SEEDS for task in PUBLISHED for kind in KINDS]


def measure(case: Case) -> None:
    """Distills one set and runs policies cloned on it."""
    seed, task, kind = case
    began, data = time.process_time(), tasks.dataset(task)
    synthetic = sdw.distill(data, tasks.teacher(task), value_weights=kind, seed=seed, progress=False, **SETTINGS)
    policies = work.mean_returns(work.clones(synthetic, POLICIES), data, EPISODES)
    row = {"task": task, "weights": kind, "seed": seed, "policies": policies}
    work.record(TABLE, row, SETTINGS, began)


def results_table(found: dict[Case, table.Entries]) -> str:
    """Means over the seeds that both kinds have ± standard error, and that of their differences, seed by seed."""
    lines, differences = [], []
    for task in PUBLISHED:
        both = [seed for seed in SEEDS if all((seed, task, kind) in found for kind in KINDS)]
        returns = [[float(np.mean(found[seed, task, kind]["policies"])) for seed in both] for kind in KINDS]
        difference = np.subtract(returns[1], returns[0]).tolist()
        differences += difference
        lines.append([task, *(report.mean_and_error(x, len(SEEDS)) for x in (*returns, difference))])
    lines.append(["all", "", "", report.mean_and_error(differences, len(SEEDS) * len(PUBLISHED))])
    return report.markdown(["task", *KINDS.values(), "difference"], lines)


def write_page(page: Path = report.PAGE) -> None:
    """Fills the study's table."""
    report.fill("value weights", results_table(results()), page)


if __name__ == "__main__":
    work.study(__doc__, cases(), results=results, measure=measure, write_page=write_page)
