"""unrolled_bc: the hypergradient of one outer step (∂H/∂observations, ∂H/∂actions), every contender the same numbers.

Each contender is a builder: it takes a `Problem`, prepares, and returns the call that is timed, which does T inner
steps, the weighted outer loss and the way back, and returns (loss, ∂H/∂s, ∂H/∂a).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sdw_fast
from benchmarks.model import (
    Problem,
    Product,
    bc_loss,
    compiles,
    cuda_graph,
    gradient_products,
    jax_functions,
    mlp,
    multiply,
    product,
    to_jax,
    weighted_loss,
)
from benchmarks.table import Table, bench, contender, contenders, measure, with_memory

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


def ours_alone(problem: Problem, **options: Any) -> Run:
    """unrolled_bc forward and backward, without the outer loss: of any gradient for the trained parameters."""
    observations, actions = (x.clone().requires_grad_() for x in problem.synthetic)
    covectors = [problem.normal(*p.shape, stream=7) for p in problem.params]

    def run() -> Any:
        trained = sdw_fast.ops.unrolled_bc(
            observations, actions, problem.params, steps=problem.steps, lr=problem.lr, **options
        )
        return torch.autograd.grad(trained, [observations, actions], covectors)

    return run


def ours_together(problem: Problem, count: int, **options: Any) -> Run:
    """`count` problems side by side, each with its own data, initialization and outer batch."""
    problems = [replace(problem, seed=seed) for seed in range(count)]
    observations, actions = (
        torch.stack(x).requires_grad_() for x in zip(*(p.synthetic for p in problems), strict=True)
    )
    params = [torch.stack(x) for x in zip(*(p.params for p in problems), strict=True)]

    def run() -> Any:
        trained = sdw_fast.ops.unrolled_bc(observations, actions, params, steps=problem.steps, lr=problem.lr, **options)
        policies = zip(*(p.unbind() for p in trained), strict=True)
        losses = torch.stack(
            [sdw_fast.ops.behavior_matching(x, *p.outer, **options) for x, p in zip(policies, problems, strict=True)]
        )
        return losses, *torch.autograd.grad(losses.sum(), [observations, actions])

    return run


def twin(problem: Problem) -> Run:
    """The closed form in PyTorch: the package's own fallback and oracle."""
    return ours(problem, backend="torch")


def twin_graph(problem: Problem) -> Run:
    """The same captured as one CUDA graph: no launch costs are left, only the kernels and their dependences."""
    return cuda_graph(twin(problem), problem.device)


def _network(problem: Problem) -> torch.nn.Sequential:
    """The policy as a module, holding the problem's parameters."""
    layers: list[torch.nn.Module] = []
    for fan_in, fan_out in problem.layers:
        layers += [torch.nn.Linear(fan_in, fan_out, dtype=problem.dtype, device=problem.device), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1], torch.nn.Tanh())
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), problem.params, strict=True):
            parameter.copy_(value)
    return network


def autograd(problem: Problem) -> Run:
    """The papers' formulation: SGD that stores a copy of the network per step; on the way back each step's loss is
    computed again with a graph of its gradient, and a Hessian-vector product taken through it. Outer batches of 256."""
    network = _network(problem)
    observations, actions = (x.clone().requires_grad_() for x in problem.synthetic)

    def run() -> Any:
        policy = copy.deepcopy(network)
        optimizer = torch.optim.SGD(policy.parameters(), lr=problem.lr)
        snapshots = []
        for _ in range(problem.steps):
            snapshots.append(copy.deepcopy(policy))
            optimizer.zero_grad()
            F.mse_loss(policy(observations.detach()), actions.detach()).backward()
            optimizer.step()
        outer = observations.new_zeros(())
        for states, targets, weights in zip(*(x.split(256) for x in problem.outer), strict=True):
            outer = outer + weighted_loss(policy(states), targets, weights) * (len(states) / problem.batch)
        adjoint = list(torch.autograd.grad(outer, list(policy.parameters())))
        d_observations, d_actions = torch.zeros_like(observations), torch.zeros_like(actions)
        while snapshots:
            policy = snapshots.pop()
            params = list(policy.parameters())
            grads = torch.autograd.grad(F.mse_loss(policy(observations), actions), params, create_graph=True)
            products = torch.autograd.grad(
                torch.cat([g.flatten() for g in grads]),
                [observations, actions, *params],
                grad_outputs=torch.cat([-problem.lr * v.flatten() for v in adjoint]),
            )
            d_observations += products[0]
            d_actions += products[1]
            adjoint = [v + hv for v, hv in zip(adjoint, products[2:], strict=True)]
        return outer, d_observations, d_actions

    return run


