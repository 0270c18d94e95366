"""One call of every op, and of the density on them, large enough for several threads."""

from __future__ import annotations

import torch
from oracle import surface

from sdw_fast import ops
from sdw_fast.density import knn_log_density

STATES = torch.from_numpy(surface(20_000, 8, 0))
NETWORK = [
    torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 8 for shape in ((64, 8), (64,), (2, 64), (2,))
]


def neighbors() -> torch.Tensor:
    return ops.knn(STATES, k=3)[0]


def unrolled() -> torch.Tensor:
    params = [tensor.clone().requires_grad_() for tensor in NETWORK]
    trained = ops.unrolled_bc(STATES[:256], STATES[:256, :2], params, steps=10, lr=0.1)
    return torch.autograd.grad(sum(tensor.square().sum() for tensor in trained), params[0])[0]


def matching() -> torch.Tensor:
    params = [tensor.clone().requires_grad_() for tensor in NETWORK]
    loss = ops.behavior_matching(params, STATES[:2_000], STATES[:2_000, :2], torch.ones(2_000))
    return torch.autograd.grad(loss, params[0])[0]


def weighted() -> torch.Tensor:
    return ops.weighted_bc_loss(STATES, STATES + 1, torch.ones(len(STATES)))


def density() -> torch.Tensor:
    return knn_log_density(STATES)


WORK = [neighbors, unrolled, matching, weighted, density]
