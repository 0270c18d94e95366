"""What a set of each preset gives on the six published tasks, single policies and ensembles of ten.

    python -m benchmarks.studies.presets             # makes the rows that are missing, then fills the tables
    python -m benchmarks.studies.presets --tables    # fills the tables of docs/results.md and README.md, no more

A row of results/presets.jsonl is a task, a method and a seed: one set of 2,000 outer steps, ten policies cloned on it,
and their mean action. One thread a process; give several processes different tasks by --only.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import cells, report, tasks, work
from benchmarks.studies.cells import PUBLISHED
from benchmarks.studies.suite import PUBLISHED_HIGHEST

TABLE = table.RESULTS / "presets.jsonl"
SETTINGS: dict[str, Any] = {"steps": 2_000}
METHODS: dict[str, dict[str, Any]] = {
    "default": {"name": "default"},
    "published": {"name": "published"},
    "published, Av-PBC": {"name": "published", "objective": "av-pbc"},
}
SEEDS = range(5)
POLICIES, EPISODES = 10, 10
EPISODES_OF_ONE = 30  # of an ensemble

Case = tuple[int, str, str]  # seed, task, method


def config(case: Case) -> sdw.DistillConfig:
    """What a case's set is distilled with."""
    seed, _, method = case
    return sdw.DistillConfig.preset(**{**SETTINGS, **METHODS[method], "seed": seed})


def settings(chosen: sdw.DistillConfig) -> dict[str, Any]:
    """Of a row: all but the seed."""
    return {name: value for name, value in chosen.to_dict().items() if name != "seed"}


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    return results_in(TABLE, {case: config(case) for case in cases()})


def results_in(path: Path, planned: dict[Case, sdw.DistillConfig]) -> dict[Case, table.Entries]:
    """The newest row in a table, with its settings, of every planned case that has one."""
    found = table.latest(table.read(path), "seed", "task", "method")
    return {case: found[case] for case in planned if case in found and made_with(found[case], settings(planned[case]))}


def made_with(row: table.Entries, settings: dict[str, Any]) -> bool:
    """Whether a row has these settings; one that it does not name was not there yet, and is at its default."""
    defaults = sdw.DistillConfig().to_dict()
    return {name: row["settings"].get(name, defaults[name]) for name in settings} == settings


def cases() -> list[Case]:
    return [(seed, task, method) for method in METHODS for seed in SEEDS for task in PUBLISHED]


def measure(case: Case) -> None:
    """Distills one set, and runs policies cloned on it."""
    measure_into(TABLE, case, config(case))


def measure_into(path: Path, case: Case, chosen: sdw.DistillConfig) -> None:
    """The same with these settings, as a row of that table."""
    seed, task, method = case
    began, data = time.process_time(), tasks.dataset(task)
    synthetic = sdw.distill(data, tasks.teacher(task), progress=False, **chosen.to_dict())
    row: dict[str, Any] = {"task": task, "method": method, "seed": seed}
    row |= work.returns_of_set(synthetic, data, policies=POLICIES, episodes=EPISODES, of_ensemble=EPISODES_OF_ONE)
    work.record(path, row, settings(chosen), began)


def results_table(found: dict[Case, table.Entries]) -> str:
    """Means over the seeds ± standard error, beside what was published; and what the ensembles of the defaults gain."""
    lines, every = [], []
    for task, published in PUBLISHED.items():
        figures = [text for method in METHODS for text in returns(found, task, method)]
        gains = [
            row["ensemble"] - float(np.mean(row["policies"])) for row in report.rows_of(found, SEEDS, task, "default")
        ]
        every += gains
        gain = report.mean_and_error(gains, len(SEEDS))
        lines.append([task, *figures, gain, f"{published:.1f}", f"{PUBLISHED_HIGHEST[task]:.1f}"])
    gain = report.mean_and_error(every, len(SEEDS) * len(PUBLISHED))
    lines.append(["all", *[""] * 2 * len(METHODS), gain, "", ""])
    gained = "default, ensemble − one policy"
    header = ["task", *report.of_methods(METHODS), gained, "published SDW", "highest published"]
    return report.markdown(header, lines)


def returns(found: dict[Case, table.Entries], task: str, method: str) -> list[str]:
    """Single policies, and ensembles."""
    return report.policy_and_ensemble(report.rows_of(found, SEEDS, task, method), len(SEEDS))


def readme_table(found: dict[Case, table.Entries]) -> str:
    """The defaults beside `preset="published"`.

    The latter's single policies are the suite's "sdw-mild", which has its settings but for adapt_inner_lr.
    """
    lines, suite = [], cells.results()
    for task, published in PUBLISHED.items():
        mild = cells.seeds_returns(suite, task, "sdw-mild")
        figures = [*returns(found, task, "default"), report.mean_and_error(mild, len(SEEDS))]
        lines.append([task, *figures, f"{published:.1f}", f"{PUBLISHED_HIGHEST[task]:.1f}"])
    header = ["", *report.POLICY_AND_ENSEMBLE, '`preset="published"`, one policy', "published SDW", "highest published"]
    return report.markdown(header, lines)


def write_page(page: Path = report.PAGE, readme: Path = report.README) -> None:
    """Fills the study's tables."""
    report.fill("presets", results_table(results()), page)
    report.fill("returns", readme_table(results()), readme)


if __name__ == "__main__":
    work.study(__doc__, cases(), results=results, measure=measure, write_page=write_page)
