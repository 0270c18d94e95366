"""Accuracy of unrolled_bc against float64: `python -m benchmarks.accuracy_unrolled_bc` prints a table.

The unroll is chaotic at many steps (training at the edge of stability), so that a single-precision hypergradient at
T = 100 is compared by its error relative to another single-precision implementation's, and the adjoint by itself along
one stored trajectory. Errors are norms of differences relative to the norm of the float64 result, the largest over the
tensors compared. The exit status tells whether every bound holds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import sdw_fast
from benchmarks.model import Problem
from sdw_fast.ops._mlp import mlp_activations

Gradients = list[Tensor]


def hypergradient(problem: Problem, backend: str, dtype: torch.dtype = torch.float32) -> Gradients:
    """Parameters after T steps, and the gradient of the outer loss for observations, actions, params and lr."""
    leaves = [x.to(dtype).requires_grad_() for x in (*problem.synthetic, *problem.params)]
    lr = torch.tensor(problem.lr, dtype=dtype, requires_grad=True)
    observations, actions, *params = leaves
    trained = sdw_fast.ops.unrolled_bc(observations, actions, params, steps=problem.steps, lr=lr, backend=backend)
    outer = [x.to(dtype) for x in problem.outer]
    loss = sdw_fast.ops.behavior_matching(trained, *outer, backend=backend)
    return list(torch.autograd.grad(loss, [*leaves, lr]))


def error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest relative error over the tensors, each in its norm; a tensor that is exactly zero must be met exactly."""
    worst = 0.0
    for a, e in zip(actual, exact, strict=True):
        difference, size = (a.double() - e).norm().item(), e.norm().item()
        worst = max(worst, 0.0 if difference == 0 else difference / size if size else float("inf"))
    return worst


def random_problem(draw: random.Random) -> Problem:
    """Odd sizes, one row, one layer, wide, deep; T at most 20."""
    hidden = [draw.choice([1, 5, 16, 31, 64, 100, 256, 300]) for _ in range(draw.randrange(5))]
    return Problem(
        size=draw.choice([1, 2, 7, 33, 64, 255, 256]),
        state=draw.randint(1, 30),
        action=draw.randint(1, 8),
        hidden=tuple(hidden),
        steps=draw.randint(1, 20),
        batch=draw.choice([1, 50, 333]),
        lr=draw.choice([0.01, 0.05, 0.1]),
        seed=draw.randrange(10**6),
    )


