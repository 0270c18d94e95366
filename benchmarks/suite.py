"""The papers' table: distilled policies on the locomotion suite. `make suite`; writes benchmarks/results/suite.md.

python -m benchmarks.suite                                  # every cell that has no result yet, then the page
python -m benchmarks.suite --only 'hopper/medium/sdw/'      # some cells; a name is <env>/<quality>/<method>/<seed>
python -m benchmarks.suite --list                           # what is done and what is missing
python -m benchmarks.suite --page                           # the page alone

A cell is one task, method and seed. Its result is one JSON file under results/suite with the settings it was made with,
committed: the same command on another machine goes on from there. A cell whose settings are no longer those of this
file is made again. Distillations lie in runs/suite/<cell>/<digest> (config.json, checkpoint, last.npz and so on) and
resume from their last checkpoint. On the CPU every cell has one thread and as many run as there are cores; on a GPU all
seeds of a cell are one batched run.

What is reported is the last synthetic set, never the best by an evaluation: POLICIES policies are cloned on it from
initializations of their own, and each runs EPISODES episodes with seeds that nothing else uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import sdw_fast as sdw
from benchmarks.table import machine, markdown, write_text
from benchmarks.train_teachers import ROOT, TASKS, TEACHERS, dataset, path, train_missing
from sdw_fast.data import TransitionDataset, normalize_actions
from sdw_fast.distill import DistillConfig
from sdw_fast.policy import MLPPolicy, orthogonal_parameters
from sdw_fast.synthetic import SyntheticDataset, choose_pairs, real_pairs
from sdw_fast.teacher import Teacher

RESULTS, RUNS = ROOT / "benchmarks/results/suite", ROOT / "runs/suite"
PAGE = RESULTS.parent / "suite.md"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = range(3)
MORE_SEEDS = {"sdw-mild": range(5)}  # its settings were chosen by the first three of them
POLICIES, EPISODES = 10, 10  # freshly trained policies a cell, and episodes of each
POLICIES_FOR_SCALE = 5  # whose training takes longer
EVALUATION = ("policies", "episodes")  # the settings that a distillation does not depend on
TEST_SEED = 10_000
# What every set is distilled and cloned with.
SETTINGS: dict[str, Any] = {"size": 256, "steps": 2_000, "k": 100, "ess": 0.8, "clip": 0.9}
# Of methods "av-pbc-wide" and "sdw-wide": three times the seconds, and a density that looks farther than the cluster of
# the first states of all episodes, of which there are 112 to 180 on the six tasks.
WIDE: dict[str, Any] = {"inner_width": 128, "k": 500}
# Of method "sdw-mild": weights that are nearly equal. The one SDW that passes all published numbers.
MILD: dict[str, Any] = {"inner_width": 128, "ess": 0.95}
FULL_WIDTH_STEPS = 230  # as many seconds on the policy's own network, on a CPU
PAIRS = ("random", "kmeans++", "top-q")  # real pairs, by how they are chosen
DISTILLED = ("dbc", "pbc", "av-pbc", "sdw", "av-pbc-wide", "sdw-wide", "sdw-mild", "sdw-paper")
SCALE = ("bc", "teacher")  # for scale: behavior cloning on the whole dataset, and the teacher itself
METHODS = {
    "random": "random pairs",
    "kmeans++": "k-means++ pairs",
    "top-q": "top-Q pairs",
    "dbc": "DBC",
    "pbc": "PBC",
    "av-pbc": "Av-PBC",
    "sdw": "SDW",
    "av-pbc-wide": f"Av-PBC, {WIDE['inner_width']} units",
    "sdw-wide": f"SDW, {WIDE['inner_width']} units, k = {WIDE['k']}",
    "sdw-mild": f"SDW, {MILD['inner_width']} units, ess = {MILD['ess']}",
    "sdw-paper": f"SDW, papers' settings, {FULL_WIDTH_STEPS} steps",
    "bc": "BC on all data",
    "teacher": "teacher",
}
RIVALS = {"sdw": "av-pbc", "sdw-wide": "av-pbc-wide", "sdw-mild": "av-pbc-wide"}  # an SDW, and Av-PBC of its width
# arXiv 2512.06692, 256 pairs, D4RL v2
PUBLISHED = {
    "halfcheetah/medium": 39.5,
    "hopper/medium": 38.4,
    "walker2d/medium": 42.5,
    "halfcheetah/medium-expert": 25.0,
    "hopper/medium-expert": 42.6,
    "walker2d/medium-expert": 44.6,
}
COMPARED = ("av-pbc-wide", "sdw-wide", "sdw-mild", "sdw-paper")  # run on the tasks of PUBLISHED only
# arXiv 2410.22728, table 1: 256 pairs, D4RL v2
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
# Settings away from those of all: one at a time or as a pair that belongs together, on two tasks.
ABLATED = ("hopper/medium", "walker2d/medium-expert")
CHANGES: list[dict[str, Any]] = [
    {"inner_momentum": 0.0, "inner_lr": 0.35},  # plain SGD, at its best
    {"inner_lr": 0.07},
    {"k": 10},  # the package's
    {"k": 500},
    {"inner_width": None, "steps": FULL_WIDTH_STEPS},
    {"gain": 1.4142, "inner_momentum": 0.0},  # the papers' inner loop
    {"clip_norm": 2.0},  # the papers', which never clips
    {"schedule": "constant"},
    {"average": 0.0},
    *({"lr": lr} for lr in (0.01, 0.02)),
    *({"inner_steps": steps} for steps in (50, 200)),
    {"window": 50},
    *({"tau": tau} for tau in (0.02, 0.05, 0.1, 0.2, 0.4)),
    *({"ess": ess} for ess in (0.5, 0.95)),
    {"clip": 0.99},
    {"density_method": "flow"},
    *({"init": init} for init in ("kmeans++", "top-q")),
]
ABLATIONS = {",".join(["sdw", *(f"{name}={value}" for name, value in change.items())]): change for change in CHANGES}
# What a method has away from SETTINGS, where that is more than the objective it is named after.
OWN: dict[str, dict[str, Any]] = {
    **{method: {"objective": "dbc", "init": method} for method in PAIRS},
    **{f"{method}-wide": {"objective": method, **WIDE} for method in ("av-pbc", "sdw")},
    "sdw-mild": {"objective": "sdw", **MILD},
    **{method: {"objective": "sdw", **change} for method, change in ABLATIONS.items()},
}
BC: dict[str, Any] = {"steps": 5_000, "batch_size": 256, "lr": 1e-3}

Cell = tuple[str, str, int]  # task, method, seed
Pair = tuple[Sequence[float], Sequence[float]]  # returns of a method's seeds, and of its rival's


def cells() -> list[Cell]:
    """All cells, those that the published numbers are compared with first."""

    def order(cell: Cell) -> tuple[bool, bool, int]:
        task, method, seed = cell
        return task not in PUBLISHED, method not in ("av-pbc", "sdw", *SCALE), seed

    methods = [(task, method) for task in TASKS for method in METHODS if planned(task, method)]
    every = [(task, method, seed) for task, method in methods for seed in seeds(method)]
    ablations = [(task, method, seed) for task in ABLATED for method in ABLATIONS for seed in SEEDS]
    return sorted(every, key=order) + ablations


def planned(task: str, method: str) -> bool:
    """Whether a method of the table is run on a task."""
    return task in PUBLISHED or method not in COMPARED


def seeds(method: str) -> Sequence[int]:
    """The teacher and cloning on all data are there once."""
    return SEEDS[:1] if method in SCALE else MORE_SEEDS.get(method, SEEDS)


def name(cell: Cell) -> str:
    return "/".join(map(str, cell))


def result_path(cell: Cell) -> Path:
    task, method, seed = cell
    return RESULTS / task.replace("/", "-") / f"{method}-{seed}.json"


def settings(cell: Cell) -> dict[str, Any]:
    """Everything that a cell's result depends on besides the code and the dataset."""
    task, method, seed = cell
    shared: dict[str, Any] = {"policies": POLICIES_FOR_SCALE if method in SCALE else POLICIES, "episodes": EPISODES}
    if method not in ("random", "kmeans++", "dbc", "bc"):
        shared["teacher"] = TEACHERS[task]
    if method == "teacher":
        return shared
    if method == "bc":
        return {**shared, **BC, "seed": seed}
    if method == "sdw-paper":
        return {**shared, **DistillConfig.paper(steps=FULL_WIDTH_STEPS, seed=seed).to_dict()}
    own = OWN.get(method, {"objective": method})
    return {**shared, **DistillConfig(**{**SETTINGS, **own, "seed": seed}).to_dict()}


