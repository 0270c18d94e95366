"""`unrolled_bc` as the inner loop of three outer problems of one's own.

    python examples/outer_loops.py

Each learns something by its hypergradient, through a whole training of a policy, with PyTorch's own optimizers:
an outer loss of one's own, the learning rates of the inner steps, and weights of the pairs, some of which are wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from sdw_fast.ops import unrolled_bc

STEPS = 40  # inner


def main() -> None:
    for learn in (own_loss, step_sizes, pair_weights):
        before, after = learn()
        print(f"{learn.__name__:<13} outer loss {before:.4f} -> {after:.4f}")


def own_loss() -> tuple[float, float]:
    """Pairs whose policy is close to the teacher's in the worst tenth of the states, not in the mean."""
    states, teacher = problem()
    pairs = [states[:16].clone().requires_grad_(), teacher(states[:16]).requires_grad_()]

    def outer() -> Tensor:
        trained = unrolled_bc(*pairs, network(), steps=STEPS, lr=0.1, momentum=0.9)
        errors = (policy(trained, states) - teacher(states)).square().mean(1)
        return errors.topk(len(errors) // 10).values.mean()

    return minimized(outer, pairs, lr=0.03)


def step_sizes() -> tuple[float, float]:
    """A learning rate for each stretch of ten inner steps: one call a stretch, each from where the last one ended."""
    states, teacher = problem()
    pairs = states[:64], teacher(states[:64])
    log_rates = torch.full((STEPS // 10,), -3.0, requires_grad=True)

    def outer() -> Tensor:
        params = network()
        for rate in log_rates.exp():
            params = unrolled_bc(*pairs, params, steps=10, lr=rate)
        return (policy(params, states) - teacher(states)).square().mean()

    return minimized(outer, [log_rates], lr=0.1)


def pair_weights() -> tuple[float, float]:
    """Which of 64 pairs to believe, where the actions of 16 are wrong, from 32 clean ones.

    The op has one loss, the mean over its pairs. A pair of weight w stands for w copies of it: a mixture of its own
    action and of what the policy says anyway, a target π + w (y − π), gives w times its gradient. So training goes in
    single steps, and each step's targets are made from the policy before it.
    """
    states, teacher = problem()
    pairs, actions = states[:64], teacher(states[:64])
    actions[:16] = -actions[:16]
    clean = states[64:96], teacher(states[64:96])
    logits = torch.zeros(64, 1, requires_grad=True)

    def outer() -> Tensor:
        params = network()
        for _ in range(STEPS):
            own = policy(params, pairs)
            targets = own + 2 * logits.sigmoid() * (actions - own)
            params = unrolled_bc(pairs, targets, params, steps=1, lr=0.5)
        return (policy(params, clean[0]) - clean[1]).square().mean()

    losses = minimized(outer, [logits], lr=0.3)
    weights = 2 * logits.detach().sigmoid()
    print(f"{'':<13} weights {weights[:16].mean():.2f} of the wrong pairs, {weights[16:].mean():.2f} of the others")
    return losses


def minimized(outer: Callable[[], Tensor], leaves: list[Tensor], lr: float, steps: int = 40) -> tuple[float, float]:
    """The outer loss before and after some steps of Adam."""
    optimizer = torch.optim.Adam(leaves, lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = outer()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def problem() -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """200 states of four numbers, and a teacher of two actions."""
    states = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    return states, lambda s: torch.tanh(torch.stack([s[:, 0] - s[:, 1], s[:, 2] * s[:, 3]], 1))


def network() -> list[Tensor]:
    """The parameters of an MLP with one hidden layer, the same every time."""
    generator = torch.Generator().manual_seed(1)
    layers = itertools.pairwise([4, 32, 2])
    params = [(torch.randn(b, a, generator=generator) / a**0.5, torch.zeros(b)) for a, b in layers]
    return list(itertools.chain.from_iterable(params))


def policy(params: list[Tensor], states: Tensor) -> Tensor:
    hidden = torch.relu(torch.nn.functional.linear(states, params[0], params[1]))
    return torch.tanh(torch.nn.functional.linear(hidden, params[2], params[3]))


if __name__ == "__main__":
    main()