def autograd_kept(problem: Problem) -> Run:
    """A leaner program: every step's graph of its gradient is kept on the way, so that nothing is computed twice."""
    observations, actions = (x.clone().requires_grad_() for x in problem.synthetic)
    states, targets, weights = problem.outer

    def run() -> Any:
        params = [p.clone().requires_grad_() for p in problem.params]
        tape = []
        for _ in range(problem.steps):
            loss = bc_loss(params, observations, actions)
            grads = torch.autograd.grad(loss, params, create_graph=True)
            tape.append((params, grads))
            params = [(p - problem.lr * g).detach().requires_grad_() for p, g in zip(params, grads, strict=True)]
        outer = weighted_loss(mlp(params, states), targets, weights)
        adjoint = list(torch.autograd.grad(outer, params))
        d_observations, d_actions = torch.zeros_like(observations), torch.zeros_like(actions)
        while tape:
            params, grads = tape.pop()
            products = torch.autograd.grad(
                grads, [observations, actions, *params], grad_outputs=[-problem.lr * v for v in adjoint]
            )
            d_observations += products[0]
            d_actions += products[1]
            adjoint = [v + hv for v, hv in zip(adjoint, products[2:], strict=True)]
        return outer, d_observations, d_actions

    return run


def autograd_one_graph(problem: Problem) -> Run:
    """The shortest program: differentiable SGD in one autograd graph, then .backward()."""
    observations, actions = (x.clone().requires_grad_() for x in problem.synthetic)
    states, targets, weights = problem.outer

    def run() -> Any:
        params = [p.clone().requires_grad_() for p in problem.params]
        for _ in range(problem.steps):
            grads = torch.autograd.grad(bc_loss(params, observations, actions), params, create_graph=True)
            params = [p - problem.lr * g for p, g in zip(params, grads, strict=True)]
        outer = weighted_loss(mlp(params, states), targets, weights)
        return outer, *torch.autograd.grad(outer, [observations, actions])

    return run


def torch_func(problem: Problem) -> Run:
    """torch.func: grad of a function that unrolls grad of functional_call."""
    network = _network(problem)
    theta = {name: parameter.detach() for name, parameter in network.named_parameters()}
    states, targets, weights = problem.outer

    def inner(params: dict[str, Tensor], observations: Tensor, actions: Tensor) -> Tensor:
        pred = torch.func.functional_call(network, params, (observations,))
        return F.mse_loss(pred, actions)

    def outer(observations: Tensor, actions: Tensor) -> Tensor:
        params = theta
        for _ in range(problem.steps):
            grads = torch.func.grad(inner)(params, observations, actions)
            params = {name: p - problem.lr * grads[name] for name, p in params.items()}
        return weighted_loss(torch.func.functional_call(network, params, (states,)), targets, weights)

    gradient = torch.func.grad_and_value(outer, argnums=(0, 1))

    def run() -> Any:
        grads, loss = gradient(*problem.synthetic)
        return loss, *grads

    return run