def run_folder(cell: Cell) -> Path:
    """Where a distillation lies; one of other settings, or of another teacher, lies elsewhere."""
    own = {key: value for key, value in settings(cell).items() if key not in EVALUATION}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    return RUNS / name(cell) / digest[:8]


def folder(cells: Sequence[Cell]) -> Path:
    """Where cells that differ in the seed only are distilled; more than one is a batched run."""
    return run_folder(cells[0]) if len(cells) == 1 else run_folder(cells[0]).with_suffix(".batch")


def logged_seconds(cells: Sequence[Cell]) -> float:
    """Seconds of all outer steps of a distillation, those that earlier calls took too; 0 if there are none."""
    log = next(folder(cells).rglob("metrics.jsonl"), None)
    return sum(json.loads(line)["seconds"] for line in log.read_text().splitlines()) if log else 0.0


def done(cell: Cell) -> bool:
    """Whether there is a result with the settings of now."""
    file = result_path(cell)
    return file.exists() and json.loads(file.read_text())["settings"] == settings(cell)


def make(cells: Sequence[Cell]) -> list[str]:
    """Makes the results of cells that differ in the seed only; returns a line on each."""
    task, method, _ = cells[0]
    if DEVICE == "cpu":
        torch.set_num_threads(1)
        sdw.set_num_threads(1)
    data = dataset(task)
    teacher = Teacher.load(path(task))
    began = time.perf_counter()
    policies = [policies_of(cell, data, teacher) for cell in cells] if method in SCALE else None
    sets = [] if policies else synthetic_sets(cells, data, teacher)
    training = max(time.perf_counter() - began, logged_seconds(cells))
    lines = []
    for number, cell in enumerate(cells):
        began = time.perf_counter()
        chosen = policies[number] if policies else clones(sets[number])
        returns = [episodes(policy, data, clone) for clone, policy in enumerate(chosen)]
        seconds = {"training": training / len(cells), "evaluation": time.perf_counter() - began}
        lines.append(write(cell, np.array(returns), seconds))
    return lines


