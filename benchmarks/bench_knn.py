"""knn: the self-join of a dataset, k = 10, beside other libraries, and how each grows with the number of rows.

python -m benchmarks.bench_knn                                          # synthetic surfaces, 10^4 and 10^5 rows
python -m benchmarks.bench_knn states.npy uniform:64 --rows 1e5 1e6     # real states: an .npy file (M, D), normalized
python -m benchmarks.bench_knn states.npy --rows 1e6 --verify 20000     # every index against float64 brute force
python -m benchmarks.bench_knn copies:states.npy --rows 1e7 --peers     # ours alone, on more rows than the file has
python -m benchmarks.bench_knn --device cuda --verify 20000             # on a GPU: 10^5 to 10^7 rows, its own peers

A source is uniform:D, gaussian:D, surface:D (near a curved surface of dimension 2/3 D), an .npy file, whatever
`load_dataset` takes (its normalized observations), or copies:SOURCE: that source as often as the rows need, each number
moved by a normal 0.05 standard deviations. Peers that answer query by query are timed on 2% of the queries, at
least 500, and scaled; building their index is not scaled. Approximate peers carry their measured recall. On a GPU the
points lie there before the clock starts, ours is the median of three runs, and --verify compares with our CPU join.
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
from benchmarks.peers_knn import APPROXIMATE, GPU_PEERS, PEERS, K, recall, timed, without_self
from benchmarks.table import RESULTS, machine
from benchmarks.timing import Row, Table, format_seconds, peak_memory, record
from sdw_fast.ops import knn
from sdw_fast.ops._knn_cuda import CudaKnnIndex
from sdw_fast.ops._knn_frame import Frame
from sdw_fast.ops._knn_search import Rows


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
            if peer == "PyNNDescent":
                PEERS[peer](points[:2000], np.arange(10))  # numba compiles
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


def compare_on_gpu(name: str, points: torch.Tensor, fraction: float) -> Table:
    """The self-join of points that lie on a GPU: ours, and peers on a part of the queries."""
    rows, device = len(points), points.device
    count = max(500, min(round(fraction * rows), round(4e10 / rows)))  # brute force of 4e10 distances at most
    sample = torch.from_numpy(np.random.default_rng(1).permutation(rows)[:count]).to(device)
    share = len(sample) / rows
    ours = Row("sdw_fast")
    table = Table(f"knn self-join on {device.type}, {name}, M = {rows:.0e}, D = {points.shape[1]}, k = {K}", [ours])
    knn(points[:2000], k=K)
    if on_gpu := device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(3):
        seconds, (_, indices) = timed(lambda: knn(points, k=K))
        ours.samples.append(seconds)
    if on_gpu:
        ours.peak_bytes = torch.cuda.max_memory_allocated() - before
    ours.median, ours.ratio = statistics.median(ours.samples), 1.0
    exact = indices[sample].cpu().numpy()
    for peer, run in GPU_PEERS.items():
        row = Row(peer)
        table.rows.append(row)
        try:
            build, query, found = run(points, sample)
        except ImportError as error:
            row.skipped = str(error)
            continue
        row.samples = [build + query / share]
        row.median = row.samples[0]
        row.ratio = row.median / ours.median
        if query and share < 1:
            row.name += f" ({len(sample)} queries scaled)"
        row.name += f", recall {recall(found, exact):.4f}"
    return table


def parts_of_the_time(points: torch.Tensor) -> str:
    """Where the time of our CUDA kernel goes, and what pruning leaves to do."""
    rows, device = len(points), points.device
    axes, frame = timed(lambda: Frame(Rows(points), float(points.abs().max())))
    rotation, coordinates = timed(lambda: frame.coordinates(points))
    tree, index = timed(lambda: CudaKnnIndex(points, coordinates))
    join = index.self_join(K)
    row, found = (torch.empty(shape, dtype=torch.int64, device=device) for shape in [(rows,), (rows, K)])
    squared = torch.empty((rows, K), dtype=torch.float64, device=device)
    search, _ = timed(lambda: join.search(0, join.groups, row, squared, found))
    tested, scanned, again = join.counts.sum(0, dtype=torch.int64).tolist()
    seconds = zip(("axes", "coordinates", "tree", "search"), (axes, rotation, tree, search), strict=True)
    return (
        f"  {', '.join(f'{part} {format_seconds(time)}' for part, time in seconds)}; leaf boxes tested a group of 32: "
        f"{tested / join.groups:.0f}, points scanned a query: {64 * scanned / rows:.0f}, searched again: {again}"
    )


def agreement(points: torch.Tensor, count: int) -> str:
    """Compares `count` sampled rows with those of our CPU join; a tie may go either way."""
    rows, on_host = len(points), points.cpu().numpy()
    sample = np.sort(np.random.default_rng(2).permutation(rows)[:count])
    found = knn(points, k=K)[1].cpu().numpy()[sample]
    expected = without_self(knn(on_host[sample], on_host, k=K + 1)[1], sample)

    def squared(indices: np.ndarray) -> np.ndarray:
        return np.square(on_host[sample][:, None].astype(np.float64) - on_host[indices]).sum(-1)

    different = found != expected
    tie = np.isclose(squared(found), squared(expected), rtol=1e-13, atol=0)
    wrong, ties = int((different & ~tie).any(1).sum()), int((different & tie).any(1).sum())
    return f"  of {len(sample)} rows {wrong} differ from the CPU's ({ties} in ties only)"


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
    points = source(name, rows)
    _, indices = knn(points, k=K)
    sample = np.sort(np.random.default_rng(2).permutation(rows)[:count])
    wrong = ties = 0
    x = torch.from_numpy(points).double()
    norm = x.square().sum(1)
    for start in range(0, count, 256):
        some = torch.from_numpy(sample[start : start + 256])
        candidates = torch.addmm(norm, x[some], x.T, alpha=-2).topk(K + 6, 1, largest=False).indices.sort(1).values
        exact = (x[some][:, None] - x[candidates]).square().sum(-1)
        exact[candidates == some[:, None]] = torch.inf
        exact, order = exact.sort(dim=1, stable=True)
        expected = candidates.gather(1, order)[:, :K].numpy()
        found = indices[some.numpy()]
        squared = (x[some][:, None] - x[torch.from_numpy(found)]).square().sum(-1)
        different = found != expected
        tie = np.isclose(squared.numpy(), exact[:, :K].numpy(), rtol=1e-13, atol=0)
        wrong += int((different & ~tie).any(1).sum())
        ties += int((different & tie).any(1).sum())
    return f"{name}, M = {rows:.0e}: of {count} rows {wrong} differ from float64 brute force ({ties} in ties only)"


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


def run_on_gpu(
    device: str, sources: list[str], sizes: list[float], verified: int, fraction: float, out: Path
) -> list[Table]:
    """Prints every table as it comes, with where the time goes, and at the end one line each."""
    done, lines = [], []
    for name in sources:
        for rows in sorted(map(int, sizes)):
            points = torch.from_numpy(source(name, rows)).to(device)
            table = compare_on_gpu(name, points, fraction)
            print(f"\n{table}\n{parts_of_the_time(points)}", flush=True)
            said = agreement(points, verified) if verified else ""
            print(said, flush=True)
            record(table, f"knn/{device},{Path(name).stem.replace(':', '')}-{rows}", out)
            done.append(table)
            ratios = " ".join(f"{row.ratio:>9.3g}×" if row.ratio else f"{'skipped':>10}" for row in table.rows[1:])
            seconds = format_seconds(table.rows[0].median or 0)
            lines.append(f"{Path(name).stem:<20} {rows:>9.0e} {seconds:>10} {ratios}{said}")
    heading = " ".join(f"{name.removeprefix('sdw_fast on ')[:10]:>10}" for name in GPU_PEERS)
    print("\n" + "\n".join([f"{'points':<20} {'rows':>9} {'sdw_fast':>10} {heading}", *lines]), flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=["surface:11", "surface:17"])
    parser.add_argument("--rows", nargs="+", type=float, help="default: 1e4 1e5; on a GPU 1e5 1e6 1e7")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), metavar="NAME")
    parser.add_argument("--fraction", type=float, default=0.02, help="of the queries that a slow peer is timed on")
    parser.add_argument("--memory", action="store_true", help="peak memory of our call, in a fresh process")
    parser.add_argument(
        "--verify", type=int, default=0, metavar="N",
        help="compare N rows with float64 brute force, time nothing; on a GPU: with our CPU join, besides the times",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables of results")
    options = parser.parse_args()
    torch.set_num_threads(sdw_fast.get_num_threads())
    os.environ.setdefault("OMP_NUM_THREADS", str(sdw_fast.get_num_threads()))
    print("\n".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("no GPU: torch.cuda.is_available() is False")
        print(f"gpu: {torch.cuda.get_device_name()}", flush=True)
        sizes = options.rows or [1e5, 1e6, 1e7]
        run_on_gpu("cuda", options.sources, sizes, options.verify, options.fraction, options.out)
        return
    options.rows = options.rows or [1e4, 1e5]
    for name in options.sources:
        if options.verify:
            for rows in options.rows:
                print(verify(name, int(rows), options.verify), flush=True)
            continue
        done = []
        label = Path(_without_folders(name)).stem.replace(":", "")
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
