"""Where density weights win: SDW minus Av-PBC over the number of episodes and the share of expert data.

    python -m benchmarks.studies.density_map             # makes the rows that are missing, then fills docs/results.md
    python -m benchmarks.studies.density_map --tables    # fills the table, no more

The data are episodes of <env>/medium-expert, drawn anew by each seed, in that dataset's normalization and with its
teacher: few or many of them, and none, half or all of them an expert's. A row of results/density_map.jsonl is an
environment, a share, a number of episodes, an objective and a seed; it holds the returns of ten policies and of their
ensemble, their mean squared distance from the teacher's actions on the data, and how diverse the data are. One thread a
process; give several processes different environments by --only.

Predictions, written before the first row. The paper (arXiv 2512.06692): SDW leads by 2.5 to 5.9 points where the data
are of little diversity, so with few episodes and with one policy's data (none or all of an expert's). Ours, from the
suite, where the lead went as the error did: a lead of more than two standard errors at 3 or 10 episodes of hopper at
most, and none at 30 and all. A lead counts where the mean difference, seed by seed, is more than two standard errors
above zero.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import report, tasks, work
from sdw_fast import TransitionDataset, diversity

TABLE = table.RESULTS / "density_map.jsonl"
ENVS = ("hopper", "halfcheetah")
SHARES = (0.0, 0.5, 1.0)  # of the episodes, an expert's
EPISODES_OF_DATA = (3, 10, 30, 0)  # 0: all that there are
OBJECTIVES = {"av-pbc": "Av-PBC", "sdw": "SDW"}
SETTINGS: dict[str, Any] = {"size": 256, "steps": 500, "k": 10, "ess": 0.8}
SEEDS = range(5)
POLICIES, EPISODES = 10, 5
EPISODES_OF_ENSEMBLE = 20

Point = tuple[str, float, int]  # environment, share of expert episodes, episodes
Case = tuple[int, Point, str]  # seed, point, objective


def data_of(point: Point, seed: int) -> TransitionDataset:
    """The episodes of a point that a seed draws: the first half of the dataset is medium, the second an expert's."""
    env, share, episodes = point
    full = tasks.dataset(f"{env}/medium-expert")
    ends = full.episode_ends
    starts = np.concatenate([[0], ends[:-1] + 1])
    expert = starts >= len(full) // 2
    rng = np.random.default_rng([seed, episodes])
    chosen = np.zeros(len(ends), dtype=bool)
    for of_expert, wanted in ((True, share), (False, 1 - share)):
        candidates = np.flatnonzero(expert == of_expert)
        count = round(wanted * episodes) if episodes else round(np.ceil(wanted) * len(candidates))
        chosen[rng.choice(candidates, count, replace=False)] = True
    rows = [np.arange(start, end + 1) for start, end in zip(starts[chosen], ends[chosen], strict=True)]
    return full.subset(np.concatenate(rows))


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    rows = table.read(TABLE, SETTINGS)
    return {(row["seed"], (row["env"], row["share"], row["episodes"]), row["objective"]): row for row in rows}


def points(env: str) -> list[Point]:
    return [(env, share, episodes) for share in SHARES for episodes in EPISODES_OF_DATA]


def cases() -> list[Case]:
    return [(seed, point, of) for env in ENVS for seed in SEEDS for point in points(env) for of in OBJECTIVES]


def measure(case: Case) -> None:
    """Distills one set from a point's data, and runs policies cloned on it."""
    seed, (env, share, episodes), objective = case
    began, data = time.process_time(), data_of((env, share, episodes), seed)
    teacher = tasks.teacher(f"{env}/medium-expert")
    synthetic = sdw.distill(data, teacher, objective=objective, seed=seed, progress=False, **SETTINGS)
    policies = list(work.clones(synthetic, POLICIES))
    ensemble = work.ensemble(synthetic, POLICIES)
    spread = diversity.diversity(data)
    row: dict[str, Any] = {"env": env, "share": share, "episodes": episodes, "objective": objective, "seed": seed}
    row["policies"] = work.mean_returns(policies, data, EPISODES)
    row["ensemble"] = work.mean_returns([ensemble], data, EPISODES_OF_ENSEMBLE)[0]
    targets, _ = teacher.label(data.observations, data.units, values=False)
    row["error"] = float(f"{work.errors(policies, data, targets).mean():.4g}")
    row["coverage"] = round(diversity.coverage(tasks.dataset(f"{env}/medium-expert"), data), 4)
    row["states"] = len(data)
    row["participation_ratio"] = round(spread.participation_ratio, 3)
    row["intrinsic_dimension"] = round(spread.intrinsic_dimension, 3)
    work.record(TABLE, row, SETTINGS, began)


def results_table(found: dict[Case, table.Entries]) -> str:
    """A line a point: returns, the lead seed by seed ± standard error, and the data's diversity; then their means."""
    lines = []
    for env in ENVS:
        every = [leads(found, point) for point in points(env)]
        for (_, share, episodes), of in zip(points(env), every, strict=True):
            figures = (report.mean_and_error(list(x.values()), len(SEEDS)) for x in (of.av_pbc, of.single, of.ensemble))
            lines.append([env, f"{share:.0%}", str(episodes or "all"), *figures, *of.diversity])
        means = (over_points([of.single for of in every]), over_points([of.ensemble for of in every]))
        lines.append([env, "mean", "", "", *means, "", "", ""])
    header = ["", "expert", "episodes", "Av-PBC", "SDW − Av-PBC", "of ensembles", "error", "coverage", "axes"]
    return report.markdown(header, lines)


class Leads(NamedTuple):
    """Of a point by the seeds that have both objectives: Av-PBC's return, and what SDW returns more."""

    av_pbc: dict[int, float]
    single: dict[int, float]
    ensemble: dict[int, float]
    diversity: list[str]


def leads(found: dict[Case, table.Entries], point: Point) -> Leads:
    pairs = {seed: [found.get((seed, point, of)) for of in OBJECTIVES] for seed in SEEDS}
    both = {seed: (plain, weighted) for seed, (plain, weighted) in pairs.items() if plain and weighted}
    av_pbc = {seed: float(np.mean(plain["policies"])) for seed, (plain, _) in both.items()}
    diversity = []
    for name, digits in (("error", 4), ("coverage", 2), ("participation_ratio", 1)):
        values = [plain[name] for plain, _ in both.values()]
        diversity.append(f"{np.mean(values):.{digits}f}" if values else "missing")
    return Leads(
        av_pbc,
        {seed: float(np.mean(weighted["policies"])) - av_pbc[seed] for seed, (_, weighted) in both.items()},
        {seed: weighted["ensemble"] - plain["ensemble"] for seed, (plain, weighted) in both.items()},
        diversity,
    )


def over_points(of_points: Sequence[dict[int, float]]) -> str:
    """Mean over the points, of each seed that has all of them; then over the seeds ± standard error."""
    seeds = set.intersection(*map(set, of_points))
    return report.mean_and_error([float(np.mean([of[seed] for of in of_points])) for seed in sorted(seeds)], len(SEEDS))


def write_page(page: Path = report.PAGE) -> None:
    """Fills the study's table."""
    report.fill("density map", results_table(results()), page)


if __name__ == "__main__":
    work.study(__doc__, cases(), results=results, measure=measure, write_page=write_page)