def synthetic_sets(cells: Sequence[Cell], data: TransitionDataset, teacher: Teacher) -> list[SyntheticDataset]:
    """The set of each cell: real pairs, or distilled, several seeds in one run."""
    method = cells[0][1]
    configs = [
        DistillConfig.from_dict({k: v for k, v in settings(c).items() if k not in (*EVALUATION, "teacher")})
        for c in cells
    ]
    if method in PAIRS:
        return [chosen_pairs(data, teacher, config) for config in configs]
    n_runs = None if len(cells) == 1 else len(cells)
    distiller = sdw.Distiller(data, teacher, configs[0], device=DEVICE, n_runs=n_runs)
    distiller.run(folder(cells), progress=False)
    if n_runs:
        for cell, synthetic in zip(cells, distiller.sets, strict=True):
            synthetic.save(run_folder(cell) / "last.npz")
    return distiller.sets


def chosen_pairs(data: TransitionDataset, teacher: Teacher | None, config: DistillConfig) -> SyntheticDataset:
    rng = np.random.default_rng(config.seed)
    rows = choose_pairs(data, config.size, method=config.init, teacher=teacher, rng=rng)
    return real_pairs(data, rows, config.to_dict())


def clones(synthetic: SyntheticDataset) -> Iterator[nn.Module]:
    for clone in range(POLICIES):
        yield sdw.behavior_clone(synthetic, seed=TEST_SEED + clone)


def policies_of(cell: Cell, data: TransitionDataset, teacher: Teacher) -> list[Any]:
    """The policies that are there for scale."""
    if cell[1] == "teacher":
        return [teacher.actions] * POLICIES_FOR_SCALE
    return [clone_dataset(data, seed=TEST_SEED + clone) for clone in range(POLICIES_FOR_SCALE)]


def clone_dataset(data: TransitionDataset, seed: int) -> MLPPolicy:
    """Behavior cloning on a whole dataset: the suite's network, Adam with a cosine schedule."""
    config = DistillConfig(**SETTINGS)
    *_, params = cloning(data, seed, hidden=config.hidden, gain=config.gain, schedule="cosine", **BC)
    return policy_of(data, params)