def trajectory(problem: Problem, backend: str, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """θ_0 … θ_T, taken one step at a time."""
    observations, actions = (x.to(dtype) for x in problem.synthetic)
    thetas = [[p.to(dtype) for p in problem.params]]
    for _ in range(problem.steps):
        thetas.append(_step(observations, actions, thetas[-1], problem.lr, backend))
    return thetas


def masks(problem: Problem, thetas: list[list[Tensor]], dtype: torch.dtype) -> Iterator[Tensor]:
    """Which ReLUs are on, a layer after the other at every θ_t, computed in `dtype`."""
    for theta in thetas[:-1]:
        yield from (h > 0 for h in mlp_activations([p.to(dtype) for p in theta], problem.synthetic[0].to(dtype))[1:-1])


def same_piece(problem: Problem, thetas: list[list[Tensor]], exact: list[list[Tensor]]) -> bool:
    """Whether every ReLU along `thetas` is on the side of its kink that it is on along `exact` (float64).

    At the kink the derivative jumps, so that a unit within rounding of zero makes two right answers differ.
    """
    return all(
        torch.equal(mask, expected)
        for dtype in (torch.float32, torch.float64)
        for mask, expected in zip(masks(problem, thetas, dtype), masks(problem, exact, torch.float64), strict=True)
    )


def off_kinks(params: list[Tensor], observations: Tensor) -> list[Tensor]:
    """Copies of params, the bias of a unit moved by 1e-5 while one of its pre-activations is within rounding."""
    moved = [p.clone() for p in params]
    h = observations.double()
    for weight, bias in zip(moved[:-2:2], moved[1:-2:2], strict=True):
        product = h @ weight.double().T
        rounding = 1e-6 * (h.abs() @ weight.double().abs().T + bias.double().abs())  # 8 units in the last place
        while (near := ((product + bias.double()).abs() < rounding).any(0)).any():
            bias[near] += 1e-5
        h = torch.relu(product + bias.double())
    return moved


def short_unrolls(backend: str, shapes: int) -> tuple[list[float], list[float]]:
    """Errors at T ≤ 20 on random shapes: of those on the pieces of the float64 trajectory, and of the others."""
    draw = random.Random(0)
    smooth: list[float] = []
    kinked: list[float] = []
    for _ in range(shapes):
        problem = random_problem(draw)
        exact = trajectory(problem, "torch", torch.float64)
        errors = smooth if same_piece(problem, trajectory(problem, backend), exact) else kinked
        errors.append(error(hypergradient(problem, backend), hypergradient(problem, "torch", torch.float64)))
    return smooth, kinked


def long_unrolls(backend: str, draws: int) -> list[tuple[float, float]]:
    """(error of `backend`, error of the float32 twin) at T = 100 in the reference shape, one pair a draw."""
    pairs = []
    for seed in range(draws):
        problem = Problem(seed=seed)
        exact = hypergradient(problem, "torch", torch.float64)
        pairs.append((error(hypergradient(problem, backend), exact), error(hypergradient(problem, "torch"), exact)))
    return pairs


def along_one_trajectory(problem: Problem, backend: str) -> tuple[float, float]:
    """Errors of the adjoint of `backend` and of the float32 twin along the trajectory that `backend` takes.

    The trajectory θ_0 … θ_T is stored in single precision, every θ_t moved off the kinks of its ReLUs; each inner step
    is then differentiated by itself at its θ_t, along the λ_{t+1} of the step after it, so that no difference of the
    trajectories enters.
    """
    thetas = [off_kinks(theta, problem.synthetic[0]) for theta in trajectory(problem, backend)]
    start = torch.autograd.grad(*_outer_loss(thetas[-1], problem))

    def adjoint(backend: str, dtype: torch.dtype) -> Gradients:
        s, a = (x.to(dtype).requires_grad_() for x in problem.synthetic)
        d_s, d_a = torch.zeros_like(s), torch.zeros_like(a)
        adjoint = [v.to(dtype) for v in start]
        for params in reversed(thetas[:-1]):
            theta = [p.detach().to(dtype).requires_grad_() for p in params]
            following = _step(s, a, theta, problem.lr, backend)
            step_s, step_a, *adjoint = torch.autograd.grad(following, [s, a, *theta], grad_outputs=adjoint)
            d_s += step_s
            d_a += step_a
        return [d_s, d_a, *adjoint]

    exact = adjoint("torch", torch.float64)
    return error(adjoint(backend, torch.float32), exact), error(adjoint("torch", torch.float32), exact)


def _step(s: Tensor, a: Tensor, params: list[Tensor], lr: float, backend: str) -> list[Tensor]:
    return sdw_fast.ops.unrolled_bc(s, a, params, steps=1, lr=lr, backend=backend)


def _outer_loss(params: list[Tensor], problem: Problem) -> tuple[Tensor, list[Tensor]]:
    leaves = [p.detach().requires_grad_() for p in params]
    return sdw_fast.ops.behavior_matching(leaves, *problem.outer, backend="torch"), leaves


def same_bits(run: Callable[[], Gradients], repeats: int = 5) -> bool:
    """Whether repeated runs return the same bits."""
    first = run()
    return all(all(map(torch.equal, run(), first)) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu", help='backend under test (default "cpu")')
    parser.add_argument("--shapes", type=int, default=60, help="random shapes at T <= 20")
    parser.add_argument("--draws", type=int, default=10, help="draws at T = 100")
    options = parser.parse_args()
    backend = options.backend
    failed = []

    def line(what: str, value: Any, bound: str, holds: bool) -> None:
        print(f"{what:<66}  {value:>12}  {bound:>10}  {'ok' if holds else 'FAILS'}", flush=True)
        failed.extend([] if holds else [what])

    config = sdw_fast.show_config("dicts")
    where = f"{config['instruction_set']}, {config['threads']} threads, torch {torch.__version__}"
    print(f"unrolled_bc, backend {backend!r}, {where}")
    print(f"{'relative error against float64':<66}  {'measured':>12}  {'bound':>10}")

    smooth, kinked = short_unrolls(backend, options.shapes)
    line(f"T <= 20, {len(smooth)} random shapes, worst", f"{max(smooth):.1e}", "2e-5", max(smooth) <= 2e-5)
    print(f"    median: {statistics.median(smooth):.1e}")
    print(f"    left out, a ReLU at its kink: {len(kinked)} ({', '.join(f'{e:.1e}' for e in kinked)})")

    pairs = long_unrolls(backend, options.draws)
    mine, twins = ([pair[i] for pair in pairs] for i in (0, 1))
    for name, values in (("", mine), (", twin", twins)):
        print(f"T = 100, reference shape, {options.draws} draws{name}: {min(values):.1e} … {max(values):.1e}")
    ratio = statistics.fmean(mine) / statistics.fmean(twins)
    line("    mean error relative to the float32 twin's", f"{ratio:.2f}", "1.5", ratio <= 1.5)

    pairs = [along_one_trajectory(Problem(seed=seed), backend) for seed in range(options.draws)]
    worst, worst_of_twin = (max(pair[i] for pair in pairs) for i in (0, 1))
    line(f"T = 100, adjoint along stored trajectories, {len(pairs)} draws", f"{worst:.1e}", "1e-5", worst <= 1e-5)
    print(f"    the float32 twin along the same trajectories: {worst_of_twin:.1e}")

    for threads in (1, 2):
        sdw_fast.set_num_threads(threads)
        for problem in (Problem(), Problem(size=33, hidden=(100, 31), batch=333)):
            equal = same_bits(lambda p=problem: hypergradient(replace(p, steps=100), backend))
            line(f"same bits in 6 runs, {threads} thread(s), N = {problem.size}", str(equal), "True", equal)
    sys.exit(f"{len(failed)} bounds broken" if failed else 0)


if __name__ == "__main__":
    main()
