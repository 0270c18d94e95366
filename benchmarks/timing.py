"""What the benchmarks of all ops share: timing in turns, and peak memory in a fresh process.

contenders = [Contender("sdw_fast", lambda: ours(x)), Contender("peer", lambda: theirs(x))]
table = measure("op, M = 1000", contenders)       # the first contender is ours: ratios are relative to it
print(table)
record(table, "op/M=1000")                        # adds a row to benchmarks/results/op.jsonl
"""

from __future__ import annotations

import gc
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import sdw_fast
from benchmarks.table import RESULTS, ROOT, append, latest, origin, read

Builder = Callable[..., Callable[[], object]]
Sampler = Callable[[Callable[[], object], int], float]  # (run, repeats) -> seconds a call


class Unavailable(Exception):
    """Raised by a builder whose peer cannot run here; the message is the reason that the table prints."""


@dataclass(frozen=True)
class Contender:
    """One row of a table: a name and a zero-argument call that does the whole work once.

    `threads` is set for torch and sdw_fast before every sample (None: what torch has when the measurement begins);
    `skipped` is the reason why there is nothing to run.
    """

    name: str
    run: Callable[[], object] | None
    threads: int | None = None
    skipped: str = ""


def contender(name: str, build: Builder, *args: Any, threads: int | None = None) -> Contender:
    """Builds a contender by `build(*args)`; a missing package or an `Unavailable` peer becomes a skipped row."""
    try:
        return Contender(name, build(*args), threads)
    except (ImportError, Unavailable) as error:
        return Contender(name, None, threads, str(error) or type(error).__name__)


def contenders(
    builders: Mapping[str, Callable[..., Callable[[], object]]],
    names: Iterable[str],
    *args: Any,
    threads: int | None = None,
) -> list[Contender]:
    """Builds the named contenders, each by `builders[name](*args)`."""
    return [contender(name, builders[name], *args, threads=threads) for name in names]


@dataclass
class Row:
    """The samples of one contender (seconds a call, one a round) and its median relative to ours."""

    name: str
    samples: list[float] = field(default_factory=list)
    median: float | None = None
    ratio: float | None = None
    peak_bytes: int | None = None
    skipped: str = ""


@dataclass
class Table:
    """Rows in the order of the contenders; ratio > 1 means slower than the first row."""

    title: str
    rows: list[Row]

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        memory = any(row.peak_bytes is not None for row in self.rows)
        header = ["", "median", "quartiles", "× ours"] + ["peak memory"] * memory
        body = [cells(row, memory) for row in self.rows]
        widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]
        widths[-1] = len(header[-1])  # the reason of a skipped row may run over
        lines = [
            f"{line[0]:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))
            for line in [header, *body]
        ]
        return "\n".join([self.title, "-" * len(lines[0]), *(line.rstrip() for line in lines)])


def cells(row: Row, memory: bool) -> list[str]:
    """A row as a table shows it: name, median, quartiles, ratio, and peak memory if asked for."""
    peak = [format_bytes(row.peak_bytes) if row.peak_bytes is not None else ""] * memory
    if row.skipped:
        return [row.name, "skipped", "", f"({row.skipped.splitlines()[0][:100]})", *peak]
    if row.median is None:
        return [row.name, "", "", "", *peak]
    low, _, high = statistics.quantiles(row.samples, n=4) if len(row.samples) > 1 else [row.median] * 3
    quartiles = f"{format_seconds(low)} … {format_seconds(high)}"
    return [row.name, format_seconds(row.median), quartiles, "" if row.ratio is None else f"{row.ratio:.2f}", *peak]


