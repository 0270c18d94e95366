"""Real pairs chosen in other ways, as a baseline of distillation: 256 and 1,024 pairs of the six published tasks.

    python -m benchmarks.studies.selection             # makes the rows that are missing, then fills docs/results.md
    python -m benchmarks.studies.selection --tables    # fills the table, no more

Random, k-means++ and top-Q pairs are those of `real_pairs`. "Dual ranking" follows the idea of stepwise dual ranking
(Lei, Cheng, Tao 2025, arXiv 2512.18246) as we read its abstract: early steps give more pairs, and the best
pairs have both a high action value and a low state density. It draws nothing, and has one row. A row of
results/selection.jsonl is a task, a method, a number of pairs and a seed. One thread a process; give several processes
different tasks by --only.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import report, tasks, work
from benchmarks.studies.cells import METHODS, PAIRS, PUBLISHED
from sdw_fast import SyntheticDataset, TransitionDataset

TABLE = table.RESULTS / "selection.jsonl"
DUAL = "dual ranking"
ORDER = (DUAL, *PAIRS)
SIZES = (256, 1_024)
SEEDS = range(3)
POLICIES, EPISODES = 5, 10
STAGE = 50  # steps of an episode
NEIGHBORS = 100

Case = tuple[int, str, str, int]  # seed, task, method, pairs


def dual_ranking(data: TransitionDataset, teacher: sdw.Teacher, size: int) -> SyntheticDataset:
    """The pairs of a high Q(s, a) and a low d(s), more of them from early stages of the episodes.

    A stage of STAGE steps gets pairs in proportion to its rows times the part of the longest episode that is left at
    its start. Its rows are ordered by the sum of two ranks: that of Q, the highest first, and that of d, the lowest
    first.
    """
    values = np.asarray(teacher.values(data.observations, data.actions))
    densities = sdw.log_density(data, k=NEIGHBORS)
    stages = work.steps_into_episode(data) // STAGE
    count = np.bincount(stages)
    shares = count * (1 - np.arange(len(count)) / len(count))
    exact = size * shares / shares.sum()
    quotas = np.floor(exact).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: size - quotas.sum()]] += 1  # the largest remainders
    chosen = [_best(np.flatnonzero(stages == stage), values, densities, quota) for stage, quota in enumerate(quotas)]
    rows = np.concatenate(chosen)
    return SyntheticDataset(data.observations[rows], data.actions[rows], data.units, dataset_name=data.name)


def _best(rows: NDArray[np.int64], values: np.ndarray, densities: np.ndarray, quota: int) -> NDArray[np.int64]:
    """The rows of a stage with the best sum of ranks."""
    ranks = [np.argsort(np.argsort(score, kind="stable")) for score in (-values[rows], densities[rows])]
    return rows[np.argsort(ranks[0] + ranks[1], kind="stable")[:quota]]


def results() -> dict[Case, table.Entries]:
    """The newest row of every case that has one."""
    return table.latest(table.read(TABLE), "seed", "task", "method", "size")


def cases() -> list[Case]:
    every = [(seed, task, method, size) for seed in SEEDS for size in SIZES for task in PUBLISHED for method in ORDER]
    return [case for case in every if case[2] != DUAL or case[0] == SEEDS[0]]


def measure(case: Case) -> None:
    """Chooses pairs, and runs policies cloned on them as on a distilled set."""
    seed, task, method, size = case
    began, data, teacher = time.process_time(), tasks.dataset(task), tasks.teacher(task)
    if method == DUAL:
        pairs = dual_ranking(data, teacher, size)
    else:
        pairs = sdw.real_pairs(data, size, init=method, teacher=teacher, seed=seed)
    policies = work.mean_returns(work.clones(pairs, POLICIES), data, EPISODES)
    row = {"task": task, "method": method, "size": size, "seed": seed, "policies": policies}
    table.append(TABLE, {**row, "cpu_seconds": round(time.process_time() - began, 1), **table.origin()})
    print(row, flush=True)


def results_table(found: dict[Case, table.Entries]) -> str:
    """Means over the seeds ± standard error; of the one row of dual ranking, over its policies."""
    lines = []
    for size in SIZES:
        for task in PUBLISHED:
            line = [task, f"{size:,}"]
            for method in ORDER:
                rows = [found[seed, task, method, size] for seed in SEEDS if (seed, task, method, size) in found]
                if method == DUAL and rows:
                    line.append(report.mean_and_error(rows[0]["policies"], POLICIES))
                else:
                    line.append(report.mean_and_error([float(np.mean(r["policies"])) for r in rows], len(SEEDS)))
            lines.append(line)
    return report.markdown(["task", "pairs", DUAL, *(METHODS[method] for method in PAIRS)], lines)


def write_page(page: Path = report.PAGE) -> None:
    """Fills the study's table."""
    report.fill("selection", results_table(results()), page)


if __name__ == "__main__":
    work.study(__doc__, cases(), results=results, measure=measure, write_page=write_page)
