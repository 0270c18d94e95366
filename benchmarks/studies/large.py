"""At D4RL's size: teachers trained long on a million transitions or two, and the sets that are distilled with them.

    python -m benchmarks.studies.large             # makes the rows that are missing, then fills docs/results.md
    python -m benchmarks.studies.large --tables    # fills the tables, no more

The datasets are the suite's, ten or twenty times as long. They would have the names of the short ones: set
MINARI_DATASETS_PATH to a folder of their own. A teacher is IQL with the authors' settings for locomotion; nothing was
chosen by returns. It takes one to two hours of one core, goes on in runs/large where it was stopped, and is kept in
benchmarks/teachers in half precision. A row of results/large.jsonl is a task, a method and a seed; the teacher has a
row too. One thread a process; give several processes different tasks by --only.

The methods of stronger density weights came after a first look at one seed of walker2d/medium-expert, whose sets are
poor. The rule, written before any of their rows: an effective sample size is better than that of SETTINGS on a task
where it returns, seed by seed, more than two standard errors above it, single policies, five seeds. The same rule,
written before its first row, for 128 units unrolled, in three times the seconds: it came after the errors of policies
by PBC, which are two to three times those of policies by the suite's teacher on hopper/medium. Predicted before any row
of walker2d's: more by this rule on medium-expert, where sets err most; ensembles above the highest published on medium,
not on medium-expert.

The methods without value weights came after the leads on walker2d/medium-expert and hopper/medium, to see what these
owe to. Predicted before any of their rows: PBC is level with Av-PBC, and density weights alone, on PBC, lead as they do
in SDW; for the value weights by these teachers are nearly equal.

The method with noise on the states came after one set each of PBC with the teacher of walker2d/medium-expert, see
`benchmarks.studies.state_noise`. Predicted before any of its rows: it leads Av-PBC by more than two standard errors on
walker2d/medium-expert and hopper/medium, and is level with it on halfcheetah/medium.

Predicted before any row of the last three tasks: SDW leads on hopper/medium-expert by more than two standard errors, on
neither HalfCheetah, whose episodes do not end by a fall.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import cells, report, work
from benchmarks.studies.suite import PUBLISHED_HIGHEST
from sdw_fast.density import effective_sample_size
from sdw_fast.objectives import value_weights

TABLE = table.RESULTS / "large.jsonl"
TRANSITIONS = {"medium": 1_000_000, "medium-expert": 2_000_000}
TASKS = [f"{env}/{quality}" for env in ("walker2d", "hopper", "halfcheetah") for quality in TRANSITIONS]
# Kostrikov et al. 2022; the rest as `sdw.train_teacher` has it.
TEACHER: dict[str, Any] = {"algorithm": "iql", "steps": 200_000, "expectile": 0.7, "temperature": 3.0, "seed": 0}
SETTINGS: dict[str, Any] = {"size": 256, "steps": 2_000, "k": 100, "ess": 0.8}
OBJECTIVES = ("av-pbc", "sdw")
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"sdw,ess={ess}": {"objective": "sdw", "ess": ess} for ess in (0.4, 0.2)},
    "sdw,inner_width=128": {"objective": "sdw", "inner_width": 128},
}
WITHOUT_VALUES: dict[str, dict[str, Any]] = {
    "pbc": {"objective": "pbc"},
    "pbc,density": {"objective": "pbc", "density": True},
}
WITH_NOISE: dict[str, dict[str, Any]] = {"av-pbc,state_noise=1": {"objective": "av-pbc", "state_noise": 1.0}}
METHODS: dict[str, dict[str, Any]] = {
    **{method: {"objective": method} for method in OBJECTIVES},
    **VARIANTS,
    **WITHOUT_VALUES,
    **WITH_NOISE,
}
# Of the methods in the tables that compare them.
NAMES = {method: cells.METHODS[method] for method in ("pbc", *OBJECTIVES)}
NAMES |= {"pbc,density": "PBC, density weights", **dict.fromkeys(WITH_NOISE, "Av-PBC, noise")}
SEEDS = range(5)
POLICIES, EPISODES = 10, 10
EPISODES_OF_ONE = 30  # of the teacher and of an ensemble
EPISODES_LOOKED_AT = 200  # at most, of the data, for the errors
TENTHS = 10  # of the data by density
# D4RL-normalized, the last scores of CORL's IQL on D4RL v2.
CORL = {
    "halfcheetah/medium": 48,
    "halfcheetah/medium-expert": 95,
    "hopper/medium": 68,
    "hopper/medium-expert": 107,
    "walker2d/medium": 81,
    "walker2d/medium-expert": 112,
}
DISCOUNT, HORIZON = 0.99, 500  # steps after which a reward counts less than a hundredth

Case = tuple[int, str, str]  # seed, task, method


def dataset(task: str) -> sdw.TransitionDataset:
    """The dataset of a task at D4RL's size, collected if it is not there."""
    sdw.collect(task, steps=TRANSITIONS[task.partition("/")[2]], seed=0, progress=False)
    return sdw.load_dataset(task)


