"""The suite's nine teachers: trained by offline RL on the collected datasets, evaluated, and written in half precision.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.teachers                 # those that are missing, two at a time
    OMP_NUM_THREADS=1 python -m benchmarks.studies.teachers hopper/medium   # one, again

One thread, for the networks are small and the result then repeats bit for bit. What is evaluated is the stored file,
and its returns are kept in the file's own metadata. The files lie in benchmarks/teachers, hopper/medium's in
sdw_fast/assets, for the demo uses it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterable

import sdw_fast as sdw
from benchmarks.studies import report, work
from benchmarks.studies.tasks import TASKS, TEACHERS, TRANSITIONS, dataset, teacher, teacher_path
from benchmarks.table import ROOT

EPISODES = 20
PAGE = f"""# Teachers of the suite

Made by `python -m benchmarks.studies.teachers` on {TRANSITIONS:,} collected transitions each. Half precision;
`Teacher.load` reads them. License: MIT, as the package. Returns of {EPISODES} episodes, mean ± standard deviation; Q
over the data's own pairs. hopper/medium's lies in `sdw_fast/assets`.

Steps are few, for two cores are what there was: critics have not converged, and the policies of hopper and walker2d,
which fall, depend much on the settings. Those of a task were chosen among one to four by these very returns. Teachers
at D4RL's size, `*-large`, are of `python -m benchmarks.studies.large` (docs/results.md).

| task | algorithm | settings | return | D4RL-normalized | the dataset's mean | Q |
| --- | --- | --- | --- | --- | --- | --- |
"""


def train(task: str) -> str:
    """Trains, writes and evaluates the teacher of a task; returns a line on it."""
    work.one_thread()
    sdw.train_teacher(dataset(task), **TEACHERS[task], seed=0, progress=False).save(teacher_path(task), half=True)
    return evaluate(task)


def evaluate(task: str) -> str:
    """Runs the stored teacher, keeps its returns in the file's metadata, and returns a line on them."""
    data, trained = dataset(task), teacher(task)
    assert data.env_id is not None
    result = sdw.evaluate(trained.actions, data.env_id, episodes=EPISODES)
    values = trained.values(data.observations, data.actions)
    trained.provenance["evaluation"] = {
        "episodes": EPISODES,
        "return_mean": result.mean,
        "return_std": result.std,
        "normalized_mean": result.normalized_mean,
        "normalized_std": result.normalized_std,
        "mean_q": float(values.mean()),
        "std_q": float(values.std()),
        "dataset_normalized_mean": data.summary()["normalized_return_mean"],
    }
    trained.save(teacher_path(task), half=True)
    return (
        f"{task}: {result}; Q on the data {values.mean():.1f} ± {values.std():.1f}, {(values < 0).mean():.2%} negative"
    )


def train_missing(tasks: Iterable[str], jobs: int) -> None:
    """Trains the teachers among these that have no file."""
    train_all([task for task in TASKS if task in tasks and not teacher_path(task).exists()], jobs)


def train_all(tasks: list[str], jobs: int) -> None:
    """Trains these teachers in processes of their own."""
    if not tasks:
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for line in pool.imap_unordered(train, tasks):
            print(line, flush=True)


def write_page() -> None:
    """Writes benchmarks/teachers/README.md from the metadata of the files there are."""
    rows = []
    for task in filter(lambda task: teacher_path(task).exists(), TASKS):
        provenance = teacher(task).provenance
        result = provenance.get("evaluation", {})
        if "dataset_normalized_mean" not in result:
            continue
        chosen = ", ".join(f"{name} {value:,}" for name, value in TEACHERS[task].items() if name != "algorithm")
        returns = f"{result['return_mean']:.0f} ± {result['return_std']:.0f}"
        normalized = f"{result['normalized_mean']:.1f} ± {result['normalized_std']:.1f}"
        q = f"{result['mean_q']:.0f} ± {result['std_q']:.0f}"
        behavior = f"{result['dataset_normalized_mean']:.1f}"
        rows.append(
            f"| {task} | {provenance['algorithm']} | {chosen} | {returns} | {normalized} | {behavior} | {q} |\n"
        )
    report.write(ROOT / "benchmarks/teachers/README.md", PAGE + "".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; default: those missing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    options = parser.parse_args()
    if unknown := sorted(set(options.tasks) - set(TASKS)):
        raise SystemExit(f"no such tasks: {unknown}; there are {TASKS}")
    if options.tasks:
        train_all(options.tasks, options.jobs)
    else:
        train_missing(TASKS, options.jobs)
    write_page()


if __name__ == "__main__":
    main()