def format_seconds(seconds: float) -> str:
    """Formats a duration with three significant digits in s, ms or µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def format_bytes(size: int) -> str:
    """Formats a size in MiB (one decimal)."""
    return f"{size / 2**20:,.1f} MiB"


def measure(
    title: str,
    contenders: Sequence[Contender],
    *,
    budget: float = 30.0,
    rounds: tuple[int, int] = (5, 50),
    shortest: float = 0.005,
    warmup: int = 1,
    sample: Sampler | None = None,
) -> Table:
    """Times all contenders in turns, so that whatever slows the machine down slows all of them.

    Every round takes one sample of each contender; a sample repeats a short call until it lasts `shortest` seconds.
    The ratio is the median over the rounds of (contender / first contender) within a round.

    Args:
        title: Heading of the table.
        contenders: The first that is not skipped is the reference of the ratios: ours.
        budget: Seconds after which no new round begins, once the smaller number of rounds is done.
        rounds: The smallest and the largest number of rounds.
        shortest: Seconds a sample lasts at least.
        warmup: Untimed calls of each contender beforehand (compilation, caches, thread pools).
        sample: Times so many calls; returns seconds a call. None: by the host's clock, which suits what a call
            finishes before it returns.
    """
    sample = sample or _sample
    rows = [Row(c.name, skipped=c.skipped) for c in contenders]
    runners = [(c, row) for c, row in zip(contenders, rows, strict=True) if c.run is not None]
    threads = torch.get_num_threads()
    repeats = {}
    for c, _ in runners:
        _set_threads(c.threads or threads)
        for _ in range(warmup):
            c.run()
        repeats[c.name] = max(1, round(shortest / max(sample(c.run, 1), 1e-7)))
    begin = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - begin > budget:
            break
        for c, row in runners:
            _set_threads(c.threads or threads)
            row.samples.append(sample(c.run, repeats[c.name]))
    _set_threads(threads)
    for _, row in runners:
        row.median = statistics.median(row.samples)
        row.ratio = statistics.median(a / b for a, b in zip(row.samples, runners[0][1].samples, strict=True))
    return Table(title, rows)


def bench(benchmark: Any, contender: Contender) -> None:
    """Runs one contender under pytest-benchmark's fixture; a skipped row becomes a skipped test with its reason."""
    if contender.run is None:
        import pytest

        pytest.skip(contender.skipped)
    benchmark.pedantic(contender.run, rounds=5, warmup_rounds=1)


def _sample(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, the garbage collector held back."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats
    finally:
        if enabled:
            gc.enable()


def _set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    sdw_fast.set_num_threads(threads)


def peak_memory(build: str, **arguments: Any) -> int:
    """Returns the bytes of resident memory that one call needs at its peak beyond what was there before it.

    Measured in a fresh process, where no allocator holds pages of an earlier call. Inputs, imports and libraries
    belong to what was there before.

    Args:
        build: "module:function"; `function(**arguments)` prepares the inputs and returns the zero-argument call.
        arguments: JSON-serializable.

    Raises:
        Unavailable: the builder raised it, or a package is missing.
        RuntimeError: the process failed otherwise (for one, it was killed for want of memory).
    """
    command = [sys.executable, "-m", "benchmarks.timing", build, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{build} ended with {done.returncode}: {done.stderr[-500:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "unavailable" in answer:
        raise Unavailable(answer["unavailable"])
    return int(answer["bytes"])


def with_memory(table: Table, names: Iterable[str], build: str) -> Table:
    """Adds to the rows of these names, unless skipped, the peak memory of the call that `build(name=…)` returns."""
    for row in table.rows:
        if row.name in names and not row.skipped:
            row.peak_bytes = peak_memory(build, name=row.name)
    return table


def _peak_memory_of_call(build: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The other end of `peak_memory`, in the fresh process."""
    module, function = build.split(":")
    try:
        run = getattr(importlib.import_module(module), function)(**arguments)
    except (ImportError, Unavailable) as error:
        return {"unavailable": str(error)}
    gc.collect()
    before = _reset_peak()
    run()
    return {"bytes": max(0, _peak() - before)}


def _reset_peak() -> int:
    """Forgets the peak so far where the system can (Linux); returns the bytes resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    """Largest resident size so far, in bytes.

    Linux keeps it per address space in VmHWM; ru_maxrss would also count the parent's size at the moment of the fork.
    """
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def record(table: Table, name: str, folder: Path = RESULTS) -> None:
    """Adds a table named "<op>/<case>" to the results of its op."""
    op, _, case = name.partition("/")
    append(folder / f"{op}.jsonl", {"name": case, **asdict(table), **origin()})


def recorded(folder: Path = RESULTS) -> dict[str, tuple[Table, dict[str, Any]]]:
    """The newest table of every name in a folder's results, and the row that it came from."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        rows = [row for row in read(path) if row.keys() >= {"name", "title", "rows"}]
        for case, row in latest(rows, "name").items():
            found[f"{path.stem}/{case}"] = Table(row["title"], [Row(**measured) for measured in row["rows"]]), row
    return found


if __name__ == "__main__":
    print(json.dumps(_peak_memory_of_call(sys.argv[1], json.loads(sys.argv[2]))))
