"""`python -m benchmarks.run`: every op beside its peers in one run; prints tables, adds them to benchmarks/results.

python -m benchmarks.run              # the reference shapes, all peers, memory peaks
python -m benchmarks.run --quick      # the main peers only, under three minutes
python -m benchmarks.run --sweep      # N, width, depth, T, M, threads
python -m benchmarks.run --only 'unrolled_bc/(reference|narrow)'
python -m benchmarks.run --show       # prints the newest recorded tables and measures nothing
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.table import RESULTS, machine
from benchmarks.timing import Table, record, recorded

FOLDER = Path(__file__).resolve().parent


def tables(mode: str) -> Iterator[tuple[str, Callable[[], Table]]]:
    """Yields (name, measurement) of every bench_*.py but those for a GPU, which are commands of their own."""
    for path in sorted(FOLDER.glob("bench_*.py")):
        if not path.stem.endswith("_gpu"):
            yield from importlib.import_module(f"benchmarks.{path.stem}").tables(mode)


def show(folder: Path, only: str) -> None:
    """Prints the newest recorded tables whose name matches."""
    for name, (table, row) in recorded(folder).items():
        if re.search(only, name):
            where = f"commit {row['commit']}, {row['date'][:10]}, {row['machine']['threads']['sdw_fast']} threads"
            print(f"\n{name}: {where}\n{table}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--quick", action="store_const", const="quick", dest="mode", default="full")
    modes.add_argument("--sweep", action="store_const", const="sweep", dest="mode")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the tables whose name matches")
    parser.add_argument("--list", action="store_true", help="print the names of the tables and stop")
    parser.add_argument("--show", action="store_true", help="print the newest recorded tables and stop")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables of results")
    options = parser.parse_args()
    if options.show:
        show(options.out, options.only)
        return
    chosen = [(name, make) for name, make in tables(options.mode) if re.search(options.only, name)]
    if options.list or not chosen:
        print("\n".join(name for name, _ in chosen) or f"no table matches {options.only!r}")
        return
    print("\n".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    for name, make in chosen:
        table = make()
        print(f"\n{table}", flush=True)
        record(table, name, options.out)


if __name__ == "__main__":
    main()
