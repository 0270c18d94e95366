"""weighted_bc_loss: the loss on given predictions and its gradient for them; memory-bound, so a copy is the measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

import sdw_fast
from benchmarks.model import Problem, compiles, jax_functions, to_jax, weighted_loss
from benchmarks.timing import Table, bench, contender, contenders, measure

Run = Callable[[], Any]


def _inputs(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predictions and targets (M, A), weights (M,)."""
    _, targets, weights = problem.outer
    return problem.normal(problem.batch, problem.action, stream=6).tanh_(), targets, weights


def ours(problem: Problem, backend: str = "auto") -> Run:
    """The package: one pass that reads pred, target and weights and writes the gradient."""
    pred, target, weights = _inputs(problem)
    pred.requires_grad_()

    def run() -> Any:
        loss = sdw_fast.ops.weighted_bc_loss(pred, target, weights, backend=backend)
        return loss, *torch.autograd.grad(loss, pred)

    return run


def twin(problem: Problem) -> Run:
    """The package's fallback and oracle in PyTorch."""
    return ours(problem, backend="torch")


def eager(problem: Problem) -> Run:
    """The formula in PyTorch, then .backward()."""
    pred, target, weights = _inputs(problem)
    pred.requires_grad_()

    def run() -> Any:
        loss = weighted_loss(pred, target, weights)
        return loss, *torch.autograd.grad(loss, pred)

    return run


def torch_compile(problem: Problem) -> Run:
    """torch.compile of the formula (its backward is compiled with it)."""
    pred, target, weights = _inputs(problem)
    pred.requires_grad_()
    compiled = torch.compile(weighted_loss, fullgraph=True, dynamic=False)

    def run() -> Any:
        loss = compiled(pred, target, weights)
        return loss, *torch.autograd.grad(loss, pred)

    return compiles(run)


def jax_grad(problem: Problem) -> Run:
    """JAX: jit of value_and_grad."""
    import jax

    arguments = to_jax(_inputs(problem))
    gradient = jax.jit(jax.value_and_grad(jax_functions()[2]))

    def run() -> Any:
        return jax.block_until_ready(gradient(*arguments))

    return run


def numba_fused(problem: Problem) -> Run:
    """numba: one parallel loop over the rows, loss and gradient together."""
    import numba
    import numpy as np

    @numba.njit(parallel=True, fastmath=True)
    def fused(pred, target, weights):  # type: ignore[no-untyped-def]
        rows, columns = pred.shape
        gradient = np.empty_like(pred)
        scale = 1.0 / (rows * columns)
        loss = 0.0
        for i in numba.prange(rows):
            row = 0.0
            for j in range(columns):
                difference = pred[i, j] - target[i, j]
                row += difference * difference
                gradient[i, j] = 2 * scale * weights[i] * difference
            loss += weights[i] * row
        return loss * scale, gradient

    arguments = [x.numpy() for x in _inputs(problem)]
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))

    def run() -> Any:
        return fused(*arguments)

    return run


def copy_floor(problem: Problem) -> Run:
    """Moves as many bytes as the op (reads pred, target, weights; writes the gradient): copy_ between ready buffers."""
    source = torch.ones(_traffic(problem) // 2 // 4, device=problem.device)
    buffer = torch.ones_like(source)

    def run() -> None:
        buffer.copy_(source)

    return run


def clone_floor(problem: Problem) -> Run:
    """The same bytes by .clone(), which allocates its result as the op does."""
    source = torch.ones(_traffic(problem) // 2 // 4, device=problem.device)

    def run() -> None:
        source.clone()

    return run


def _traffic(problem: Problem) -> int:
    """Bytes read and written by one fused pass over float32 arrays."""
    return 4 * problem.batch * (3 * problem.action + 1)


COPY_FLOOR, CLONE_FLOOR = "floor: copy of the same bytes", "floor: clone of the same bytes"
CONTENDERS: dict[str, Callable[[Problem], Run]] = {
    "sdw_fast": ours,
    "twin in PyTorch": twin,
    "eager PyTorch": eager,
    "torch.compile": torch_compile,
    "JAX jit(value_and_grad)": jax_grad,
    "numba, fused": numba_fused,
    COPY_FLOOR: copy_floor,
    CLONE_FLOOR: clone_floor,
}
QUICK = ["sdw_fast", "eager PyTorch", COPY_FLOOR, CLONE_FLOOR]
BATCH = Problem(batch=2_560)
MILLION = Problem(batch=1_000_000)


def tables(mode: str) -> Iterator[tuple[str, Callable[[], Table]]]:
    """Yields (name, measurement) for "quick", "full" or "sweep"."""
    swept = {"M=10000": 10_000, "M=100000": 100_000, "M=4000000": 4_000_000, "M=16000000": 16_000_000}
    names = list(CONTENDERS) if mode == "full" else QUICK
    for name, batch in (swept if mode == "sweep" else {"call": 1, "batch": 2_560, "million": 1_000_000}).items():
        yield f"weighted_bc_loss/{name}", partial(_table, Problem(batch=batch), names, 3 if mode == "quick" else 8)


def _table(problem: Problem, names: list[str], budget: float) -> Table:
    title = f"weighted_bc_loss, loss and gradient: M = {problem.batch:,}, A = {problem.action}"
    return measure(title, contenders(CONTENDERS, names, problem), budget=budget, warmup=3)


@pytest.mark.benchmark(group="weighted_bc_loss, M = 2,560")
@pytest.mark.parametrize("name", CONTENDERS)
def bench_batch(benchmark: Any, name: str) -> None:
    bench(benchmark, contender(name, CONTENDERS[name], BATCH))


@pytest.mark.benchmark(group="weighted_bc_loss, M = 1,000,000")
@pytest.mark.parametrize("name", CONTENDERS)
def bench_million(benchmark: Any, name: str) -> None:
    bench(benchmark, contender(name, CONTENDERS[name], MILLION))
