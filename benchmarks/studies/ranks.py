"""What ranks cost and save: exact neighbors over processes of one thread each, and outer steps.

python -m benchmarks.studies.ranks knn copies:states.npy --rows 1e6 --ranks 1 2
python -m benchmarks.studies.ranks knn surface:17 --rows 1e5 --ranks 1 2 4 8
python -m benchmarks.studies.ranks default reference --ranks 1 2

Steps are those of random data, with one initialization a rank: R ranks do R times the work of one, and the figure is
initializations a second. Their share of waiting is the all-reduce, which includes waiting for the slowest rank.

Neighbors by one rank are `sdw_fast.ops.knn` with one thread. Seconds are those of the wall clock, and CPU seconds of
the busiest rank, which other work on the machine disturbs less. Some rows of each rank are checked against all others.
A row a number of ranks goes to results/ranks.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sdw_fast as sdw
from benchmarks.bench_knn import K, source
from benchmarks.studies.work import one_thread
from benchmarks.table import RESULTS, append, origin
from sdw_fast import distributed
from sdw_fast.ranks import close_group


def neighbors(rank: int, size: int, folder: Path, name: str, rows: int) -> None:
    """A rank's share of the search, with what it took; every rank draws all rows and keeps its own."""
    one_thread()
    everything = torch.from_numpy(np.ascontiguousarray(source(name, rows)))
    points = everything.tensor_split(size)[rank].clone()
    traffic: list[distributed.Traffic] = []
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
        dist.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    if size > 1:
        distances, numbers = distributed.knn(points, k=K, traffic=traffic)
    else:
        distances, numbers = sdw.ops.knn(points, k=K)
    figures = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    figures["wrong"] = wrong(everything, sum(map(len, everything.tensor_split(size)[:rank])), distances, numbers)
    if traffic:
        figures |= {"moved": traffic[0].rows, "share": traffic[0].share, "bytes": traffic[0].bytes}
        close_group()
    torch.save(figures, folder / f"{rank}.pt")


def wrong(everything: torch.Tensor, first: int, distances: torch.Tensor, numbers: torch.Tensor) -> int:
    """Of CHECKED of a rank's rows, which begin at `first`, those whose neighbors are not what all distances say."""
    count = 0
    for row in torch.linspace(0, len(distances) - 1, CHECKED).long().tolist():
        squared = (everything.double() - everything[first + row].double()).square().sum(1)
        squared[first + row] = torch.inf
        nearest = squared.topk(K, largest=False, sorted=True).values
        own = squared[numbers[row]]
        right = torch.equal(own, nearest) and torch.equal(distances[row], nearest.sqrt().float())
        count += not (right and len(numbers[row].unique()) == K)
    return count


SHAPES: dict[str, dict[str, Any]] = {"default": {}, "reference": {"inner_width": None, "inner_momentum": 0.0}}
STEPS = 20
CHECKED = 50  # rows of each rank whose neighbors are compared with their distances to all rows


def steps(rank: int, size: int, folder: Path, name: str, rows: int) -> None:
    """Outer steps of a shape on `rows` random states, after two that warm up."""
    one_thread()
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    rng = np.random.default_rng(0)
    states, ends = rng.standard_normal((rows, 17), dtype=np.float32), np.arange(rows) % 1000 == 999
    columns = {"observations": states, "actions": np.tanh(states[:, :6]), "terminations": ends}
    data = sdw.load_dataset({**columns, "rewards": np.ones(rows), "truncations": np.zeros(rows, bool)})
    config = sdw.DistillConfig(objective="dbc", select="last", adapt_inner_lr=False, **SHAPES[name])
    problem = sdw.outer_problem(data, None, config)
    distiller = sdw.Distiller(problem, sdw.real_pairs(data, config.size), config)
    waited = 0.0
    if distiller.ranks:
        add = distiller.ranks.add

        def timed_add(tensors: list[torch.Tensor]) -> None:
            nonlocal waited
            began = time.perf_counter()
            add(tensors)
            waited += time.perf_counter() - began

        distiller.ranks.add = timed_add  # type: ignore[method-assign]
    for _ in range(2):
        distiller.step()
    waited, began, cpu = 0.0, time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        distiller.step()
    seconds = time.perf_counter() - began
    figures = {"seconds": seconds / STEPS, "cpu": (time.process_time() - cpu) / STEPS, "waiting": waited / seconds}
    torch.save(figures, folder / f"{rank}.pt")
    if size > 1:
        close_group()


def measured(work: Callable[..., None], size: int, name: str, rows: int) -> dict[str, Any]:
    """Of all ranks: the slowest's seconds, the mean share of queries that travelled, and megabytes sent."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (size, Path(folder), name, rows), nprocs=size)
        figures = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(size)]
    result = {key: round(max(each[key] for each in figures), 3) for key in ("seconds", "cpu")}
    if work is steps:
        result["waiting"] = round(max(each["waiting"] for each in figures), 4)
        result["initializations_per_second"] = round(size / result["seconds"], 2)
    else:
        result |= {"checked": size * CHECKED, "wrong": sum(each["wrong"] for each in figures)}
    if work is neighbors and size > 1:
        result["travelled"] = round(float(np.mean([each["share"] for each in figures])), 4)
        result["megabytes"] = round(sum(each["bytes"] for each in figures) / 1e6, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="+", metavar="WHAT", help="knn SOURCE, as benchmarks.bench_knn takes it; or shapes"
    )
    parser.add_argument("--rows", type=float, default=1e5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    work, names = (neighbors, options.what[1:]) if options.what[0] == "knn" else (steps, options.what)
    for _, name, size in itertools.product(range(options.repeats), names, options.ranks):
        label = re.sub(r"[^:]*/", "", name) if name.endswith(".npy") else name
        row = {"study": work.__name__, "source": label, "rows": int(options.rows), "ranks": size}
        row |= measured(work, size, name, int(options.rows))
        print(row, flush=True)
        append(RESULTS / "ranks.jsonl", {**row, **origin()})


if __name__ == "__main__":
    main()
