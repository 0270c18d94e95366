"""behavior_matching: the weighted outer loss and its gradient for the policy's parameters, one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import sdw_fast
from benchmarks.model import (
    Problem,
    compiles,
    gradient_products,
    jax_functions,
    mlp,
    multiply,
    to_jax,
    weighted_loss,
)
from benchmarks.timing import Table, bench, contender, contenders, measure, with_memory

Run = Callable[[], Any]
CHUNK = 16_384


def ours(problem: Problem, **options: Any) -> Run:
    """The package: loss and gradients in one pass over blocks that stay in cache. Options of the op: backend …"""
    params = [p.clone().requires_grad_() for p in problem.params]
    outer = problem.outer

    def run() -> Any:
        loss = sdw_fast.ops.behavior_matching(params, *outer, **options)
        return loss, *torch.autograd.grad(loss, params)

    return run


def twin(problem: Problem) -> Run:
    """The package's fallback and oracle in PyTorch."""
    return ours(problem, backend="torch")


def eager(problem: Problem) -> Run:
    """What everybody writes: forward, loss, .backward()."""
    params = [p.clone().requires_grad_() for p in problem.params]
    states, targets, weights = problem.outer

    def run() -> Any:
        loss = weighted_loss(mlp(params, states), targets, weights)
        return loss, *torch.autograd.grad(loss, params)

    return run


def eager_chunks(problem: Problem) -> Run:
    """Eager over chunks of 16,384 states, gradients accumulated: what one writes when memory runs out."""
    params = [p.clone().requires_grad_() for p in problem.params]
    outer = problem.outer

    def run() -> Any:
        total, sums = params[0].new_zeros(()), [torch.zeros_like(p) for p in params]
        for states, targets, weights in zip(*(x.split(CHUNK) for x in outer), strict=True):
            loss = weighted_loss(mlp(params, states), targets, weights) * (len(states) / problem.batch)
            total += loss.detach()
            for s, g in zip(sums, torch.autograd.grad(loss, params), strict=True):
                s += g
        return total, *sums

    return run


def torch_compile(problem: Problem) -> Run:
    """torch.compile of the eager loss (its backward is compiled with it)."""
    params = [p.clone().requires_grad_() for p in problem.params]
    states, targets, weights = problem.outer

    def loss_of(*params: torch.Tensor) -> torch.Tensor:
        return weighted_loss(mlp(params, states), targets, weights)

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=False)

    def run() -> Any:
        loss = compiled(*params)
        return loss, *torch.autograd.grad(loss, params)

    return compiles(run)


def jax_grad(problem: Problem) -> Run:
    """JAX: jit of value_and_grad."""
    import jax

    jax_mlp, _, jax_weighted_loss = jax_functions()
    params, (states, targets, weights) = to_jax(problem.params), to_jax(problem.outer)

    def loss_of(params: Any, states: Any, targets: Any, weights: Any) -> Any:
        return jax_weighted_loss(jax_mlp(params, states), targets, weights)

    gradient = jax.jit(jax.value_and_grad(loss_of))

    def run() -> Any:
        return jax.block_until_ready(gradient(params, states, targets, weights))

    return run


def in_training(problem: Problem, build: Callable[[Problem], Run]) -> Run:
    """Loss and gradient, and what a training script computes with PyTorch between two of them: a batch, and Adam."""
    run = build(problem)
    data = problem.normal(100_000, problem.state, stream=8)
    generator = torch.Generator().manual_seed(problem.seed)
    params = [p.clone().requires_grad_() for p in problem.params]
    optimizer = torch.optim.Adam(params, lr=1e-4)

    def step() -> Any:
        rows = torch.randint(len(data), (max(problem.batch, 4_096),), generator=generator)
        data[rows].clamp_(-5, 5)
        loss, *gradients = run()
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        optimizer.step()
        return loss

    return step


def gemm_floor(problem: Problem) -> Run:
    """Only the matrix products, by torch.mm into ready buffers; above 16,384 states, one chunk as often as needed."""
    chunks = max(1, round(problem.batch / CHUNK))
    return multiply(chunks * gradient_products(problem, problem.batch // chunks))


GEMM_FLOOR = "floor: the bare products, torch.mm"
CONTENDERS: dict[str, Callable[[Problem], Run]] = {
    "sdw_fast": ours,
    "twin in PyTorch": twin,
    "eager PyTorch": eager,
    "eager PyTorch, chunks": eager_chunks,
    "torch.compile": torch_compile,
    "JAX jit(value_and_grad)": jax_grad,
    GEMM_FLOOR: gemm_floor,
}
BATCH = Problem()
MILLION = Problem(batch=1_000_000)
QUICK = ["sdw_fast", "eager PyTorch", "eager PyTorch, chunks", GEMM_FLOOR]


def for_memory(name: str) -> Run:
    """One contender at a million states, for `peak_memory`: what compiles does so at this shape beforehand."""
    run = CONTENDERS[name](MILLION)
    if "JAX" in name:
        run()
    return run


def describe(problem: Problem) -> str:
    """The heading of a table."""
    widths = "×".join(map(str, problem.hidden))
    return f"behavior_matching, loss and gradient: M = {problem.batch:,}, hidden {widths}"


def tables(mode: str) -> Iterator[tuple[str, Callable[[], Table]]]:
    """Yields (name, measurement) for "quick", "full" or "sweep"."""
    if mode == "sweep":
        swept = {f"M={m}": Problem(batch=m) for m in (64, 256, 25_600, 100_000)}
        swept |= {f"width={w}": Problem(hidden=(w, w, w)) for w in (64, 256, 1024)}
        for name, problem in swept.items():
            yield f"behavior_matching/{name}", partial(_table, problem, QUICK, 5)
        return
    for m in (64, 256, 2_560):
        for width in (64, 256):
            problem = Problem(batch=m, hidden=(width, width, width))
            yield f"behavior_matching/training,M={m},width={width}", partial(_training, problem)
    names = QUICK if mode == "quick" else list(CONTENDERS)
    yield "behavior_matching/batch", partial(_table, BATCH, names, 10)
    if mode == "quick":
        yield "behavior_matching/large", partial(_table, replace(MILLION, batch=100_000), names, 15)
    else:
        million = partial(_table, MILLION, names, 60)
        yield "behavior_matching/million", lambda: with_memory(million(), CONTENDERS, f"{__name__}:for_memory")


def _table(problem: Problem, names: list[str], budget: float) -> Table:
    return measure(describe(problem), contenders(CONTENDERS, names, problem), budget=budget, rounds=(3, 50))


def _training(problem: Problem) -> Table:
    """Whole steps of a training loop, PyTorch with as many threads as it has."""
    title = f"a training step with behavior_matching: M = {problem.batch:,}, hidden {problem.hidden[0]} × 3"
    rows = [contender(name, in_training, problem, build) for name, build in _TRAINED.items()]
    return measure(title, rows, budget=5, rounds=(5, 50), shortest=0.05)


_TRAINED = {"sdw_fast": ours, "eager PyTorch": eager, "twin in PyTorch": twin}


@pytest.mark.benchmark(group="behavior_matching, M = 2,560")
@pytest.mark.parametrize("name", CONTENDERS)
def bench_batch(benchmark: Any, name: str) -> None:
    bench(benchmark, contender(name, CONTENDERS[name], BATCH))


@pytest.mark.benchmark(group="behavior_matching, M = 1,000,000")
@pytest.mark.parametrize("name", CONTENDERS)
def bench_million(benchmark: Any, name: str) -> None:
    bench(benchmark, contender(name, CONTENDERS[name], MILLION))
