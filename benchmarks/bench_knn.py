"""knn: the self-join of a dataset, k = 10, beside other libraries, and how each grows with the number of rows.

python -m benchmarks.bench_knn                                          # synthetic surfaces, 10^4 and 10^5 rows
python -m benchmarks.bench_knn states.npy uniform:64 --rows 1e5 1e6     # real states: an .npy file (M, D), normalized
python -m benchmarks.bench_knn states.npy --rows 1e6 --verify 20000     # every index against float64 brute force
python -m benchmarks.bench_knn copies:states.npy --rows 1e7 --peers     # ours alone, on more rows than the file has

A source is uniform:D, gaussian:D, surface:D (near a curved surface of dimension 2/3 D), an .npy file, whatever
`load_dataset` takes (its normalized observations), or copies:SOURCE: that source as often as the rows need, each number
moved by a normal 0.05 standard deviations. Peers that answer query by query are timed on 2% of the queries, at
least 500, and scaled; building their index is not scaled. Approximate peers carry their measured recall.
bench_knn_gpu.py has the same on a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

import sdw_fast
from benchmarks.peers_knn import APPROXIMATE, COMPILED_AT_FIRST, PEERS, K, recall, timed
from benchmarks.table import RESULTS, machine
from benchmarks.timing import Row, Table, peak_memory, record
from sdw_fast.ops import knn


def source(name: str, rows: int) -> np.ndarray:
    """Returns (rows, D) float32 points; a file with fewer rows is an error."""
    rng = np.random.default_rng(0)
    kind, _, number = name.partition(":")
    if kind == "copies":
        states = _standardized(_states(number).astype(np.float32))
        points = np.resize(states, (rows, states.shape[1]))
        points += np.float32(0.05) * rng.standard_normal(points.shape, dtype=np.float32)
        return points
    if kind in ("uniform", "gaussian", "surface"):
        dimension = int(number)
        if kind == "uniform":
            return rng.random((rows, dimension), dtype=np.float32)
        if kind == "gaussian":
            return rng.standard_normal((rows, dimension), dtype=np.float32)
        intrinsic = max(1, 2 * dimension // 3)
        latent = rng.standard_normal((rows, intrinsic)) @ rng.standard_normal((intrinsic, dimension))
        points = np.sin(latent / 2) + 0.01 * rng.standard_normal((rows, dimension))
    else:
        points = _states(name)
    if len(points) < rows:
        raise SystemExit(f"{name} has {len(points)} rows, {rows} are wanted")
    # A random subset: another size of the same distribution.
    return _standardized(points[np.sort(rng.permutation(len(points))[:rows])].astype(np.float32))


def _without_folders(name: str) -> str:
    return re.sub(r"[^:]*/", "", name) if name.endswith(".npy") else name


def _states(name: str) -> np.ndarray:
    return np.load(name) if name.endswith(".npy") else sdw_fast.load_dataset(name).normalized_observations()


def _standardized(points: np.ndarray) -> np.ndarray:
    return (points - points.mean(0)) / (points.std(0) + 1e-3)


def compare(name: str, rows: int, peers: list[str], fraction: float = 0.02) -> Table:
    """Times the self-join: ours before and after every peer, and a ratio to the mean of the two."""
    points = source(name, rows)
    sample = np.random.default_rng(1).permutation(rows)[: min(rows, max(500, round(fraction * rows)))]
    share = len(sample) / rows
    knn(points[:2000], k=K)  # threads, page tables, the import of what is needed
    ours = Row("sdw_fast")
    table = Table(f"knn self-join, {_without_folders(name)}, M = {rows:.0e}, D = {points.shape[1]}, k = {K}", [ours])

    def run_ours() -> np.ndarray:
        seconds, (_, indices) = timed(lambda: knn(points, k=K))
        ours.samples.append(seconds)
        return indices

    exact = run_ours()[sample]
    for peer in peers:
        row = Row(peer)
        table.rows.append(row)
        try:
            if peer in COMPILED_AT_FIRST:
                PEERS[peer](points[:2000], np.arange(10))
            build, query, found = PEERS[peer](points, sample)
        except ImportError as error:
            row.skipped = str(error)
            continue
        run_ours()
        row.samples = [build + query / share]
        row.median = row.samples[0]
        row.ratio = row.median / statistics.mean(ours.samples[-2:])
        if peer != "PyNNDescent" and share < 1:
            row.name += f" (build {build:.3g} s + {len(sample)} queries scaled)"
        if peer in APPROXIMATE:
            row.name += f", recall {recall(found, exact):.4f}"
    if not peers:
        run_ours()
    ours.median = statistics.median(ours.samples)
    ours.ratio = 1.0
    return table


def growth(tables: list[Table]) -> str:
    """The exponent of each contender: the slope of log seconds on log rows."""
    lines = ["growth exponents over M = " + ", ".join(table.title.split("M = ")[1].split(",")[0] for table in tables)]
    rows = [float(table.title.split("M = ")[1].split(",")[0]) for table in tables]
    for i, first in enumerate(tables[0].rows):
        seconds = [table.rows[i].median for table in tables]
        if all(seconds):
            slope = np.polyfit(np.log(rows), np.log(np.array(seconds, dtype=float)), 1)[0]
            lines.append(f"  {first.name.split(' (')[0].split(',')[0]:<20} {slope:.2f}")
    return "\n".join(lines)


def verify(name: str, rows: int, count: int) -> str:
    """Compares `count` sampled rows of the self-join with brute force in float64; a tie may go either way."""
    points = torch.from_numpy(source(name, rows))
    return f"{name}, M = {rows:.0e}: {agreement(points, knn(points, k=K)[1], count)}"


def agreement(points: torch.Tensor, indices: torch.Tensor, count: int) -> str:
    """Compares `count` sampled rows of a self-join with brute force in float64 on the same device."""
    rows, device = len(points), points.device
    sample = torch.from_numpy(np.sort(np.random.default_rng(2).permutation(rows)[:count])).to(device)
    wrong = ties = 0
    x = points.double()
    norm = x.square().sum(1)
    for some in sample.split(min(256, max(1, (1 << 28) // rows))):  # 2 GiB of distances at most
        candidates = torch.addmm(norm, x[some], x.T, alpha=-2).topk(K + 6, 1, largest=False).indices.sort(1).values
        exact = (x[some][:, None] - x[candidates]).square().sum(-1)
        exact[candidates == some[:, None]] = torch.inf
        exact, order = exact.sort(dim=1, stable=True)
        found = indices[some]
        squared = (x[some][:, None] - x[found]).square().sum(-1)
        different = found != candidates.gather(1, order)[:, :K]
        tie = torch.isclose(squared, exact[:, :K], rtol=1e-13, atol=0)
        wrong += int((different & ~tie).any(1).sum())
        ties += int((different & tie).any(1).sum())
    return f"of {len(sample)} rows {wrong} differ from float64 brute force ({ties} in ties only)"


def prepare(data: str, rows: int) -> Callable[[], object]:
    """For peak memory: our call on prepared points."""
    points = source(data, rows)
    return lambda: knn(points, k=K)


def tables(mode: str) -> Iterator[tuple[str, Callable[[], Table]]]:
    """For benchmarks.run: synthetic surfaces like the suite's states; all dimensions in a sweep."""
    quick = ["FAISS flat", "FAISS IVF", "pykdtree", "SciPy cKDTree"]
    if mode == "sweep":
        for data in [f"{kind}:{dimension}" for kind in ("uniform", "gaussian") for dimension in (3, 11, 17, 64)]:
            for rows in (10_000, 100_000):
                yield f"knn/{data.replace(':', '')}-{rows}", partial(compare, data, rows, quick)
        return
    for dimension in (11, 17):
        rows = 20_000 if mode == "quick" else 100_000
        yield (
            f"knn/surface{dimension}",
            partial(compare, f"surface:{dimension}", rows, quick if mode == "quick" else list(PEERS)),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=["surface:11", "surface:17"])
    parser.add_argument("--rows", nargs="+", type=float, default=[1e4, 1e5])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), metavar="NAME")
    parser.add_argument("--fraction", type=float, default=0.02, help="of the queries that a slow peer is timed on")
    parser.add_argument("--memory", action="store_true", help="peak memory of our call, in a fresh process")
    parser.add_argument(
        "--verify", type=int, default=0, metavar="N", help="compare N rows with float64 brute force, time nothing"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables of results")
    options = parser.parse_args()
    torch.set_num_threads(sdw_fast.get_num_threads())
    os.environ.setdefault("OMP_NUM_THREADS", str(sdw_fast.get_num_threads()))
    print("\n".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    for name in options.sources:
        if options.verify:
            for rows in options.rows:
                print(verify(name, int(rows), options.verify), flush=True)
            continue
        done = []
        label = re.sub(r"\.npy$", "", _without_folders(name)).replace("/", "-").replace(":", "")
        for rows in sorted(options.rows):
            table = compare(name, int(rows), options.peers, options.fraction)
            if options.memory:
                table.rows[0].peak_bytes = peak_memory("benchmarks.bench_knn:prepare", data=name, rows=int(rows))
            done.append(table)
            print(f"\n{table}", flush=True)
            record(table, f"knn/{label}-{int(rows)}", options.out)
        if len(done) > 1:
            print(f"\n{growth(done)}", flush=True)


if __name__ == "__main__":
    main()
