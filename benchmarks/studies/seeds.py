"""What one seed says: the README's example from ten seeds, with one thread and with two. Fills docs/results.md.

    python -m benchmarks.studies.seeds             # makes the rows that are missing, then the table
    python -m benchmarks.studies.seeds --tables    # fills the table, no more

A row of results/seeds.jsonl is a seed and a number of threads: the hash of its set, and what policies cloned on it
return. A set that has the bits of one that was measured is not measured again.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import report, work
from benchmarks.studies.cells import TEST_SEED
from sdw_fast.cards import short_hash

TABLE, FOLDER = table.RESULTS / "seeds.jsonl", table.ROOT / "runs/seeds"
TASK, ENV = "hopper/medium", "Hopper-v5"
DISTILLED: dict[str, Any] = {"size": 256, "steps": 500, "objective": "sdw"}
SETTINGS: dict[str, Any] = {"transitions": 20_000, **DISTILLED, "episodes": 10}
SEEDS, THREADS = range(10), (1, 2)
CLONES, MEMBERS = 10, 10

Case = tuple[int, int]  # seed, threads


def results() -> dict[Case, table.Entries]:
    """The newest row with the settings of now of every case that has one."""
    return table.latest(table.read(TABLE, SETTINGS), "seed", "threads")


def dataset() -> sdw.TransitionDataset:
    """The README's, apart from datasets of the user's own."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    os.environ["MINARI_DATASETS_PATH"] = str(FOLDER)
    sdw.collect(TASK, steps=SETTINGS["transitions"], seed=0, progress=False)
    return sdw.load_dataset(TASK)


def measure(case: Case, data: sdw.TransitionDataset) -> None:
    """Makes one row."""
    seed, threads = case
    torch.set_num_threads(threads)
    sdw.set_num_threads(threads)
    began = time.process_time()
    synthetic = sdw.distill(data, sdw.Teacher.pretrained(TASK), seed=seed, progress=False, **DISTILLED)
    row: table.Entries = {
        "seed": seed,
        "threads": threads,
        "set": short_hash(synthetic.observations, synthetic.actions),
    }
    row["cpu_seconds"] = round(time.process_time() - began, 1)
    same = [other for other in results().values() if other["set"] == row["set"]]
    row |= {name: same[0][name] for name in ("policies", "ensemble")} if same else returns(synthetic)
    table.append(TABLE, {**row, "settings": SETTINGS, **table.origin()})
    print(row, flush=True)


def returns(synthetic: sdw.SyntheticDataset) -> table.Entries:
    """D4RL-normalized returns: of CLONES policies, the mean of each, and of one ensemble."""
    policies = [*work.clones(synthetic, CLONES), work.ensemble(synthetic, MEMBERS)]
    means = [
        float(np.mean(sdw.evaluate(policy, ENV, episodes=SETTINGS["episodes"], seed=TEST_SEED).normalized))
        for policy in policies
    ]
    return {"policies": np.round(means[:-1], 2).tolist(), "ensemble": round(means[-1], 2)}


def seeds_table(found: dict[Case, table.Entries]) -> str:
    """By number of threads: mean return ± standard deviation between seeds, and the range of the seeds."""
    rows = []
    for threads in THREADS:
        of = [found[seed, threads] for seed in SEEDS if (seed, threads) in found]
        if not of:
            continue
        same = sum(found.get((row["seed"], THREADS[0]), {}).get("set") == row["set"] for row in of)
        within = float(np.mean([np.std(row["policies"], ddof=1) for row in of]))
        of_seeds = [[float(np.mean(row["policies"])) for row in of], [row["ensemble"] for row in of]]
        figures = [f"{np.mean(x):.1f} ± {np.std(x, ddof=1):.1f} ({min(x):.0f} to {max(x):.0f})" for x in of_seeds]
        rows.append([str(threads), f"{same} of {len(of)}", *figures, f"{within:.1f}"])
    header = ["threads", "sets with the bits of one thread", "one policy", f"ensemble of {MEMBERS}"]
    return report.markdown([*header, "deviation between the policies of a set"], rows)


def write_page(page: Path = report.PAGE) -> None:
    """Fills the study's table."""
    report.fill("seeds", seeds_table(results()), page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="fill the table and stop")
    if not parser.parse_args().tables:
        data = dataset()
        for case in [(seed, threads) for threads in THREADS for seed in SEEDS]:
            if case not in results():
                measure(case, data)
    write_page()


if __name__ == "__main__":
    main()
