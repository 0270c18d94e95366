"""State densities: the two estimators, SciPy's kernel estimate, and the weights, in time and memory.

The states are 17 numbers near a surface of 8 dimensions, like those of a robot that runs, and made here, so that any
number of them can be had at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import sdw_fast as sdw
from benchmarks.timing import Table, bench, contender, contenders, measure, peak_memory
from sdw_fast import density

Run = Callable[[], Any]


def states(count: int) -> np.ndarray:
    """(count, 17) float32: a random smooth map of 8 Gaussian numbers, and noise of a fiftieth; mean 0, deviation 1."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((8, 32)) / 8**0.5, rng.standard_normal((32, 17)) / 32**0.5
    x = np.tanh(1.5 * rng.standard_normal((count, 8)) @ first) @ second
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    return np.asarray(x + 0.02 * rng.standard_normal(x.shape), np.float32)


def ours(count: int) -> Run:
    """The default: exact neighbors, k = 10."""
    return partial(density.knn_log_density, states(count))


def subsampled(count: int) -> Run:
    """Neighbors among a random tenth of the states."""
    return partial(density.knn_log_density, states(count), references=count // 10)


def flow(count: int) -> Run:
    """One epoch of the flow; a fit takes tens of them."""
    return partial(density.flow_log_density, states(count), max_epochs=1)


def scipy_kernel(count: int) -> Run:
    """scipy.stats.gaussian_kde evaluated at its own points."""
    from scipy.stats import gaussian_kde

    x = states(count).T
    return lambda: gaussian_kde(x).logpdf(x)


def weights(count: int) -> Run:
    """Weights of a given effective sample size, densities given."""
    return partial(sdw.density_weights, np.random.default_rng(0).standard_normal(count) * 5, ess=0.5)


CONTENDERS: dict[str, Callable[[int], Run]] = {
    "knn_log_density": ours,
    "knn_log_density, a tenth as references": subsampled,
    "flow_log_density, one epoch": flow,
    "density_weights, ess given": weights,
    "SciPy gaussian_kde": scipy_kernel,
}
SQUARE = ("SciPy gaussian_kde",)  # work grows with M²: small M only


def build(name: str, count: int) -> Run:
    """For the memory measurement's fresh process."""
    return CONTENDERS[name](count)


def tables(mode: str) -> Iterator[tuple[str, Callable[[], Table]]]:
    """Yields (name, measurement)."""
    for count in {"quick": (10_000,), "full": (10_000, 100_000), "sweep": (1_000_000,)}[mode]:
        names = [name for name in CONTENDERS if count <= 10_000 or name not in SQUARE]
        yield f"density/M={count}", partial(_table, names, count, mode != "quick")


def _table(names: list[str], count: int, memory: bool) -> Table:
    rows = contenders(CONTENDERS, names, count)
    rounds = (3, 5) if count <= 10_000 else (1, 1)
    table = measure(f"State density, M = {count:,}, 17 numbers", rows, rounds=rounds, shortest=0, warmup=0)
    for row in table.rows:
        if memory and not row.skipped:
            row.peak_bytes = peak_memory("benchmarks.bench_density:build", name=row.name, count=count)
    return table


@pytest.mark.parametrize("name", CONTENDERS)
def bench_density(benchmark: Any, name: str) -> None:
    bench(benchmark, contender(name, CONTENDERS[name], 10_000))
