"""The battery: one set of defaults on thirteen environments, beside cloning on all data. Extra packages: ".[bench]".

    OMP_NUM_THREADS=1 python -m benchmarks.studies.battery                # makes what is missing, fills the page
    OMP_NUM_THREADS=1 python -m benchmarks.studies.battery --only 'ant/'  # some; a name is <task>/<method>/<seed>
    python -m benchmarks.studies.battery --tables       # prints the table and fills docs/environments.md, no more

Policies are trained and datasets recorded first (`recordings.py`) into runs/battery; all takes an hour of one core. A
row a recording, and a row a task and method, go to results/battery.jsonl. Rows that were made with the settings of now
are not made again; a task whose recording has a row but no files is recorded again.

The score of a method is (its return − random) / (cloning on all data − random): the random policy's return is 0,
that of cloning on all data 1. What the package refuses or warns of is kept in the row, so that no failure is silent.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import recordings, report, work
from benchmarks.studies.recordings import TASKS
from sdw_fast import DistillConfig, SyntheticDataset, TransitionDataset
from sdw_fast.environments import recorded

TABLE, FOLDER = table.RESULTS / "battery.jsonl", table.ROOT / "runs/battery"
PAGE = report.DOCS / "environments.md"
METHODS = {
    "random": "random pairs",
    "bc": "cloning on all data",
    "dbc": "DBC",
    "pbc": "PBC",
    "sdw": "SDW",
}
RECORDING = "recording"  # the "method" of a recording's row
SETTINGS: dict[str, Any] = {"size": 256, "steps": 250}  # the others are the package's defaults
BC: dict[str, Any] = {"steps": 1_500, "batch_size": 256, "lr": 1e-3}  # Adam, cosine schedule
HELD_OUT, LOOK_EVERY = 0.1, 200  # share of the pairs, and steps, by which cloning on all data keeps its best
POLICIES, EPISODES, TEST_SEED = 5, 10, 10_000
POLICIES_ON_ALL = 2  # whose training takes longer
SEEDS = {"pbc": range(3), "sdw": range(3)}  # of the distillation; of other methods the first
PASS = 0.9  # the score wanted

Case = tuple[str, str, int]  # task, method, seed


def config(method: str, seed: int) -> DistillConfig:
    """What a set is distilled, or random pairs are cloned, with."""
    return DistillConfig(**SETTINGS, objective="dbc" if method == "random" else method, seed=seed)


def seeds(method: str) -> range:
    return SEEDS.get(method, range(1))


def settings(case: Case) -> dict[str, Any]:
    """Everything that a row depends on besides the code."""
    task, method, seed = case
    if method == RECORDING:
        return recordings.settings(task)
    shared = {"policies": POLICIES_ON_ALL if method == "bc" else POLICIES, "episodes": EPISODES}
    return {**shared, **(BC | {"held_out": HELD_OUT} if method == "bc" else config(method, seed).to_dict())}


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    found = {}
    for row in table.read(TABLE):
        case = row["task"], row["method"], row.get("seed", 0)
        if row["task"] in TASKS and row["settings"] == settings(case):
            found[case] = row
    return found


def record(task: str, folder: Path) -> None:
    """Makes a task's recording and its row."""
    figures = recordings.record(task, folder)
    _append((task, RECORDING, 0), figures)


def measure(case: Case, folder: Path) -> None:
    """Makes one row: distills or clones, and runs each policy for EPISODES episodes."""
    task, _, _ = case
    TASKS[task].make().close()  # imports the package that registers it
    data = sdw.load_dataset(recordings.dataset_id(task))
    began = time.process_time()
    figures: dict[str, Any] = {"error": None}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        try:
            policies = list(_policies(case, data, folder))
            trained = time.process_time()
            returns = [_returns(policy, data, clone) for clone, policy in enumerate(policies)]
        except (ValueError, FloatingPointError) as error:  # told, and so no silent failure
            figures["error"] = f"{type(error).__name__}: {error}"
        else:
            figures |= {
                "return": round(float(np.mean(returns)), 3),
                "standard_error": round(report.standard_error(np.mean(returns, axis=1)), 3),
                "policies": np.mean(returns, axis=1).round(3).tolist(),
                "cpu_seconds": {
                    "training": round(trained - began, 1),
                    "evaluation": round(time.process_time() - trained, 1),
                },
            }
    _append(case, {**figures, "told": sorted({str(w.message) for w in told if w.category is UserWarning})})