def cloning(
    data: TransitionDataset,
    seed: int,
    *,
    hidden: Sequence[int],
    gain: float,
    steps: int,
    batch_size: int,
    lr: float,
    schedule: str = "constant",
) -> Iterator[list[Tensor]]:
    """Behavior cloning on a whole dataset by Adam on minibatches; yields the parameters after every step."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.from_numpy(data.normalized_observations)
    actions = torch.from_numpy(normalize_actions(data.actions, *data.action_bounds))
    sizes = (states.shape[1], *hidden, actions.shape[1])
    params = [p.requires_grad_() for p in orthogonal_parameters(sizes, gain=gain, generator=generator)]
    optimizer = torch.optim.Adam(params, lr, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if schedule == "cosine" else None
    ones = torch.ones(batch_size)
    for _ in range(steps):
        rows = torch.randint(len(states), (batch_size,), generator=generator)
        optimizer.zero_grad()
        sdw.ops.behavior_matching(params, states[rows], actions[rows], ones).backward()
        optimizer.step()
        if cosine:
            cosine.step()
        yield params


def policy_of(data: TransitionDataset, params: list[Tensor]) -> MLPPolicy:
    """The policy with these parameters, in the dataset's units."""
    low, high = data.action_bounds
    scaling = {"mean": data.normalizer.mean, "scale": data.normalizer.scale}
    return MLPPolicy(params, **scaling, action_low=low, action_high=high)


def episodes(policy: Any, data: TransitionDataset, clone: int) -> np.ndarray:
    """D4RL-normalized returns of a policy's episodes, whose seeds are its own."""
    assert data.env_id is not None
    evaluation = sdw.evaluate(policy, data.env_id, episodes=EPISODES, seed=TEST_SEED + clone * EPISODES)
    assert evaluation.normalized is not None
    return evaluation.normalized


def write(cell: Cell, returns: np.ndarray, seconds: dict[str, float]) -> str:
    """Writes a cell's result, whole or not at all, and returns a line on it. `returns` is (POLICIES, EPISODES)."""
    task, method, seed = cell
    policies = returns.mean(1)
    result = {
        "task": task,
        "method": method,
        "seed": seed,
        "normalized_return": round(float(policies.mean()), 3),
        "standard_error": round(standard_error(policies), 3),
        "policies": np.round(policies, 3).tolist(),
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
        "settings": settings(cell),
        "machine": machine(),
    }
    write_text(result_path(cell), json.dumps(result, indent=1) + "\n")
    figures = f"{result['normalized_return']:.1f} ± {result['standard_error']:.1f}, {sum(seconds.values()):.0f} s"
    return f"{name(cell)}: {figures}"


def work(missing: Iterable[Cell]) -> list[list[Cell]]:
    """What one call of `make` takes: a cell, or on a GPU all seeds of a distillation that has none yet."""
    if DEVICE == "cpu":
        return [[cell] for cell in missing]
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in missing:
        groups.setdefault(cell[:2], []).append(cell)
    return [
        part
        for (_, method), group in groups.items()
        for part in ([group] if len(group) == len(seeds(method)) else [[cell] for cell in group])
    ]


def run(missing: list[Cell], jobs: int) -> None:
    """Makes the cells in processes of their own, and the page after each."""
    tasks = work(missing)
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool, tqdm(total=len(missing)) as bar:
        for lines in pool.imap_unordered(make, tasks):
            for line in lines:
                bar.write(line)
                bar.update()
            write_page()


# The page


def write_page() -> None:
    """Writes suite.md from the results there are."""
    results = {cell: json.loads(result_path(cell).read_text()) for cell in cells() if done(cell)}
    more = ", ".join(f"{len(of)} of {METHODS[method]}" for method, of in MORE_SEEDS.items())
    text = f"""# The suite

Made by `python -m benchmarks.suite` from the JSON files in `results/suite`;
[docs/results.md](../../docs/results.md) says what to make of it. {len(results)} of {len(cells())} cells are done.

D4RL-normalized return, mean over {len(SEEDS)} seeds ± standard error of that mean ({more}; in
brackets: how many there are, where some are missing). A seed's figure is the mean of {POLICIES} policies cloned on its
set from different initializations, {EPISODES} episodes each; {POLICIES_FOR_SCALE} policies are cloned on all data.
{SETTINGS["size"]} pairs, {SETTINGS["steps"]} outer steps, the last set. Published: Av-PBC (arXiv 2410.22728) and SDW
(arXiv 2512.06692), 50,000 outer steps on D4RL's own datasets.

{_returns(results)}

## SDW against the published numbers and Av-PBC

Of each SDW: its mean over the published SDW's, and how much more it returns than Av-PBC with as many units, ± standard
error of that difference.

{_lead(results)}

## Ablations

The first row is SDW as above; the others have the settings named changed.

{_ablations(results)}

## Compute

Mean seconds of one cell, training (distillation, or cloning on all data) and evaluation, one core each.

{_seconds(results)}
"""
    write_text(PAGE, text)