def teacher(task: str) -> sdw.Teacher:
    """The teacher of a task, trained if it is not there."""
    name = f"{task.replace('/', '-')}-large.safetensors"
    path = table.ROOT / "benchmarks/teachers" / name
    if not path.exists():
        trained = table.ROOT / "runs/large" / name
        trained.parent.mkdir(parents=True, exist_ok=True)
        sdw.train_teacher(dataset(task), out=trained, **TEACHER).save(path, half=True)
    return sdw.Teacher.load(path)


def settings() -> dict[str, Any]:
    """Of a row."""
    return {**SETTINGS, "teacher": TEACHER}


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    return table.latest(table.read(TABLE, settings()), "seed", "task", "method")


def cases() -> list[Case]:
    teachers = [(SEEDS[0], task, "teacher") for task in TASKS]
    return teachers + [(seed, task, method) for seed in SEEDS for task in TASKS for method in METHODS]


def measure(case: Case) -> None:
    """Distills one set, and runs policies cloned on it; or the teacher."""
    seed, task, method = case
    data, trained = dataset(task), teacher(task)
    began = time.process_time()
    row: dict[str, Any] = {"task": task, "method": method, "seed": seed}
    if method == "teacher":
        row["policies"] = work.mean_returns([trained.actions], data, EPISODES_OF_ONE)
        row["correlation"] = round(correlation(data, trained), 3)
        row["value_ess"] = round(value_ess(data, trained), 3)
        row["mean_of_data"] = round(data.summary()["normalized_return_mean"], 2)
    else:
        synthetic = sdw.distill(data, trained, seed=seed, progress=False, **{**SETTINGS, **METHODS[method]})
        row |= work.returns_of_set(synthetic, data, policies=POLICIES, episodes=EPISODES, of_ensemble=EPISODES_OF_ONE)
        row |= errors(synthetic, data, trained)
    work.record(TABLE, row, settings(), began)


def value_ess(data: sdw.TransitionDataset, trained: sdw.Teacher) -> float:
    """Effective sample size of the value weights, a share of the states."""
    _, values = trained.label(data.observations, data.units, values=True)
    assert values is not None
    return float(effective_sample_size(value_weights(values)))


def errors(
    synthetic: sdw.SyntheticDataset, data: sdw.TransitionDataset, trained: sdw.Teacher
) -> dict[str, list[float]]:
    """Squared distance of policies cloned on a set from the teacher's actions, by where the states are.

    "errors" are along an episode, a number a stage; "errors_by_density" a number for each tenth of the data's states,
    the rarest first.
    """
    episodes = np.split(np.arange(len(data)), data.episode_ends[:-1] + 1)
    step = math.ceil(len(episodes) / EPISODES_LOOKED_AT)  # over all of the data, whose second half may be an expert's
    rows = np.concatenate(episodes[::step])
    some = data.subset(rows)
    targets, _ = trained.label(some.observations, data.units, values=False)
    squared = work.errors(work.clones(synthetic, POLICIES), some, targets)
    densities = sdw.log_density(data, k=SETTINGS["k"])
    tenths = np.searchsorted(np.quantile(densities, np.arange(1, TENTHS) / TENTHS), densities[rows], side="right")
    every = {
        "errors": work.mean_of_stages(squared, some),
        "errors_by_density": work.group_means(squared, tenths, TENTHS),
    }
    return {name: [float(f"{error:.4g}") for error in of] for name, of in every.items()}


def correlation(data: sdw.TransitionDataset, trained: sdw.Teacher) -> float:
    """Of Q on the data's own pairs with the discounted return that followed, where all of it that counts was seen."""
    following, known = returns_to_go(data.require_rewards(), data.terminations, data.episode_ends)
    values = trained.values(data.observations[known], data.actions[known])
    return float(np.corrcoef(values, following[known])[0, 1])


