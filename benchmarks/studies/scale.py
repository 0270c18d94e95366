"""What a dataset that memory does not hold costs, stage by stage: seconds and peaks by the number of transitions.

python -m benchmarks.studies.scale --rows 1e5 1e6 1e7 3e7 --folder /data/scale
python -m benchmarks.studies.scale --rows 3e7 --folder /data/scale --objective av-pbc    # no density; dbc: no teacher

The transitions are HalfCheetah's (the suite's "halfcheetah/medium") as often as the rows need, each state moved by a
normal 0.05 standard deviations. They are written once, block by block, to a folder of .npy files, without next
observations, so that loading has to leave rows out. Every number of rows has a process of its own.

`anonymous` is the memory that the process itself asked for; `resident` counts the pages of mapped files that the system
keeps while it has room, too. A row a stage goes to results/scale.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import sdw_fast as sdw
from benchmarks.studies import tasks
from benchmarks.table import RESULTS, append, origin

TASK = "halfcheetah/medium"
STEPS = 100
SPREAD = 0.05  # standard deviations that a copied state is moved by


def write(folder: Path, rows: int) -> None:
    """Writes the columns, unless they are there."""
    if folder.exists():
        return
    data = tasks.dataset(TASK)
    columns = {
        "observations": data.observations,
        "actions": data.actions,
        "rewards": data.require_rewards(),
        "terminations": data.terminations,
        "truncations": data.truncations,
    }
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    rng, scale = np.random.default_rng(0), data.units.states.scale.astype(np.float32)
    for name, column in columns.items():
        shape = (rows, *column.shape[1:])
        file = np.lib.format.open_memmap(unfinished / f"{name}.npy", "w+", column.dtype, shape)
        for start in range(0, rows, len(data)):
            part = column[: rows - start]
            if name == "observations":
                part = part + SPREAD * scale * rng.standard_normal(part.shape, dtype=np.float32)
            file[start : start + len(part)] = part
        file.flush()
    np.save(unfinished / "env_id.npy", np.array(data.env_id))
    unfinished.rename(folder)


def memory(name: str) -> float:
    """A figure of this process in GB: RssAnon, or VmHWM, its peak with the pages of files."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e9


@contextlib.contextmanager
def stage(name: str, rows: int, steps: int = 1) -> Iterator[None]:
    """Measures a block, or each of the steps that it takes, and adds its row."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    peak, done = memory("RssAnon"), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, memory("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    began, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        done.set()
        watching.join()
    row: dict[str, Any] = {"study": "scale", "rows": rows, "stage": name}
    row |= {"seconds": round(seconds / steps, 3), "cpu": round(cpu / steps, 3)}
    row |= {"anonymous": round(peak, 3), "resident": round(memory("VmHWM"), 3)}
    print(row, flush=True)
    append(RESULTS / "scale.jsonl", {**row, **origin()})


def measure(folder: Path, rows: int, objective: str) -> None:
    """From the folder to outer steps, in this process."""
    config = sdw.DistillConfig(objective=objective, steps=STEPS)
    with stage("load", rows):
        data = sdw.load_dataset(folder)
    teacher = tasks.teacher(TASK)
    if objective == "sdw":
        with stage("density", rows):
            sdw.log_density(data, k=config.k)
        with stage("density, again", rows):
            sdw.log_density(data, k=config.k)
    with stage(f"targets and weights, {objective}", rows):
        problem = sdw.outer_problem(data, teacher, config)
    with stage("start", rows):
        distiller = sdw.Distiller(problem, sdw.real_pairs(data, config.size), config)
        distiller.step()
    with stage("outer step", rows, STEPS - 1):
        for _ in range(STEPS - 1):
            distiller.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e5, 1e6])
    parser.add_argument("--folder", type=Path, required=True, help="for the columns, about 97 bytes a row; kept")
    parser.add_argument("--objective", choices=["sdw", "av-pbc", "dbc"], default="sdw")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        [rows] = map(int, options.rows)
        measure(options.folder / str(rows), rows, options.objective)
        return
    for rows in map(int, options.rows):
        write(options.folder / str(rows), rows)
        command = [sys.executable, "-m", "benchmarks.studies.scale", "--inside", "--objective", options.objective]
        subprocess.run([*command, "--rows", str(rows), "--folder", options.folder], check=True, env=os.environ)


if __name__ == "__main__":
    main()
