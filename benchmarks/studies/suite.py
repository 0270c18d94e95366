"""The papers' table: distilled policies on the locomotion suite. `make suite`; a row a cell in results/suite.jsonl.

python -m benchmarks.studies.suite                              # every cell that has no row yet, then docs/results.md
python -m benchmarks.studies.suite --only 'hopper/medium/sdw/'  # some cells; a name is <env>/<quality>/<method>/<seed>
python -m benchmarks.studies.suite --list                       # what is done and what is missing
python -m benchmarks.studies.suite --tables                     # prints all tables, and fills those of docs/results.md

A cell is one task, method and seed. Its row is committed: the same command on another machine goes on from there. A
cell whose settings are no longer those of cells.py is made again. Distillations lie in runs/suite/<cell>/<digest>
(config.json, checkpoint, last.npz and so on) and resume from their last checkpoint. On the CPU every cell has one
thread and as many run as there are cores; on a GPU all seeds of a cell are one batched run. Several calls, on machines
that share this folder, divide the cells among themselves (see claims.py).

What is reported is the last synthetic set, never the best by an evaluation: POLICIES policies are cloned on it from
initializations of their own, and each runs EPISODES episodes with seeds that nothing else uses.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import time
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import table
from benchmarks.studies import cells, claims, report, tasks, work
from benchmarks.studies.cells import ABLATED, ABLATIONS, METHODS, PUBLISHED, Cell, Results, seeds_returns
from benchmarks.studies.report import Pair, difference, markdown, mean_and_error, mean_difference, standard_error
from benchmarks.studies.teachers import train_missing
from sdw_fast.data import TransitionDataset

RIVALS = {"sdw": "av-pbc", "sdw-wide": "av-pbc-wide", "sdw-mild": "av-pbc-wide"}  # an SDW, and Av-PBC of its width
# arXiv 2410.22728, table 1: 256 pairs, D4RL v2. Its medium-replay is a learner's history, which the mixture is not.
PUBLISHED_AV_PBC = {
    "halfcheetah/medium-replay": 35.9,
    "halfcheetah/medium": 36.9,
    "halfcheetah/medium-expert": 22.0,
    "hopper/medium-replay": 40.9,
    "hopper/medium": 32.5,
    "hopper/medium-expert": 38.7,
    "walker2d/medium-replay": 55.0,
    "walker2d/medium": 39.5,
    "walker2d/medium-expert": 42.1,
}
# The same, the highest of any objective and evaluation, ensembles of ten policies included.
PUBLISHED_HIGHEST = {
    "halfcheetah/medium-replay": 39.8,
    "halfcheetah/medium": 41.4,
    "halfcheetah/medium-expert": 37.2,
    "hopper/medium-replay": 40.9,
    "hopper/medium": 44.9,
    "hopper/medium-expert": 43.3,
    "walker2d/medium-replay": 75.9,
    "walker2d/medium": 58.6,
    "walker2d/medium-expert": 73.7,
}
# The columns, and the ablations, of docs/results.md.
SHOWN = ("av-pbc", "sdw", "av-pbc-wide", "sdw-mild", "sdw-paper", "bc")
SHOWN_ABLATIONS = (
    "sdw,inner_momentum=0.0,inner_lr=0.35",
    "sdw,gain=1.4142,inner_momentum=0.0",
    "sdw,inner_width=None,steps=230",
    "sdw,window=50",
    "sdw,inner_steps=200",
    "sdw,lr=0.01",
    "sdw,ess=0.95",
    "sdw,k=500",
    "sdw,density_method=flow",
)


def make(together: Sequence[Cell]) -> list[str]:
    """Makes and records cells that differ in the seed only; returns a line on each."""
    task, method, _ = together[0]
    if work.DEVICE == "cpu":
        work.one_thread()
    data = tasks.dataset(task)
    began = time.perf_counter()
    if method in cells.SCALE:
        policies: list[Iterable[Any]] = [policies_for_scale(cell, data) for cell in together]
    else:
        policies = [work.clones(synthetic, cells.POLICIES) for synthetic in work.synthetic_sets(together)]
    training = max(time.perf_counter() - began, work.distilling_seconds(together))
    lines = []
    for cell, chosen in zip(together, policies, strict=True):
        began = time.perf_counter()
        returns = [episodes(policy, data, clone) for clone, policy in enumerate(chosen)]
        seconds = {"training": training / len(together), "evaluation": time.perf_counter() - began}
        lines.append(record(cell, np.array(returns), seconds))
    return lines


def policies_for_scale(cell: Cell, data: TransitionDataset) -> list[Any]:
    """The policies that are there for scale."""
    if cell[1] == "teacher":
        return [tasks.teacher(cell[0]).actions] * cells.POLICIES_FOR_SCALE
    return [work.clone_dataset(data, seed=cells.TEST_SEED + clone) for clone in range(cells.POLICIES_FOR_SCALE)]


def episodes(policy: Any, data: TransitionDataset, clone: int) -> np.ndarray:
    """D4RL-normalized returns of a policy's episodes, whose seeds are its own."""
    return work.normalized_returns(policy, data, cells.EPISODES, seed=cells.TEST_SEED + clone * cells.EPISODES)


