"""knn on a GPU: the self-join of points that lie there, k = 10; ours first, then what else can do it.

python -m benchmarks.bench_knn_gpu surface:17 --rows 1e6 --verify 5000      # sources as bench_knn takes them
python -m benchmarks.bench_knn_gpu surface:17 --rows 1e7 --peers            # ours alone

Surfaces are made on the device. Ours is the median of three runs, or of as many as begin within ten seconds; peers that
take every query by itself are timed on a part of them and scaled. --verify compares with float64 brute force on the
same device. Everything is printed and recorded as soon as it is known.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_knn import agreement, source
from benchmarks.peers_knn import GPU_PEERS, K, recall, timed
from benchmarks.table import RESULTS, machine
from benchmarks.timing import Row, Table, cells, format_seconds, record
from sdw_fast import _C
from sdw_fast.ops import knn
from sdw_fast.ops._knn_cuda import CudaKnnIndex
from sdw_fast.ops._knn_frame import Frame
from sdw_fast.ops._knn_search import Rows


def points_on(device: str, name: str, rows: int) -> torch.Tensor:
    """Points of a source on a device; a surface, as `bench_knn.source` has it, is drawn there."""
    kind, _, number = name.partition(":")
    if kind != "surface":
        return torch.from_numpy(source(name, rows)).to(device)
    dimension = int(number)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    intrinsic = max(1, 2 * dimension // 3)
    points = (normal(rows, intrinsic) @ normal(intrinsic, dimension) / 2).sin_() + 0.01 * normal(rows, dimension)
    return (points - points.mean(0)) / (points.std(0, correction=0) + 1e-3)


def compare(name: str, points: torch.Tensor, peers: list[str], verified: int, fraction: float, out: Path) -> Table:
    """The self-join of points that lie on a device."""
    rows, device = len(points), points.device
    count = max(500, min(round(fraction * rows), round(4e10 / rows)))  # brute force of 4e10 distances at most
    sample = torch.from_numpy(np.random.default_rng(1).permutation(rows)[:count]).to(device)
    share = len(sample) / rows
    ours = Row("sdw_fast", ratio=1.0)
    table = Table(f"knn self-join on {device.type}, {name}, M = {rows:.0e}, D = {points.shape[1]}, k = {K}", [ours])
    case = f"knn/{device.type},{Path(name).stem.replace(':', '')}-{rows}"
    knn(points[:2000], k=K)
    if on_gpu := device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    while len(ours.samples) < 3 and sum(ours.samples) < 10:
        seconds, (_, indices) = timed(lambda: knn(points, k=K))
        ours.samples.append(seconds)
    if on_gpu:
        ours.peak_bytes = torch.cuda.max_memory_allocated() - before
    ours.median = statistics.median(ours.samples)
    print(f"\n{table}", flush=True)
    record(table, case, out)
    if on_gpu and hasattr(_C, "knn_cuda"):
        print(parts_of_the_time(points), flush=True)
    if verified:
        print(f"  {agreement(points, indices, verified)}", flush=True)
    exact = indices[sample].cpu().numpy()
    for peer in peers:
        row = Row(peer)
        table.rows.append(row)
        try:
            build, query, found = GPU_PEERS[peer](points, sample)
        except Exception as error:  # whatever its library raises; a missing one costs a line
            row.skipped = f"{type(error).__name__}: {error}"
        else:
            row.samples = [build + query / share]
            row.median = row.samples[0]
            row.ratio = row.median / ours.median
            row.name += f" ({len(sample)} queries scaled)" * bool(query and share < 1)
            row.name += f", recall {recall(found, exact):.4f}"
        print("  ".join(cells(row, memory=False)), flush=True)
        record(table, case, out)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=["surface:17"])
    parser.add_argument("--rows", nargs="+", type=float, default=[1e5, 1e6])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--peers", nargs="*", default=list(GPU_PEERS), choices=list(GPU_PEERS), metavar="NAME")
    parser.add_argument("--fraction", type=float, default=0.02, help="of the queries that a slow peer is timed on")
    parser.add_argument("--verify", type=int, default=0, metavar="N", help="compare N rows with float64 brute force")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables of results")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False")
    print("\n".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    for name in options.sources:
        for rows in sorted(map(int, options.rows)):
            points = points_on(options.device, name, rows)
            compare(name, points, options.peers, options.verify, options.fraction, options.out)


if __name__ == "__main__":
    main()
