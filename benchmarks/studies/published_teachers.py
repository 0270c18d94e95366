"""Sets by teachers that the authors of the papers publish, beside sets by ours, on the same data.

    python -m benchmarks.studies.published_teachers FOLDER HISTORIES   # makes the rows that are missing, fills the page
    python -m benchmarks.studies.published_teachers --tables           # fills the table, no more

FOLDER holds `calql-<env>-<quality>-v2.pt`, Cal-QL in CORL's format, and `normalization.json`, by "<env>-<quality>-v2"
the mean and std of the states that they were trained on: D4RL's. HISTORIES is the folder of `histories`. Neither is in
the repository. The data are ours: the suite's, and for medium-replay a learner's history. Ours are IQL teachers, whose
sets `variance` distilled ("any"), and for medium-replay the learner, of `histories`; the settings are the same.

A row of results/published_teachers.jsonl is a task, an objective and a seed; the teacher has a row too. One thread a
process; give several processes different tasks by --only.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import cells, histories, report, tasks, variance, work
from benchmarks.studies.suite import PUBLISHED_AV_PBC, PUBLISHED_HIGHEST

TABLE = table.RESULTS / "published_teachers.jsonl"
TASKS = ("halfcheetah/medium", "walker2d/medium-expert", "hopper/medium-replay")
SETTINGS: dict[str, Any] = {"size": 256, "steps": 1_000, "k": 100, "ess": 0.8}
OBJECTIVES = ("av-pbc", "sdw")
SEEDS = range(5)
POLICIES, EPISODES = 10, 10
EPISODES_OF_ONE = 30  # of the teacher and of an ensemble

Case = tuple[int, str, str]  # seed, task, method


def teacher(folder: Path, task: str) -> sdw.Teacher:
    """The published teacher of a task."""
    name = f"{task.replace('/', '-')}-v2"
    seen = json.loads((folder / "normalization.json").read_text())[name]
    return sdw.Teacher.from_corl(folder / f"calql-{name}.pt", mean=seen["mean"], std=seen["std"])


def ours(task: str, of_histories: Path) -> tuple[sdw.TransitionDataset, sdw.Teacher]:
    """Our dataset and our teacher of a task."""
    if task in histories.TASKS:
        return histories.of_task(of_histories, task)
    return tasks.dataset(task), tasks.teacher(task)


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    return table.latest(table.read(TABLE, SETTINGS), "seed", "task", "method")


def cases() -> list[Case]:
    teachers = [(SEEDS[0], task, "teacher") for task in TASKS]
    return teachers + [(seed, task, objective) for seed in SEEDS for task in TASKS for objective in OBJECTIVES]


def measure(case: Case, folder: Path, of_histories: Path) -> None:
    """Distills one set, and runs policies cloned on it; or the teacher."""
    seed, task, method = case
    began = time.process_time()
    (data, own), published = ours(task, of_histories), teacher(folder, task)
    row: dict[str, Any] = {"task": task, "method": method, "seed": seed}
    if method == "teacher":
        row["policies"] = work.mean_returns([published.actions], data, EPISODES_OF_ONE)
        row["agreements"] = [agreement(one, data) for one in (published, own)]
    else:
        synthetic = sdw.distill(data, published, objective=method, seed=seed, progress=False, **SETTINGS)
        row |= work.returns_of_set(synthetic, data, policies=POLICIES, episodes=EPISODES, of_ensemble=EPISODES_OF_ONE)
    work.record(TABLE, row, SETTINGS, began)


def agreement(of: sdw.Teacher, data: sdw.TransitionDataset) -> float:
    """R² of a teacher's actions for the data's, where the data are good."""
    return round(sdw.outer_problem(data, of, sdw.DistillConfig(objective="pbc")).report["teacher_agreement"], 3)


def rows_of_ours(task: str) -> list[table.Entries]:
    """The rows of the sets that our teacher gave by SDW with the same settings, a seed each."""
    if task in histories.TASKS:
        return [row for (_, of, method), row in histories.results().items() if (of, method) == (task, "sdw")]
    return [row for (_, of, kind), row in variance.results().items() if (of, kind) == (task, "any")]


def results_table(found: dict[Case, table.Entries]) -> str:
    """Means over the seeds ± standard error, of single policies and of ensembles, beside those of our teachers."""
    lines = []
    for task in TASKS:
        row = found.get((SEEDS[0], task, "teacher"))
        line = [task, *["missing"] * 3]
        if row:
            line[1:] = [f"{row['policies'][0]:.1f}", *(f"{value:.2f}" for value in row["agreements"])]
        for objective in OBJECTIVES:
            rows = report.rows_of(found, SEEDS, task, objective)
            line += report.policy_and_ensemble(rows, len(SEEDS))
        line += report.policy_and_ensemble(rows_of_ours(task), len(SEEDS))
        lines.append([*line, f"{PUBLISHED_AV_PBC[task]:.1f}", f"{PUBLISHED_HIGHEST[task]:.1f}"])
    columns = report.of_methods([*(cells.METHODS[objective] for objective in OBJECTIVES), "SDW by our teacher"])
    header = ["task", "teacher", "its R²", "our teacher's", *columns, "published Av-PBC", "highest published"]
    return report.markdown(header, lines)


def write_page(page: Path = report.PAGE) -> None:
    """Fills the study's table."""
    report.fill("published teachers", results_table(results()), page)


if __name__ == "__main__":
    work.study(
        __doc__, cases(), results=results, measure=measure, write_page=write_page, folders=["folder", "histories"]
    )
