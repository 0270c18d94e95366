"""unrolled_bc: the hypergradient of one outer step (∂H/∂observations, ∂H/∂actions), every contender the same numbers.

Each contender is a builder: it takes a `Problem`, prepares, and returns the call that is timed, which does T inner
steps, the weighted outer loss and the way back, and returns (loss, ∂H/∂s, ∂H/∂a).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import sdw_fast
from benchmarks.model import Problem, Product, cuda_graph, gradient_products, multiply, product
from benchmarks.peers_unrolled_bc import (
    autograd,
    autograd_kept,
    autograd_one_graph,
    higher,
    jax_checkpoint,
    jax_scan,
    torch_compile,
    torch_func,
    torchopt,
)
from benchmarks.timing import Table, bench, contender, contenders, measure, with_memory

Run = Callable[[], Any]


def ours(problem: Problem, momentum: float = 0.0, **options: Any) -> Run:
    """The package: unrolled_bc, then behavior_matching, then .backward() through both. Options of both: backend …

    With momentum the step is smaller, so that training goes as far and leaves as many zeros behind the ReLUs.
    """
    lr = problem.lr * (1 - momentum)
    observations, actions = (x.clone().requires_grad_() for x in problem.synthetic)

    def run() -> Any:
        trained = sdw_fast.ops.unrolled_bc(
            observations, actions, problem.params, steps=problem.steps, lr=lr, momentum=momentum, **options
        )
        loss = sdw_fast.ops.behavior_matching(trained, *problem.outer, **options)
        return loss, *torch.autograd.grad(loss, [observations, actions])

    return run


def ours_alone(problem: Problem, back: bool = True, **options: Any) -> Run:
    """unrolled_bc forward and, if `back`, back, without the outer loss: of any gradient for the trained parameters."""
    observations, actions = (x.clone().requires_grad_(back) for x in problem.synthetic)
    covectors = [problem.normal(*p.shape, stream=7) for p in problem.params]

    def run() -> Any:
        trained = sdw_fast.ops.unrolled_bc(
            observations, actions, problem.params, steps=problem.steps, lr=problem.lr, **options
        )
        return torch.autograd.grad(trained, [observations, actions], covectors) if back else trained

    return run


def ours_together(problem: Problem, count: int, **options: Any) -> Run:
    """`count` problems side by side, each with its own data, initialization and outer batch."""
    observations, actions, params, outer = _stacked(problem, count)
    for tensor in (observations, actions):
        tensor.requires_grad_()

    def run() -> Any:
        trained = sdw_fast.ops.unrolled_bc(observations, actions, params, steps=problem.steps, lr=problem.lr, **options)
        losses = sdw_fast.ops.behavior_matching(trained, *outer, **options)
        return losses, *torch.autograd.grad(losses.sum(), [observations, actions])

    return run


def clones(problem: Problem, count: int) -> Run:
    """`count` policies trained side by side and not differentiated, as `behavior_clone(ensemble=…)` trains them."""
    observations, actions, params, _ = _stacked(problem, count)

    def run() -> Any:
        return sdw_fast.ops.unrolled_bc(observations, actions, params, steps=problem.steps, lr=problem.lr)

    return run


def _stacked(problem: Problem, count: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Observations, actions, parameters and outer batches of as many problems of other seeds."""
    problems = [replace(problem, seed=seed) for seed in range(count)]
    (observations, actions), params, outer = (
        [torch.stack(x) for x in zip(*each, strict=True)]
        for each in zip(*((p.synthetic, p.params, p.outer) for p in problems), strict=True)
    )
    return observations, actions, params, outer


def twin(problem: Problem) -> Run:
    """The closed form in PyTorch: the package's own fallback and oracle."""
    return ours(problem, backend="torch")


def twin_graph(problem: Problem) -> Run:
    """The same captured as one CUDA graph: no launch costs are left, only the kernels and their dependences."""
    return cuda_graph(twin(problem), problem.device)


