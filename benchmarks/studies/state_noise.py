"""What noise on the states gives: Av-PBC and SDW with it, beside the defaults, on the six published tasks.

    python -m benchmarks.studies.state_noise             # makes the rows that are missing, then fills docs/results.md
    python -m benchmarks.studies.state_noise --tables    # fills the table, no more

A row of results/state_noise.jsonl is a task, a method and a seed: one set of 2,000 outer steps, ten policies cloned on
it, and their mean action; all settings that METHODS does not name are the defaults. The defaults themselves are rows of
`benchmarks.studies.presets`. One thread a process; give several processes different tasks by --only.

The deviation of 1 came from walker2d/medium-expert: of 0, 0.3, 0.5, 1 and 2 the one whose set returned most, one set
each, by PBC and the teacher at D4RL's size.

The rule, written before the first row: a method is better than the defaults if its difference, seed by seed over the
six tasks, is on average more than two standard errors above zero. Predicted: Av-PBC is, and most of all on
walker2d/medium-expert; SDW less, for rare states count twice; on the HalfCheetahs, whose episodes do not end by a fall,
neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import presets, report, work
from benchmarks.studies.cells import PUBLISHED
from benchmarks.studies.suite import PUBLISHED_HIGHEST

TABLE = table.RESULTS / "state_noise.jsonl"
METHODS: dict[str, dict[str, Any]] = {
    "av-pbc": {"objective": "av-pbc", "state_noise": 1.0},
    "sdw": {"objective": "sdw", "state_noise": 1.0},
}
NAMES = {"default": "default", "av-pbc": "Av-PBC, noise", "sdw": "SDW, noise"}
SEEDS = presets.SEEDS

Case = tuple[int, str, str]  # seed, task, method


def config(case: Case) -> sdw.DistillConfig:
    """What a case's set is distilled with."""
    seed, _, method = case
    return sdw.DistillConfig(**presets.SETTINGS, **METHODS[method], seed=seed)


def cases() -> list[Case]:
    return [(seed, task, method) for method in METHODS for seed in SEEDS for task in PUBLISHED]


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    return presets.results_in(TABLE, {case: config(case) for case in cases()})


def measure(case: Case) -> None:
    """Distills one set, and runs policies cloned on it."""
    presets.measure_into(TABLE, case, config(case))


def results_table(found: dict[Case, table.Entries]) -> str:
    """Means over the seeds ± standard error; last, over all tasks, the difference from the defaults, seed by seed."""
    lines, differences = [], {method: list[float]() for method in METHODS}
    for task in PUBLISHED:
        line = [task]
        for method in NAMES:
            line += report.policy_and_ensemble(report.rows_of(found, SEEDS, task, method), len(SEEDS))
        for method, of in differences.items():
            gains = gained(found, task, method)
            of += gains
            line.append(report.mean_and_error(gains, len(SEEDS)))
        lines.append([*line, f"{PUBLISHED_HIGHEST[task]:.1f}"])
    last = [report.mean_and_error(of, len(SEEDS) * len(PUBLISHED)) for of in differences.values()]
    lines.append(["all", *[""] * 2 * len(NAMES), *last, ""])
    header = ["task", *report.of_methods(NAMES.values())]
    header += [f"{NAMES[method]} − default, one policy" for method in METHODS]
    return report.markdown([*header, "highest published"], lines)


def gained(found: dict[Case, table.Entries], task: str, method: str) -> list[float]:
    """A method's single policies minus the defaults', of every seed that has both."""
    return report.seed_by_seed(*(report.of_each_seed(found, SEEDS, task, name) for name in (method, "default")))


def deviations_table(found: dict[Case, table.Entries]) -> str:
    """Standard deviation of one policy of one set, over sets and policies."""
    lines = []
    for task in PUBLISHED:
        every = (report.rows_of(found, SEEDS, task, method) for method in NAMES)
        lines.append([task, *(report.deviation([x for row in rows for x in row["policies"]]) for rows in every)])
    return report.markdown(["task", *NAMES.values()], lines)


def write_page(page: Path = report.PAGE) -> None:
    """Fills the study's tables."""
    found = presets.results() | results()
    report.fill("state noise", results_table(found), page)
    report.fill("state noise, deviations", deviations_table(found), page)


if __name__ == "__main__":
    work.study(__doc__, cases(), results=results, measure=measure, write_page=write_page)