def record(cell: Cell, returns: np.ndarray, seconds: dict[str, float]) -> str:
    """Adds a cell's row to the table, and returns a line on it. `returns` is (policies, episodes)."""
    task, method, seed = cell
    policies = returns.mean(1)
    figures = {
        "normalized_return": round(float(policies.mean()), 3),
        "standard_error": round(standard_error(policies), 3),
        "policies": np.round(policies, 3).tolist(),
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
    }
    row = {"task": task, "method": method, "seed": seed, **figures, "settings": cells.settings(cell)}
    table.append(cells.TABLE, {**row, **table.origin()})
    told = f"{figures['normalized_return']:.1f} ± {figures['standard_error']:.1f}, {sum(seconds.values()):.0f} s"
    return f"{cells.name(cell)}: {told}"


def batches(missing: Iterable[Cell]) -> list[list[Cell]]:
    """What one call of `make` takes: a cell, or on a GPU all seeds of a distillation that has none yet."""
    if work.DEVICE == "cpu":
        return [[cell] for cell in missing]
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in missing:
        groups.setdefault(cell[:2], []).append(cell)
    return [
        part
        for (_, method), group in groups.items()
        for part in ([group] if len(group) == len(cells.seeds(method)) else [[cell] for cell in group])
    ]


def run(missing: list[Cell], jobs: int) -> None:
    """Makes, in processes of their own, those of the cells that no other call is making."""
    processes = multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1)
    with processes, ThreadPool(jobs) as threads, tqdm(total=len(missing)) as bar:

        def make_claimed(together: list[Cell]) -> list[str]:
            with claims.claimed(cells.RUNS / "claims", cells.name(together[0])) as ours:
                left = [cell for cell in together if cell not in cells.results()] if ours else []
                return processes.apply(make, (left,)) if left else []

        for lines in threads.imap_unordered(make_claimed, batches(missing)):
            for line in lines:
                bar.write(line)
                bar.update()


# What the rows say


def write_page(found: Results) -> None:
    """Fills the suite's tables of docs/results.md."""
    report.fill("suite", returns_table(found, list(PUBLISHED), SHOWN))
    report.fill("ablations", ablations_table(found, SHOWN_ABLATIONS))


def all_tables(found: Results) -> str:
    """Every table of the suite, in Markdown."""
    more = ", ".join(f"{len(of)} of {METHODS[method]}" for method, of in cells.MORE_SEEDS.items())
    return f"""# The suite

{len(found)} of {len(cells.cells())} cells are done.

D4RL-normalized return, mean over {len(cells.SEEDS)} seeds ± standard error of that mean ({more}; in
brackets: how many there are, where some are missing). A seed's figure is the mean of {cells.POLICIES} policies cloned
on its set from different initializations, {cells.EPISODES} episodes each; {cells.POLICIES_FOR_SCALE} policies are
cloned on all data. {cells.SETTINGS["size"]} pairs, {cells.SETTINGS["steps"]} outer steps, the last set. Published:
Av-PBC (arXiv 2410.22728) and SDW (arXiv 2512.06692), 50,000 outer steps on D4RL's own datasets.

{returns_table(found, tasks.TASKS, tuple(METHODS))}

## SDW against the published numbers and Av-PBC

Of each SDW: its mean over the published SDW's, and how much more it returns than Av-PBC with as many units, ± standard
error of that difference.

{lead_table(found)}

## Ablations

The first row is SDW as above; the others have the settings named changed.

{ablations_table(found, tuple(ABLATIONS))}

## Compute

Mean seconds of one cell, training (distillation, or cloning on all data) and evaluation, one core each.

{seconds_table(found)}"""