def _policies(case: Case, data: TransitionDataset, folder: Path) -> Iterator[Any]:
    """The policies of a case, one an initialization."""
    task, method, seed = case
    clones = range(TEST_SEED, TEST_SEED + settings(case)["policies"])
    if method == "bc":
        yield from (work.clone_on_all(data, clone, held_out=HELD_OUT, look_every=LOOK_EVERY, **BC) for clone in clones)
        return
    synthetic = synthetic_set(method, seed, data, None if method in ("random", "dbc") else teacher(task, folder))
    yield from (sdw.behavior_clone(synthetic, seed=clone) for clone in clones)


def synthetic_set(method: str, seed: int, data: TransitionDataset, teacher: sdw.Teacher | None) -> SyntheticDataset:
    """Random pairs, or a set distilled with the defaults."""
    if method == "random":
        return work.chosen_pairs(data, teacher, config(method, seed))
    return sdw.distill(data, teacher, progress=False, **{**SETTINGS, "objective": method, "seed": seed})


def teacher(task: str, folder: Path) -> sdw.Teacher:
    """The policy that recorded a task's dataset, with its critic."""
    import stable_baselines3 as sb3

    model = getattr(sb3, TASKS[task].algorithm).load(recordings.model_path(task, folder), device="cpu")
    return sdw.Teacher.from_sb3(model)


def _returns(policy: Any, data: TransitionDataset, clone: int) -> np.ndarray:
    """Returns of a policy's episodes, whose seeds are its own."""
    return sdw.evaluate(policy, recorded(data.units), episodes=EPISODES, seed=TEST_SEED + clone * EPISODES).returns


def _append(case: Case, figures: table.Entries) -> None:
    task, method, seed = case
    row = {"task": task, "method": method, "seed": seed, **figures, "settings": settings(case)}
    table.append(TABLE, {**row, **table.origin()})
    print(f"{task}/{method}/{seed}: {figures}", flush=True)


def score(found: dict[Case, table.Entries], task: str, value: float) -> float | None:
    """A return on the scale where the random policy is 0 and cloning on all data 1; None where that is no better."""
    low, high = found[task, RECORDING, 0]["random"]["mean"], found[task, "bc", 0]["return"]
    return (value - low) / (high - low) if high > low else None


def results_table(found: dict[Case, table.Entries]) -> str:
    """One line a task: the returns of random policy, data, teacher and cloning on all data; the methods' scores."""
    scored = [method for method in METHODS if method != "bc"]
    lines = []
    for task in TASKS:
        recording, bc = found.get((task, RECORDING, 0)), found.get((task, "bc", 0))
        scale = [f"{recording[of]['mean']:.0f}" if recording else "missing" for of in ("random", "data", "teacher")]
        scale.append(f"{bc['return']:.0f}" if bc and not bc["error"] else "refused" if bc else "missing")
        lines.append([task, *scale, *(_score_figure(found, task, method) for method in scored)])
    header = ["", "random policy", "data", "teacher", METHODS["bc"], *(METHODS[method] for method in scored)]
    return report.markdown(header, lines)


def _score_figure(found: dict[Case, table.Entries], task: str, method: str) -> str:
    """The mean score of the seeds; in brackets their number where some are missing, and what was said."""
    rows = [found[task, method, seed] for seed in seeds(method) if (task, method, seed) in found]
    if not rows or (task, RECORDING, 0) not in found or "return" not in found.get((task, "bc", 0), {}):
        return "missing"
    if any(row["error"] for row in rows):
        return "refused"
    mean = sum(row["return"] for row in rows) / len(rows)
    own = score(found, task, mean)
    said = [f"of {len(rows)}"] * (len(rows) < len(seeds(method))) + ["warned"] * any(row["told"] for row in rows)
    shown = f"returns {mean:.0f}" if own is None else f"{own:.2f}"
    figure = f"**{shown}**" if own is not None and own >= PASS else shown
    return f"{figure} ({', '.join(said)})" if said else figure


def write_page() -> None:
    """Fills the study's table of docs/environments.md."""
    report.fill("battery", results_table(results()), PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="only the rows whose name matches")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where models and datasets lie (%(default)s)")
    parser.add_argument("--tables", action="store_true", help="make nothing; print the table, fill the page")
    options = parser.parse_args()
    work.one_thread()
    recordings.use(options.folder)
    for task in () if options.tables else TASKS:
        cases = [(task, method, seed) for method in (RECORDING, *METHODS) for seed in seeds(method)]
        chosen = [case for case in cases if re.search(options.only, "/".join(map(str, case)))]
        missing = [case for case in chosen if case not in results()]
        if missing and ((task, RECORDING, 0) in missing or not recordings.exists(task, options.folder)):
            record(task, options.folder)
        for case in missing:
            if case[1] in METHODS:
                measure(case, options.folder)
    print(results_table(results()))
    write_page()


if __name__ == "__main__":
    main()
