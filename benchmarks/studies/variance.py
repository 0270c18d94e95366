"""What lowers the deviation between policies of one method without reading the environment, on the six published tasks.

    python -m benchmarks.studies.variance             # makes the rows that are missing, then fills docs/results.md
    python -m benchmarks.studies.variance --tables    # fills the table, no more

A row of results/variance.jsonl is a task, a kind of distillation and a seed. "any": the defaults, a new θ_0 every step.
"fixed": one θ_0, for which the set is distilled and from which its one policy is cloned, 64 units wide. "fixed-wide":
the same with 128 units, in three times the seconds. "four": the hypergradients of four θ_0 averaged, in a quarter of
the steps. Of "any" and "four" ten policies are cloned, and their mean action is run too; every policy has its loss H on
the held-out states. One thread a process; give several processes different tasks by --only.

The rule, written before the first row: a kind is better than one policy of "any" if its difference, seed by seed over
the six tasks, is on average more than two standard errors above zero. "fixed-wide" came later, after a run of it with
Av-PBC on halfcheetah/medium that returned more than any before.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import report, tasks, work
from benchmarks.studies.cells import PUBLISHED
from sdw_fast import DistillConfig, Distiller, MLPPolicy
from sdw_fast.run import new_distiller, run

TABLE = table.RESULTS / "variance.jsonl"
SETTINGS: dict[str, Any] = {"objective": "sdw", "size": 256, "steps": 1_000, "k": 100, "ess": 0.8}
KINDS = ("any", "fixed", "fixed-wide", "four")
COLUMNS = {  # one policy of a kind; of "any" also the one of ten with the lowest loss, and the ensemble of the ten
    "any": "any θ_0",
    "fixed": "one θ_0",
    "fixed-wide": "one θ_0, 128 units",
    "four": "four θ_0 a step",
    "lowest": "lowest held-out loss of ten",
    "ensemble": "ensemble of ten",
}
SEEDS = range(5)
POLICIES, EPISODES = 10, 10
EPISODES_OF_ONE = 30  # of an ensemble, or of the one policy of a set

Case = tuple[int, str, str]  # seed, task, kind


def config(case: Case) -> DistillConfig:
    """What a case's set is distilled with."""
    seed, _, kind = case
    own: dict[str, dict[str, Any]] = {
        "any": {},
        "fixed": {"fixed_initialization": seed},
        "fixed-wide": {"fixed_initialization": seed, "inner_width": 128},
        "four": {"initializations": 4, "steps": SETTINGS["steps"] // 4},
    }
    return DistillConfig(**{**SETTINGS, **own[kind], "seed": seed})


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    return table.latest(table.read(TABLE, SETTINGS), "seed", "task", "kind")


def cases() -> list[Case]:
    every = [(seed, task, kind) for seed in SEEDS for task in PUBLISHED for kind in KINDS]
    return sorted(every, key=lambda case: case[2] == "four")


def measure(case: Case) -> None:
    """Distills one set, and runs policies cloned on it."""
    seed, task, kind = case
    began, data, chosen = time.process_time(), tasks.dataset(task), config(case)
    distiller = new_distiller(data, tasks.teacher(task), chosen)
    (synthetic,) = run(distiller, progress=False)
    if chosen.fixed_initialization is not None:
        policies, episodes = [sdw.behavior_clone(synthetic)], EPISODES_OF_ONE
    else:
        policies, episodes = list(work.clones(synthetic, POLICIES)), EPISODES
    row: dict[str, Any] = {"task": task, "kind": kind, "seed": seed}
    row["policies"] = work.mean_returns(policies, data, episodes)
    row["losses"] = [float(f"{held_out_loss(policy, distiller):.4g}") for policy in policies]
    if chosen.fixed_initialization is None:
        ensemble = work.ensemble(synthetic, POLICIES)
        row["ensemble"] = work.mean_returns([ensemble], data, EPISODES_OF_ONE)[0]
    work.record(TABLE, row, SETTINGS, began)


def held_out_loss(policy: MLPPolicy, distiller: Distiller) -> float:
    """H of a policy on the states that no outer step draws."""
    problem, rows = distiller.problem, distiller.held_out
    with torch.no_grad():
        actions = problem.units.require_actions().normalize(
            policy(torch.from_numpy(problem.observations[rows])).numpy()
        )
    errors = np.square(actions - problem.targets[rows]).mean(1)
    return float(np.mean(problem.weights[rows] * errors))


def ranking(row: table.Entries) -> float:
    """Rank correlation of a set's policies: low held-out loss with high return (Spearman)."""
    ranks = [np.argsort(np.argsort(values)) for values in (np.negative(row["losses"]), row["policies"])]
    return float(np.corrcoef(*ranks)[0, 1])


def returns(found: dict[Case, table.Entries], task: str) -> dict[str, dict[int, float]]:
    """The return of each seed: one policy of a kind, on average or the one of lowest loss, or the ensemble."""
    every: dict[str, dict[int, float]] = {column: {} for column in COLUMNS}
    every |= {kind: report.of_each_seed(found, SEEDS, task, kind) for kind in KINDS}
    for seed in SEEDS:
        if row := found.get((seed, task, "any")):
            every["lowest"][seed] = row["policies"][int(np.argmin(row["losses"]))]
            every["ensemble"][seed] = row["ensemble"]
    return every


def results_table(found: dict[Case, table.Entries]) -> str:
    """Means over the seeds ± standard error; last, over all tasks, the difference from "any", seed by seed."""
    lines, differences = [], {column: list[float]() for column in COLUMNS}
    for task in PUBLISHED:
        every = returns(found, task)
        for column, of in every.items():
            differences[column] += report.seed_by_seed(of, every["any"])
        lines.append([task, *(report.mean_and_error(list(of.values()), len(SEEDS)) for of in every.values())])
    expected = len(SEEDS) * len(PUBLISHED)
    last = [report.mean_and_error(of, expected) for column, of in differences.items() if column != "any"]
    return report.markdown(["task", *COLUMNS.values()], [*lines, ["all, minus the first", "", *last]])


def deviations_table(found: dict[Case, table.Entries]) -> str:
    """Standard deviation of one policy of one set, over sets and policies, and how well the loss ranks policies."""
    lines = []
    for task in PUBLISHED:
        rows = report.rows_of(found, SEEDS, task, "any")
        every = returns(found, task)
        samples = [np.concatenate([row["policies"] for row in rows]) if rows else np.array([])]
        samples += [np.array(list(every[column].values())) for column in ("fixed", "fixed-wide", "lowest", "ensemble")]
        deviations = [report.deviation(values) for values in samples]
        lines.append([task, *deviations, report.mean_and_error([ranking(row) for row in rows], len(SEEDS))])
    columns = ["one of any", "one θ_0", "one θ_0, 128 units", "lowest loss of ten", "ensemble of ten"]
    return report.markdown(["task", *columns, "rank correlation"], lines)


def write_page(page: Path = report.PAGE) -> None:
    """Fills the study's tables."""
    found = results()
    report.fill("variance", results_table(found), page)
    report.fill("deviations", deviations_table(found), page)


if __name__ == "__main__":
    work.study(__doc__, cases(), results=results, measure=measure, write_page=write_page)