def returns_table(found: Results, shown: Sequence[str], methods: Sequence[str]) -> str:
    """Return of every task and method, beside the published numbers."""
    rows = [
        [
            task,
            *(_seeds_figure(found, task, m) if cells.planned(task, m) else "–" for m in methods),
            *(f"{of[task]:.1f}" if task in of else "–" for of in (PUBLISHED_AV_PBC, PUBLISHED, PUBLISHED_HIGHEST)),
        ]
        for task in tasks.TASKS
        if task in shown
    ]
    published = ["published Av-PBC", "published SDW", "highest published"]
    return markdown(["task", *(METHODS[m] for m in methods), *published], rows)


def _seeds_figure(found: Results, task: str, method: str) -> str:
    return mean_and_error(seeds_returns(found, task, method), len(cells.seeds(method)))


def lead_table(found: Results) -> str:
    """Every SDW against the published numbers and against Av-PBC."""
    header = [f"{METHODS[method]}: {of}" for method in RIVALS for of in ("/ published", "− Av-PBC")]
    rows = []
    pairs: dict[str, list[Pair]] = {method: [] for method in RIVALS}
    for task, published in PUBLISHED.items():
        row = [task]
        for method, rival in RIVALS.items():
            own, other = (seeds_returns(found, task, m) for m in (method, rival))
            row.append(f"{np.mean(own) / published:.2f}" if own else "missing")
            row.append(difference(own, other) if own and other else "missing")
            pairs[method].append((own, other))
        rows.append(row)
    last = ["mean"]
    for of in pairs.values():
        last += ["", mean_difference(of) if all(own and other for own, other in of) else "missing"]
    return markdown(["task", *header], [*rows, last])


def ablations_table(found: Results, ablations: Sequence[str]) -> str:
    """SDW, and SDW with the settings named changed."""
    rows = [
        [label, *(_seeds_figure(found, task, method) for task in ABLATED)]
        for method, label in {"sdw": "as above", **{m: f"`{m.removeprefix('sdw,')}`" for m in ablations}}.items()
    ]
    return markdown(["", *ABLATED], rows)


def seconds_table(found: Results) -> str:
    """What a cell of every method takes."""
    rows = []
    for method, label in {**METHODS, "": "ablations"}.items():
        spent = [
            row["seconds"] for (_, of, _), row in found.items() if of == method or (not method and of in ABLATIONS)
        ]
        if spent:
            means = [f"{np.mean([s[part] for s in spent]):.0f}" for part in ("training", "evaluation")]
            rows.append([label, str(len(spent)), *means, f"{sum(sum(s.values()) for s in spent) / 3600:.2f}"])
    return markdown(["method", "cells", "training", "evaluation", "hours in all"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="only the cells whose name matches")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time on the CPU")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--list", action="store_true", help="print what is done and what is missing, and stop")
    modes.add_argument("--tables", action="store_true", help="print all tables, fill those of the page, and stop")
    options = parser.parse_args()
    found = cells.results()
    chosen = [cell for cell in cells.cells() if re.search(options.only, cells.name(cell))]
    if options.list:
        print("\n".join(f"{'done' if cell in found else 'missing':<8} {cells.name(cell)}" for cell in chosen))
        return
    if options.tables:
        print(all_tables(found))
    else:
        missing = [cell for cell in chosen if cell not in found]
        train_missing({task for task, _, _ in missing}, options.jobs)
        run(missing, options.jobs)
    write_page(cells.results())


if __name__ == "__main__":
    main()