def torch_compile(problem: Problem) -> Run:
    """torch.compile of one inner step and of its pullback (compiling the whole unroll takes minutes and gigabytes)."""

    def step(params: tuple[Tensor, ...], observations: Tensor, actions: Tensor) -> tuple[Tensor, ...]:
        grads = torch.func.grad(bc_loss)(params, observations, actions)
        return tuple(p - problem.lr * g for p, g in zip(params, grads, strict=True))

    def pullback(params: Any, observations: Tensor, actions: Tensor, adjoint: Any) -> Any:
        return torch.func.vjp(step, params, observations, actions)[1](adjoint)

    def outer(params: Any, states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return weighted_loss(mlp(params, states), targets, weights)

    step_c = torch.compile(step, fullgraph=True, dynamic=False)
    pullback_c = torch.compile(pullback, fullgraph=True, dynamic=False)
    outer_c = torch.compile(torch.func.grad_and_value(outer), fullgraph=True, dynamic=False)

    @torch.no_grad()
    def run() -> Any:
        trajectory = [tuple(problem.params)]
        for _ in range(problem.steps):
            trajectory.append(step_c(trajectory[-1], *problem.synthetic))
        adjoint, loss = outer_c(trajectory.pop(), *problem.outer)
        d_observations, d_actions = (torch.zeros_like(x) for x in problem.synthetic)
        while trajectory:
            adjoint, d_s, d_a = pullback_c(trajectory.pop(), *problem.synthetic, tuple(adjoint))
            d_observations += d_s
            d_actions += d_a
        return loss, d_observations, d_actions

    return compiles(run)


def torchopt(problem: Problem) -> Run:
    """TorchOpt: MetaSGD steps a module differentiably, then .backward()."""
    import torchopt

    network = _network(problem)
    optimizer = torchopt.MetaSGD(network, lr=problem.lr)
    start = [torchopt.extract_state_dict(x, by="reference") for x in (network, optimizer)]
    observations, actions = (x.clone().requires_grad_() for x in problem.synthetic)
    states, targets, weights = problem.outer

    def run() -> Any:
        for _ in range(problem.steps):
            optimizer.step(F.mse_loss(network(observations), actions))
        outer = weighted_loss(network(states), targets, weights)
        result = outer, *torch.autograd.grad(outer, [observations, actions])
        for x, state in zip((network, optimizer), start, strict=True):
            torchopt.recover_state_dict(x, state)
        return result

    return run


def jax_scan(problem: Problem, checkpoint: bool = False) -> Run:
    """JAX: jit of grad through lax.scan, what a careful user would write; `checkpoint` recomputes each inner step."""
    import jax

    jax_mlp, jax_bc_loss, jax_weighted_loss = jax_functions()
    params, synthetic, outer_batch = to_jax(problem.params), to_jax(problem.synthetic), to_jax(problem.outer)

    def outer(synthetic: Any, params: Any, states: Any, targets: Any, weights: Any) -> Any:
        def step(params: Any, _: Any) -> Any:
            grads = jax.grad(jax_bc_loss)(params, *synthetic)
            return jax.tree.map(lambda p, g: p - problem.lr * g, params, grads), None

        body = jax.checkpoint(step) if checkpoint else step
        params, _ = jax.lax.scan(body, params, None, length=problem.steps)
        return jax_weighted_loss(jax_mlp(params, states), targets, weights)

    gradient = jax.jit(jax.value_and_grad(outer))

    def run() -> Any:
        return jax.block_until_ready(gradient(synthetic, params, *outer_batch))

    return run


def jax_checkpoint(problem: Problem) -> Run:
    """The same with jax.checkpoint around each inner step: less memory, one more forward."""
    return jax_scan(problem, checkpoint=True)


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
REFERENCE = Problem()
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

    yield "unrolled_bc/reference", reference
    yield "unrolled_bc/narrow", narrow


def _sweep() -> Iterator[tuple[str, Callable[[], Table]]]:
    """One shape parameter at a time around the reference, at T = 20: the autograd graph must fit at the largest."""
    base = replace(REFERENCE, steps=20)
    swept = {f"N={n}": replace(base, size=n) for n in (64, 256, 1024, 4096)}
    swept |= {f"width={w}": replace(base, hidden=(w, w, w)) for w in (64, 128, 256, 512, 1024)}
    swept |= {f"depth={d}": replace(base, hidden=(256,) * d) for d in (1, 2, 3, 5)}
    swept |= {f"T={t}": replace(base, steps=t) for t in (1, 10, 100)}
    for name, problem in swept.items():
        yield f"unrolled_bc/{name}", partial(_swept, problem, SHORT)
    for width in (64, 256):
        yield f"unrolled_bc/momentum,width={width}", partial(_momentum, swept[f"width={width}"])
    without_jax = [name for name in SHORT if "JAX" not in name]  # its threads are fixed when it starts
    for threads in (1, 2):
        yield f"unrolled_bc/threads={threads}", partial(_swept, REFERENCE, without_jax, threads)


def _swept(problem: Problem, names: list[str], threads: int | None = None) -> Table:
    title = describe(problem) + (f", {threads} threads" if threads else "")
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
