"""The cells of the suite (task, method, seed): which there are, their settings and results, where their sets lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.studies.tasks import TASKS, TEACHERS
from sdw_fast import DistillConfig

TABLE, RUNS = table.RESULTS / "suite.jsonl", table.ROOT / "runs/suite"
SEEDS = range(3)
MORE_SEEDS = {"sdw-mild": range(5)}  # its settings were chosen by the first three of them
POLICIES, EPISODES = 10, 10  # freshly trained policies a cell, and episodes of each
POLICIES_FOR_SCALE = 5  # whose training takes longer
EVALUATION = ("policies", "episodes")  # the settings that a distillation does not depend on
TEST_SEED = 10_000
# The papers' weights, steps and choice of the set, whose numbers the table is compared with.
PAPERS: dict[str, Any] = {"value_weights": "paper", "beta": 0.02, "adapt_inner_lr": False, "select": "last"}
# What every set is distilled and cloned with.
SETTINGS: dict[str, Any] = {"size": 256, "steps": 2_000, "k": 100, "ess": 0.8, "clip": 0.9, **PAPERS}
# Of settings that are younger than some rows: what was done before there was a choice.
EARLIER: dict[str, Any] = {"value_weights": "paper", "adapt_inner_lr": False, "select": "last"}
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
Results = dict[Cell, table.Entries]  # its row


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


def settings(cell: Cell) -> dict[str, Any]:
    """Everything that a cell's result depends on besides the code, the dataset and the seed."""
    task, method, _ = cell
    shared: dict[str, Any] = {"policies": POLICIES_FOR_SCALE if method in SCALE else POLICIES, "episodes": EPISODES}
    if method not in ("random", "kmeans++", "dbc", "bc"):
        shared["teacher"] = TEACHERS[task]
    if method == "teacher":
        return shared
    own = BC if method == "bc" else config(cell).to_dict()
    return {**shared, **{key: value for key, value in own.items() if key != "seed"}}


def config(cell: Cell) -> DistillConfig:
    """What a cell's set is distilled, or its pairs are chosen, with."""
    _, method, seed = cell
    if method == "sdw-paper":
        return DistillConfig.preset("paper", **PAPERS, steps=FULL_WIDTH_STEPS, seed=seed)
    return DistillConfig(**{**SETTINGS, **OWN.get(method, {"objective": method}), "seed": seed})


def up_to_date(row: table.Entries, cell: Cell) -> bool:
    """Whether a row was made with the settings of now.

    A setting that the row does not know counts as what was done then: settings that come later leave results as they
    are.
    """
    known = {**DistillConfig().to_dict(), **EARLIER, **row["settings"]}
    return all(known.get(key) == value for key, value in settings(cell).items())


def results() -> Results:
    """The newest row with the settings of now of every cell that has one."""
    found, planned_cells = {}, set(cells())
    for row in table.read(TABLE):
        cell = row["task"], row["method"], row["seed"]
        if cell in planned_cells and up_to_date(row, cell):
            found[cell] = row
    return found


def seeds_returns(found: Results, task: str, method: str) -> list[float]:
    """The return of every seed that there is."""
    every = [(task, method, seed) for seed in seeds(method)]
    return [found[cell]["normalized_return"] for cell in every if cell in found]


def run_folder(cell: Cell) -> Path:
    """Where a distillation lies; one of other settings, or of another teacher, lies elsewhere."""
    own = {key: value for key, value in settings(cell).items() if key not in EVALUATION}
    digest = hashlib.sha256(json.dumps({**own, "seed": cell[2]}, sort_keys=True).encode()).hexdigest()
    return RUNS / name(cell) / digest[:8]


def folder(together: Sequence[Cell]) -> Path:
    """Where cells that differ in the seed only are distilled; more than one is a batched run."""
    return run_folder(together[0]) if len(together) == 1 else run_folder(together[0]).with_suffix(".batch")
