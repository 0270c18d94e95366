"""unrolled_bc as others write it: the peers of bench_unrolled_bc.py, each a builder as described there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.model import Problem, bc_loss, compiles, jax_functions, mlp, to_jax, weighted_loss

Run = Callable[[], Any]


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


def higher(problem: Problem) -> Run:
    """higher: innerloop_ctx makes a module and its optimizer functional and differentiable, then .backward()."""
    import higher

    network = _network(problem)
    optimizer = torch.optim.SGD(network.parameters(), lr=problem.lr)
    observations, actions = (x.clone().requires_grad_() for x in problem.synthetic)
    states, targets, weights = problem.outer

    def run() -> Any:
        with higher.innerloop_ctx(network, optimizer) as (policy, inner):
            for _ in range(problem.steps):
                inner.step(F.mse_loss(policy(observations), actions))
            outer = weighted_loss(policy(states), targets, weights)
            return outer, *torch.autograd.grad(outer, [observations, actions])

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