def recipe_products(problem: Problem) -> list[Product]:
    """All matrix products of the closed form, inner lengths joined, and of the outer loss."""
    n, layers = problem.size, list(enumerate(problem.layers))
    inner = gradient_products(problem, n)
    adjoint = [product(problem, n, i * (1 + (l > 0)), o) for l, (i, o) in layers]  # [Rh, h]·[W; V], and Rh_0 = 0
    adjoint += [product(problem, n, 2 * o, i, right="t") for _, (i, o) in layers]  # [Rδ, δ]·[W, V]ᵀ
    adjoint += [product(problem, i, n * (1 + (l > 0)), o, left="t") for l, (i, o) in layers]  # [Rh; h]ᵀ·[δ; Rδ]
    return problem.steps * (inner + adjoint) + gradient_products(problem, problem.batch)


def gemm_floor(problem: Problem) -> Run:
    """Only the matrix products, by torch.mm into ready buffers: no epilogue, no copies, operands warm in cache."""
    return multiply(recipe_products(problem))


def rate_floor(problem: Problem) -> Run:
    """As many multiply-adds as the recipe's products have, all of them in 256³ products: the library at its best."""
    cube = product(problem, 256, 256, 256)
    work = sum(a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in recipe_products(problem))
    return multiply([cube] * max(1, round(work / 256**3)))


GEMM_FLOOR = "floor: the bare products, torch.mm"
RATE_FLOOR = "floor: the same work in 256³ products"
CONTENDERS: dict[str, Callable[[Problem], Run]] = {
    "sdw_fast": ours,
    "closed form in PyTorch (twin)": twin,
    "autograd double backward (papers)": autograd,
    "autograd double backward, graphs kept": autograd_kept,
    "autograd, one graph": autograd_one_graph,
    "torch.func": torch_func,
    "torch.compile, step and pullback": torch_compile,
    "TorchOpt MetaSGD": torchopt,
    "higher innerloop_ctx": higher,
    "JAX jit(grad(scan))": jax_scan,
    "JAX jit(grad(scan)), checkpoint": jax_checkpoint,
    GEMM_FLOOR: gemm_floor,
    RATE_FLOOR: rate_floor,
}
SHORT = [
    "sdw_fast",
    "closed form in PyTorch (twin)",
    "autograd double backward (papers)",
    "JAX jit(grad(scan))",
    GEMM_FLOOR,
    RATE_FLOOR,
]
LIBRARIES = ["sdw_fast", "autograd, one graph", "TorchOpt MetaSGD", "higher innerloop_ctx"]  # of any model and loss
REFERENCE = Problem()
DEFAULT = Problem(hidden=(64, 64, 64))  # what `distill` unrolls
SHORTER = replace(REFERENCE, steps=20)
SWEPT = {
    "width": {w: replace(SHORTER, hidden=(w, w, w)) for w in (16, 32, 64, 128, 256, 512, 1024)},
    "N": {n: replace(SHORTER, size=n) for n in (64, 256, 1024, 4096)},
}
NARROW = Problem(size=64, hidden=(64, 64, 64), batch=256)


def for_memory(name: str) -> Run:
    """One contender in the reference shape, for `peak_memory`: what compiles does so before the measured call."""
    REFERENCE.params, REFERENCE.synthetic, REFERENCE.outer  # noqa: B018  inputs are not of the call's making
    run = CONTENDERS[name](REFERENCE)
    if "JAX" in name:
        run()
    return run


def describe(problem: Problem) -> str:
    """The heading of a table."""
    widths = "×".join(map(str, problem.hidden))
    return f"unrolled_bc: N = {problem.size}, hidden {widths}, T = {problem.steps}, outer batch {problem.batch:,}"


