"""The README's table: single policies and ensembles of ten, by `preset="published"`, on the six published tasks.

    python -m benchmarks.studies.published_preset             # makes the rows that are missing, then fills the tables
    python -m benchmarks.studies.published_preset --tables    # fills those of README.md and docs/results.md, no more

A row of results/published_preset.jsonl is a task, an objective and a seed: one set of 2,000 outer steps, ten policies
cloned on it, and their mean action. One thread a process; give several processes different tasks by --only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import cells, report, tasks, work
from benchmarks.studies.cells import PUBLISHED
from benchmarks.studies.suite import PUBLISHED_HIGHEST

TABLE = table.RESULTS / "published_preset.jsonl"
PRESET = "published"
SETTINGS: dict[str, Any] = {"steps": 2_000}
OBJECTIVES = ("sdw", "av-pbc")
SEEDS = range(5)
POLICIES, EPISODES = 10, 10
EPISODES_OF_ONE = 30  # of an ensemble

Case = tuple[int, str, str]  # seed, task, objective


def settings() -> dict[str, Any]:
    """Of a row: every setting that the preset stands for."""
    chosen = sdw.DistillConfig.preset(PRESET, **SETTINGS).to_dict()
    return {name: value for name, value in chosen.items() if name not in ("objective", "seed")}


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    return table.latest(table.read(TABLE, settings()), "seed", "task", "objective")


def cases() -> list[Case]:
    return [(seed, task, objective) for objective in OBJECTIVES for seed in SEEDS for task in PUBLISHED]


def measure(case: Case) -> None:
    """Distills one set, and runs policies cloned on it."""
    seed, task, objective = case
    began, data = time.process_time(), tasks.dataset(task)
    teacher = tasks.teacher(task)
    chosen = {**SETTINGS, "objective": objective, "seed": seed}
    synthetic = sdw.distill(data, teacher, preset=PRESET, progress=False, **chosen)
    row: dict[str, Any] = {"task": task, "objective": objective, "seed": seed}
    row |= work.returns_of_set(synthetic, data, policies=POLICIES, episodes=EPISODES, of_ensemble=EPISODES_OF_ONE)
    work.record(TABLE, row, settings(), began)


def results_table(found: dict[Case, table.Entries], objectives: Sequence[str]) -> str:
    """Means over the seeds ± standard error, beside what was published."""
    lines = []
    for task, published in PUBLISHED.items():
        line = [task]
        for objective in objectives:
            rows = [found[seed, task, objective] for seed in SEEDS if (seed, task, objective) in found]
            line += report.policy_and_ensemble(rows, len(SEEDS))
        lines.append([*line, f"{published:.1f}", f"{PUBLISHED_HIGHEST[task]:.1f}"])
    columns = report.of_methods(cells.METHODS[objective] for objective in objectives)
    return report.markdown(["task", *columns, "published SDW", "highest published"], lines)


def write_page() -> None:
    """Fills the tables of the README and of the page."""
    found = results()
    report.fill("returns", results_table(found, OBJECTIVES[:1]), table.ROOT / "README.md")
    report.fill("published preset", results_table(found, OBJECTIVES))


if __name__ == "__main__":
    work.study(__doc__, cases(), results=results, measure=measure, write_page=write_page)
