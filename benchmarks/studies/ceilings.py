"""What the whole dataset can give: policies cloned on all states with the teacher's actions, until nothing improves.

    python -m benchmarks.studies.ceilings             # makes the rows that are missing, then fills docs/results.md
    python -m benchmarks.studies.ceilings --tables    # fills the table, no more

A row of results/ceilings.jsonl is a task of the six published ones and a policy: 256 units a layer, Adam with a cosine,
the parameters of the least loss on a tenth of the states. Sets are read as a share of the larger of this ceiling and of
cloning on all data with the dataset's own actions (results/suite.jsonl). One thread a process; give several processes
different tasks by --only.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import table
from benchmarks.studies import cells, report, tasks, variance, work
from benchmarks.studies.cells import METHODS, PUBLISHED, TEST_SEED

TABLE = table.RESULTS / "ceilings.jsonl"
SETTINGS: dict[str, Any] = {"steps": 20_000, "batch_size": 256, "lr": 1e-3, "held_out": 0.1, "look_every": 500}
POLICIES, EPISODES = range(3), 20
SHOWN = ("av-pbc-wide", "sdw-mild")  # methods of the suite whose sets are compared
COMPARED = ("any", "fixed", "fixed-wide", "ensemble")  # of the comparison of variances

Case = tuple[int, str]  # policy, task


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    return table.latest(table.read(TABLE, SETTINGS), "policy", "task")


def cases() -> list[Case]:
    return [(number, task) for number in POLICIES for task in PUBLISHED]


def measure(case: Case) -> None:
    """Clones one policy and runs it."""
    number, task = case
    began, data = time.process_time(), tasks.dataset(task)
    targets, _ = tasks.teacher(task).label(data.observations, data.units, values=False)
    labeled = dataclasses.replace(data, actions=data.units.require_actions().denormalize(targets))
    policy = work.clone_on_all(labeled, TEST_SEED + number, **SETTINGS)
    row: dict[str, Any] = {"task": task, "policy": number}
    row["return"] = work.mean_returns([policy], data, EPISODES)[0]
    work.record(TABLE, row, SETTINGS, began)


def results_table(found: dict[Case, table.Entries]) -> str:
    """Ceilings beside cloning on all data, and the share of the larger that sets return."""
    suite, kinds = cells.results(), variance.results()
    lines = []
    for task in PUBLISHED:
        ceiling = [found[number, task]["return"] for number in POLICIES if (number, task) in found]
        on_data = np.mean(cells.seeds_returns(suite, task, "bc"))
        larger = max(on_data, np.mean(ceiling) if ceiling else -np.inf)
        returns = [cells.seeds_returns(suite, task, method) for method in SHOWN]
        returns += [list(variance.returns(kinds, task)[column].values()) for column in COMPARED]
        shares = [f"{np.mean(of) / larger:.2f}" if of else "missing" for of in returns]
        lines.append([task, report.mean_and_error(ceiling, len(POLICIES)), f"{on_data:.1f}", *shares])
    columns = [
        *(METHODS[method] for method in SHOWN),
        "SDW, any θ_0",
        *(variance.COLUMNS[name] for name in COMPARED[1:]),
    ]
    return report.markdown(["task", "ceiling", METHODS["bc"], *columns], lines)


def write_page(page: Path = report.PAGE) -> None:
    """Fills the study's table."""
    report.fill("ceilings", results_table(results()), page)


if __name__ == "__main__":
    work.study(__doc__, cases(), results=results, measure=measure, write_page=write_page)