def returns_to_go(
    rewards: np.ndarray, terminations: np.ndarray, episode_ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Discounted return from each row on, (M,); and where it is known, for the episode terminates or goes on long."""
    following, known = np.zeros(len(rewards)), np.ones(len(rewards), bool)
    start = 0
    for end in episode_ends.tolist():
        rest = 0.0
        for row in range(end, start - 1, -1):
            rest = float(rewards[row]) + DISCOUNT * rest
            following[row] = rest
        if not terminations[end]:
            known[max(start, end + 1 - HORIZON) : end + 1] = False
        start = end + 1
    return following, known


def results_table(found: dict[Case, table.Entries]) -> str:
    """Means over the seeds ± standard error: single policies, ensembles and SDW's lead, beside the teacher's return."""
    lines = []
    for task in TASKS:
        row = found.get((SEEDS[0], task, "teacher"))
        line = [task, *["missing"] * 3]
        if row:
            line[1:] = [f"{row['mean_of_data']:.1f}", f"{row['correlation']:.2f}", f"{row['policies'][0]:.1f}"]
        line.append(str(CORL[task]))
        for method in OBJECTIVES:
            rows = report.rows_of(found, SEEDS, task, method)
            line += report.policy_and_ensemble(rows, len(SEEDS))
        line.append(report.mean_and_error(leads(found, task, "sdw", "av-pbc"), len(SEEDS)))
        lines.append([*line, f"{PUBLISHED_HIGHEST[task]:.1f}"])
    columns = report.of_methods(cells.METHODS[method] for method in OBJECTIVES)
    header = ["task", "the data's mean", "correlation of Q", "teacher", "CORL's IQL"]
    header += [*columns, "SDW − Av-PBC, one policy", "highest published"]
    return report.markdown(header, lines)


def variants_table(found: dict[Case, table.Entries]) -> str:
    """SDW and its variants, a line each, of every task that has rows of a variant."""
    lines = []
    for task in TASKS:
        every = {method: report.rows_of(found, SEEDS, task, method) for method in ("sdw", *VARIANTS)}
        if not any(every[method] for method in VARIANTS):
            continue
        for method, rows in every.items():
            gain = "" if method == "sdw" else report.mean_and_error(leads(found, task, method, "sdw"), len(SEEDS))
            changed = method.removeprefix("sdw").removeprefix(",") or "as above"
            lines.append([task, changed, *report.policy_and_ensemble(rows, len(SEEDS)), gain])
    return report.markdown(["task", "SDW", *report.POLICY_AND_ENSEMBLE, "one policy, minus as above"], lines)


def values_table(found: dict[Case, table.Entries]) -> str:
    """With value weights and without, where a task has rows of both; and what each factor adds, seed by seed."""
    shown = ("pbc", "av-pbc", "pbc,density", "sdw")
    added = (("av-pbc", "pbc"), ("pbc,density", "pbc"), ("sdw", "av-pbc"))
    lines = []
    for task in TASKS:
        every = {method: list(report.of_each_seed(found, SEEDS, task, method).values()) for method in shown}
        if every["pbc"]:
            teacher_row = found.get((SEEDS[0], task, "teacher"), {})
            line = [f"{teacher_row['value_ess']:.2f}" if "value_ess" in teacher_row else "missing"]
            line += [report.mean_and_error(every[method], len(SEEDS)) for method in shown]
            line += [report.mean_and_error(leads(found, task, *pair), len(SEEDS)) for pair in added]
            lines.append([task, *line])
    header = ["effective sample size of the value weights", *(NAMES[method] for method in shown)]
    header += [" − ".join(NAMES[method] for method in pair) for pair in added]
    return report.markdown(["task", *header], lines)


def noise_table(found: dict[Case, table.Entries]) -> str:
    """Av-PBC with noise on the states and without, and SDW, where a task has rows with it; what it adds to both."""
    (noisy,) = WITH_NOISE
    lines = []
    for task in TASKS:
        if rows := report.rows_of(found, SEEDS, task, noisy):
            line = [report.mean_and_error(leads(found, task, noisy, method), len(SEEDS)) for method in OBJECTIVES]
            lines.append([task, *report.policy_and_ensemble(rows, len(SEEDS)), *line])
    header = ["task", *report.of_methods([NAMES[noisy]])]
    return report.markdown([*header, *(f"one policy, minus {NAMES[method]}" for method in OBJECTIVES)], lines)


def errors_table(found: dict[Case, table.Entries]) -> str:
    """Errors along an episode, mean over the seeds, of every task and method that has rows with them."""
    return report.stages_table(mean_errors(found, "errors"), work.STAGES)


def density_table(found: dict[Case, table.Entries]) -> str:
    """The same by density: the rarest tenth of the states, and so on."""
    columns = mean_errors(found, "errors_by_density")
    names = ["rarest tenth", *map(str, range(2, TENTHS)), "densest tenth"]
    lines = [[name, *(f"{values[number]:.3f}" for values in columns.values())] for number, name in enumerate(names)]
    return report.markdown(["states", *columns], lines)


def mean_errors(found: dict[Case, table.Entries], entry: str) -> dict[str, list[float]]:
    """Of every task and method that has rows with that entry, its mean over the seeds; how many, if not all have it."""
    columns = {}
    for task in TASKS:
        for method in NAMES:
            rows = [row for row in report.rows_of(found, SEEDS, task, method) if entry in row]
            if rows:
                number = f" ({len(rows)})" if len(rows) < len(SEEDS) else ""
                columns[f"{task}, {NAMES[method]}{number}"] = np.mean([row[entry] for row in rows], axis=0).tolist()
    return columns


def leads(found: dict[Case, table.Entries], task: str, method: str, rival: str) -> list[float]:
    """A method's single policies minus its rival's, of every seed that has both."""
    return report.seed_by_seed(*(report.of_each_seed(found, SEEDS, task, name) for name in (method, rival)))


def write_page(page: Path = report.PAGE) -> None:
    """Fills the study's tables."""
    found = results()
    report.fill("large", results_table(found), page)
    report.fill("large variants", variants_table(found), page)
    report.fill("large values", values_table(found), page)
    report.fill("large noise", noise_table(found), page)
    report.fill("large errors", errors_table(found), page)
    report.fill("large density", density_table(found), page)


if __name__ == "__main__":
    work.study(__doc__, cases(), results=results, measure=measure, write_page=write_page)
