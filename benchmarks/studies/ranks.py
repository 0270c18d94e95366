"""What ranks cost and save: exact neighbors over processes of one thread each, and outer steps.

python -m benchmarks.studies.ranks knn copies:states.npy --rows 1e6 --ranks 1 2
python -m benchmarks.studies.ranks knn surface:17 --rows 1e5 --ranks 1 2 4 8

One rank is `sdw_fast.ops.knn` with one thread. Seconds are those of the wall clock, and CPU seconds of the busiest
rank, which other work on the machine disturbs less; a row a number of ranks goes to results/ranks.jsonl.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
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


def neighbors(rank: int, size: int, folder: Path, name: str, rows: int) -> None:
    """A rank's share of the search, with what it took; every rank draws all rows and keeps its own."""
    one_thread()
    points = torch.from_numpy(np.array_split(source(name, rows), size)[rank].copy())
    traffic: list[distributed.Traffic] = []
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
        dist.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    if size > 1:
        distributed.knn(points, k=K, traffic=traffic)
    else:
        sdw.ops.knn(points, k=K)
    figures = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    if traffic:
        figures |= {"moved": traffic[0].rows, "share": traffic[0].share, "bytes": traffic[0].bytes}
        dist.destroy_process_group()
    torch.save(figures, folder / f"{rank}.pt")


def measured(size: int, name: str, rows: int) -> dict[str, Any]:
    """Of all ranks: the slowest's seconds, the mean share of queries that travelled, and megabytes sent."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(neighbors, (size, Path(folder), name, rows), nprocs=size)
        figures = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(size)]
    result = {key: round(max(each[key] for each in figures), 3) for key in ("seconds", "cpu")}
    if size > 1:
        result["travelled"] = round(float(np.mean([each["share"] for each in figures])), 4)
        result["megabytes"] = round(sum(each["bytes"] for each in figures) / 1e6, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["knn"])
    parser.add_argument("source", help="as benchmarks.bench_knn takes it")
    parser.add_argument("--rows", type=float, default=1e5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    label = Path(options.source).stem if options.source.endswith(".npy") else options.source
    for _ in range(options.repeats):
        for size in options.ranks:
            row = {"study": "knn", "source": label, "rows": int(options.rows), "ranks": size}
            row |= measured(size, options.source, int(options.rows))
            print(row, flush=True)
            append(RESULTS / "ranks.jsonl", {**row, **origin()})


if __name__ == "__main__":
    main()
