"""Medium-replay as D4RL means it: sets distilled from everything that a learner saw, and with it as the teacher.

    python -m benchmarks.studies.histories FOLDER      # makes the rows that are missing, then fills docs/results.md
    python -m benchmarks.studies.histories --tables    # fills the table, no more

FOLDER holds, for Hopper, HalfCheetah and Walker2d, `<env>/replay.npz`, a SAC learner's transitions in order
(observations, actions, rewards, terminals, timeouts, and end_observations of the rows end_index), and the learner at
its end, `<env>/replay_learner.pt` (Hopper's: `actor_110000.pt` and the critics of `final.pt`, 90,000 steps later). They
are not in the repository: `sdw-fast collect hopper/medium-replay` trains a learner of its own and keeps what it saw.

A row of results/histories.jsonl is a task, an objective and a seed; the teacher has a row too. One thread a process;
give several processes different tasks by --only.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import cells, report, work
from benchmarks.studies.suite import PUBLISHED_AV_PBC, PUBLISHED_HIGHEST
from sdw_fast.networks import MLP, MinCritic

TABLE = table.RESULTS / "histories.jsonl"
ENVS = {"hopper": "Hopper", "halfcheetah": "HalfCheetah", "walker2d": "Walker2d"}
TASKS = [f"{env}/medium-replay" for env in ENVS]
SETTINGS: dict[str, Any] = {"size": 256, "steps": 1_000, "k": 100, "ess": 0.8}
OWN: dict[str, dict[str, Any]] = {  # settings of each method besides SETTINGS
    "av-pbc": {"objective": "av-pbc"},
    "sdw": {"objective": "sdw"},
    "av-pbc-wide": {"objective": "av-pbc", "inner_width": 128},  # three times the seconds
}
METHODS = ("teacher", *OWN)
SEEDS = range(5)
POLICIES, EPISODES = 10, 10
EPISODES_OF_ONE = 30  # of the teacher and of an ensemble

Case = tuple[int, str, str]  # seed, task, method


def history(folder: Path) -> sdw.TransitionDataset:
    """What a learner saw, in order."""
    with np.load(folder / "replay.npz", allow_pickle=False) as file:
        arrays = dict(file)
    following = np.roll(arrays["observations"], -1, axis=0)
    following[arrays["end_index"]] = arrays["end_observations"]
    columns = {"observations": arrays["observations"], "actions": arrays["actions"], "rewards": arrays["rewards"]}
    ends = {"terminations": arrays["terminals"], "truncations": arrays["timeouts"]}
    data = sdw.load_dataset({**columns, **ends, "next_observations": following})
    data = dataclasses.replace(data, name=f"history of a SAC learner, {len(following):,} steps of {folder.name}")
    return data.in_environment(f"{folder.name}-v5")


def learner(folder: Path) -> sdw.Teacher:
    """The learner at its end: the mean action of its policy and the lower of its two critics."""
    newest = folder / "replay_learner.pt"
    if newest.exists():
        state = torch.load(newest, weights_only=True)
        actor, critic = state["actor"], state["critic"]
    else:
        actor = torch.load(folder / "actor_110000.pt", weights_only=True)
        critic = torch.load(folder / "final.pt", weights_only=True)["critic"]
    params = [tensor.float() for tensor in actor.values()]
    params[-2:] = [tensor.chunk(2)[0] for tensor in params[-2:]]  # the mean; the other half is the log-deviation
    return sdw.Teacher(MLP.of(params, tanh=True), MinCritic([twin(critic, number) for number in range(2)]))


def twin(critic: dict[str, Tensor], number: int) -> MLP:
    layers = [(critic[f"w{i}"][number].T, critic[f"b{i}"][number, 0]) for i in (1, 2, 3)]
    return MLP.of([tensor for layer in layers for tensor in layer], tanh=False)


def of_task(folder: Path, task: str) -> tuple[sdw.TransitionDataset, sdw.Teacher]:
    """The history and the learner of "<env>/medium-replay"."""
    of_env = folder / ENVS[task.partition("/")[0]]
    return history(of_env), learner(of_env)


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    return table.latest(table.read(TABLE, SETTINGS), "seed", "task", "method")


def cases() -> list[Case]:
    every = [(seed, task, method) for seed in SEEDS for task in TASKS for method in METHODS]
    planned = [case for case in every if case[2] != "teacher" or case[0] == SEEDS[0]]
    return sorted(planned, key=lambda case: case[2] == "av-pbc-wide")


def measure(case: Case, folder: Path) -> None:
    """Distills one set, and runs policies cloned on it; or the teacher."""
    seed, task, method = case
    began = time.process_time()
    data, teacher = of_task(folder, task)
    row: dict[str, Any] = {"task": task, "method": method, "seed": seed}
    if method == "teacher":
        row["policies"] = work.mean_returns([teacher.actions], data, EPISODES_OF_ONE)
    else:
        synthetic = sdw.distill(data, teacher, seed=seed, progress=False, **{**SETTINGS, **OWN[method]})
        row |= work.returns_of_set(synthetic, data, policies=POLICIES, episodes=EPISODES, of_ensemble=EPISODES_OF_ONE)
    work.record(TABLE, row, SETTINGS, began)


def results_table(found: dict[Case, table.Entries]) -> str:
    """Means over the seeds ± standard error, of single policies and of ensembles, beside what was published."""
    lines = []
    for task in TASKS:
        line = [task, *(f"{row['policies'][0]:.1f}" for row in [found.get((0, task, "teacher"))] if row)]
        line += ["missing"] * (2 - len(line))
        for method in OWN:
            rows = report.rows_of(found, SEEDS, task, method)
            line += report.policy_and_ensemble(rows, len(SEEDS))
        lines.append([*line, f"{PUBLISHED_AV_PBC[task]:.1f}", f"{PUBLISHED_HIGHEST[task]:.1f}"])
    columns = report.of_methods(cells.METHODS[method] for method in OWN)
    return report.markdown(["task", "teacher", *columns, "published Av-PBC", "highest published"], lines)


def write_page(page: Path = report.PAGE) -> None:
    """Fills the study's table."""
    report.fill("histories", results_table(results()), page)


if __name__ == "__main__":
    work.study(__doc__, cases(), results=results, measure=measure, write_page=write_page, folders=["folder"])