def tables(mode: str) -> Iterator[tuple[str, Callable[[], Table]]]:
    """Yields (name, measurement) for "quick", "full" or "sweep"."""
    if mode == "sweep":
        yield from _sweep()
        return
    names = SHORT if mode == "quick" else list(CONTENDERS)

    def reference() -> Table:
        first, *others = contenders(CONTENDERS, names, REFERENCE)
        one_thread = contender("sdw_fast, 1 thread", ours, REFERENCE, threads=1)
        table = measure(describe(REFERENCE), [first, one_thread, *others], budget=30 if mode == "quick" else 100)
        return table if mode == "quick" else with_memory(table, CONTENDERS, f"{__name__}:for_memory")

    def narrow() -> Table:
        return measure(describe(NARROW), contenders(CONTENDERS, names, NARROW), budget=10 if mode == "quick" else 30)

    def default() -> Table:
        first, *others = contenders(CONTENDERS, names, DEFAULT)
        one_thread = contender("sdw_fast, 1 thread", ours, DEFAULT, threads=1)
        with_momentum = contender("sdw_fast, momentum 0.9", partial(ours, momentum=0.9), DEFAULT)
        rows = [first, one_thread, with_momentum, *others]
        return measure(describe(DEFAULT), rows, budget=20 if mode == "quick" else 60)

    yield "unrolled_bc/default", default
    yield "unrolled_bc/reference", reference
    yield "unrolled_bc/narrow", narrow
    yield "unrolled_bc/together", partial(_side_by_side, describe(DEFAULT), ours_together, DEFAULT, (1, 2, 3, 10))
    title = "cloning without a gradient: N = 256, hidden 256×256×256, T = 100"
    yield "unrolled_bc/clones", partial(_side_by_side, title, clones, REFERENCE, (1, 2, 10))


def _side_by_side(title: str, build: Callable[..., Run], problem: Problem, counts: Sequence[int]) -> Table:
    """Several problems in a call, beside one."""
    rows = [contender(f"{count} side by side" if count > 1 else "one", build, problem, count) for count in counts]
    return measure(title, rows, budget=20, rounds=(3, 50))


def _sweep() -> Iterator[tuple[str, Callable[[], Table]]]:
    """One shape parameter at a time around the reference, at T = 20: the autograd graph must fit at the largest."""
    swept = {f"{name}={value}": problem for name, problems in SWEPT.items() for value, problem in problems.items()}
    swept |= {f"depth={d}": replace(SHORTER, hidden=(256,) * d) for d in (1, 2, 3, 5)}
    swept |= {f"T={t}": replace(SHORTER, steps=t) for t in (1, 10, 100)}
    for name, problem in swept.items():
        yield f"unrolled_bc/{name}", partial(_swept, problem, SHORT)
    for width in (64, 256):
        yield f"unrolled_bc/momentum,width={width}", partial(_momentum, swept[f"width={width}"])
    without_jax = [name for name in SHORT if "JAX" not in name]  # its threads are fixed when it starts
    for threads in (1, 2):
        yield f"unrolled_bc/threads={threads}", partial(_swept, REFERENCE, without_jax, threads)
    yield "unrolled_bc/libraries", partial(_swept, DEFAULT, LIBRARIES, 1)
    yield "unrolled_bc/libraries,width=256", partial(_swept, REFERENCE, LIBRARIES, 1)


def _swept(problem: Problem, names: list[str], threads: int | None = None) -> Table:
    title = describe(problem) + (f", threads: {threads}" if threads else "")
    return measure(title, contenders(CONTENDERS, names, problem, threads=threads), budget=8, rounds=(3, 30))


def _momentum(problem: Problem) -> Table:
    """What the velocity costs: read and written once a step, as is the adjoint's."""
    plain = contender("sdw_fast", ours, problem)
    with_momentum = contender("sdw_fast, momentum 0.9", partial(ours, momentum=0.9), problem)
    return measure(describe(problem), [plain, with_momentum], budget=8, rounds=(3, 30))


@pytest.mark.benchmark(group="unrolled_bc, reference shape")
@pytest.mark.parametrize("name", CONTENDERS)
def bench_reference(benchmark: Any, name: str) -> None:
    bench(benchmark, contender(name, CONTENDERS[name], REFERENCE))


@pytest.mark.benchmark(group="unrolled_bc, narrow network")
@pytest.mark.parametrize("name", CONTENDERS)
def bench_narrow(benchmark: Any, name: str) -> None:
    bench(benchmark, contender(name, CONTENDERS[name], NARROW))
