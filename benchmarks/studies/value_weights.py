"""Are the default weights right? On the six published tasks, beside the papers' β·Q and milder density weights.

    python -m benchmarks.studies.value_weights             # makes the rows that are missing, then fills docs/results.md
    python -m benchmarks.studies.value_weights --tables    # fills the table, no more

A row of results/value_weights.jsonl is a task, a kind of weights and a seed. Everything else is the same in both, the
draws of the seed too. One thread a process; give several processes different tasks by --only.

The package's default density weights, k = 10 and an effective sample size of 0.5, came last, after sets of 2,000 steps
by them (benchmarks.studies.presets) had returned less on Walker2d than these, on two seeds. The rule, written before
any of their rows here: those of SETTINGS become the defaults if the package's return, seed by seed over all tasks, more
than two standard errors less.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import report, tasks, work
from benchmarks.studies.cells import PUBLISHED

TABLE = table.RESULTS / "value_weights.jsonl"
SETTINGS: dict[str, Any] = {"objective": "sdw", "size": 256, "steps": 1_000, "k": 100, "ess": 0.8}
KINDS: dict[str, dict[str, Any]] = {
    "paper": {"value_weights": "paper"},
    "shifted": {"value_weights": "shifted"},
    "k=10,ess=0.5": {"k": 10, "ess": 0.5},
}
COLUMNS = ("β·Q", "shifted", "shifted, k = 10, ess = 0.5")
DIFFERENCES = {("shifted", "paper"): "shifted − β·Q", ("k=10,ess=0.5", "shifted"): "k = 10, ess = 0.5, − shifted"}
SEEDS = range(5)
POLICIES, EPISODES = 10, 10

Case = tuple[int, str, str]  # seed, task, kind of weights


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    return table.latest(table.read(TABLE, SETTINGS), "seed", "task", "weights")


def cases() -> list[Case]:
    return [(seed, task, kind) for kind in KINDS for seed in SEEDS for task in PUBLISHED]


def measure(case: Case) -> None:
    """Distills one set and runs policies cloned on it."""
    seed, task, kind = case
    began, data = time.process_time(), tasks.dataset(task)
    chosen = {**SETTINGS, **KINDS[kind], "seed": seed}
    synthetic = sdw.distill(data, tasks.teacher(task), progress=False, **chosen)
    policies = work.mean_returns(work.clones(synthetic, POLICIES), data, EPISODES)
    row = {"task": task, "weights": kind, "seed": seed, "policies": policies}
    work.record(TABLE, row, SETTINGS, began)


def results_table(found: dict[Case, table.Entries]) -> str:
    """Means over the seeds ± standard error, and those of the differences, seed by seed."""
    lines, differences = [], {of: list[float]() for of in DIFFERENCES}
    for task in PUBLISHED:
        returns = {kind: report.of_each_seed(found, SEEDS, task, kind) for kind in KINDS}
        line = [task, *(report.mean_and_error(list(of.values()), len(SEEDS)) for of in returns.values())]
        for (kind, rival), of in differences.items():
            both = report.seed_by_seed(returns[kind], returns[rival])
            line.append(report.mean_and_error(both, len(SEEDS)))
            of += both
        lines.append(line)
    last = [report.mean_and_error(of, len(SEEDS) * len(PUBLISHED)) for of in differences.values()]
    return report.markdown(["task", *COLUMNS, *DIFFERENCES.values()], [*lines, ["all", *[""] * len(KINDS), *last]])


def write_page(page: Path = report.PAGE) -> None:
    """Fills the study's table."""
    report.fill("value weights", results_table(results()), page)


if __name__ == "__main__":
    work.study(__doc__, cases(), results=results, measure=measure, write_page=write_page)