Results = dict[Cell, dict[str, Any]]


def _cell_of_the_page(results: Results, task: str, method: str) -> str:
    return mean_and_error(_seeds_returns(results, task, method), len(seeds(method)))


def _seeds_returns(results: Results, task: str, method: str) -> list[float]:
    """The return of every seed that there is."""
    cells = [(task, method, seed) for seed in seeds(method)]
    return [results[cell]["normalized_return"] for cell in cells if cell in results]


def _returns(results: Results) -> str:
    rows = [
        [
            task,
            *(_cell_of_the_page(results, task, m) if planned(task, m) else "–" for m in METHODS),
            f"{PUBLISHED_AV_PBC[task]:.1f}",
            f"{PUBLISHED[task]:.1f}" if task in PUBLISHED else "–",
        ]
        for task in TASKS
    ]
    return markdown(["task", *METHODS.values(), "published Av-PBC", "published SDW"], rows)


def _lead(results: Results) -> str:
    header = [f"{METHODS[method]}: {of}" for method in RIVALS for of in ("/ published", "− Av-PBC")]
    rows = []
    pairs: dict[str, list[Pair]] = {method: [] for method in RIVALS}
    for task, published in PUBLISHED.items():
        row = [task]
        for method, rival in RIVALS.items():
            own, other = (_seeds_returns(results, task, m) for m in (method, rival))
            row.append(f"{np.mean(own) / published:.2f}" if own else "missing")
            row.append(difference(own, other) if own and other else "missing")
            pairs[method].append((own, other))
        rows.append(row)
    last = ["mean"]
    for of in pairs.values():
        last += ["", mean_difference(of) if all(own and other for own, other in of) else "missing"]
    return markdown(["task", *header], [*rows, last])


def _ablations(results: Results) -> str:
    rows = [
        [label, *(_cell_of_the_page(results, task, method) for task in ABLATED)]
        for method, label in {"sdw": "as above", **{m: f"`{m.removeprefix('sdw,')}`" for m in ABLATIONS}}.items()
    ]
    return markdown(["", *ABLATED], rows)


def _seconds(results: Results) -> str:
    rows = []
    labels = METHODS | {"sdw,": "ablations"}
    for method, label in labels.items():
        spent = [
            result["seconds"]
            for (_, of, _), result in results.items()
            if of == method or (method == "sdw," and of in ABLATIONS)
        ]
        if spent:
            means = [f"{np.mean([s[part] for s in spent]):.0f}" for part in ("training", "evaluation")]
            rows.append([label, str(len(spent)), *means, f"{sum(sum(s.values()) for s in spent) / 3600:.2f}"])
    return markdown(["method", "cells", "training", "evaluation", "hours in all"], rows)


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Of the mean of values; NaN of one."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.nan


def mean_and_error(values: Sequence[float], expected: int) -> str:
    """Mean ± standard error; in brackets the number of values where it is not the expected one."""
    if not values:
        return "missing"
    error = f" ± {standard_error(values):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{error}" + (f" ({len(values)})" if len(values) < expected else "")


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """Difference of two means ± its standard error, where both have one."""
    return mean_difference([(values, others)])


def mean_difference(pairs: Sequence[Pair]) -> str:
    """Mean over the pairs of the difference of their two means ± its standard error, where all have one."""
    text = f"{np.mean([np.mean(values) - np.mean(others) for values, others in pairs]):+.1f}"
    error = math.hypot(*(standard_error(values) for pair in pairs for values in pair)) / len(pairs)
    return text if math.isnan(error) else f"{text} ± {error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="only the cells whose name matches")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time on the CPU")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--list", action="store_true", help="print what is done and what is missing, and stop")
    modes.add_argument("--page", action="store_true", help="write the page and stop")
    options = parser.parse_args()
    chosen = [cell for cell in cells() if re.search(options.only, name(cell))]
    if options.list:
        print("\n".join(f"{'done' if done(cell) else 'missing':<8} {name(cell)}" for cell in chosen))
        return
    if not options.page:
        missing = [cell for cell in chosen if not done(cell)]
        train_missing({task for task, _, _ in missing}, options.jobs)
        run(missing, options.jobs)
    write_page()


if __name__ == "__main__":
    main()
