"""The outer descent: its optimizer, learning rate and the clipping of the hypergradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdw_fast.config import DistillConfig


def outer_optimizer(config: DistillConfig, leaves: list[Tensor], lr: Any, *, fused: bool) -> torch.optim.Optimizer:
    """The outer optimizer; the fused kernels can be told on the device to leave a step out."""
    if config.optimizer == "adam":
        return torch.optim.Adam(leaves, lr=lr, betas=(config.momentum, 0.999), fused=fused or None)
    optimizer = torch.optim.SGD(leaves, lr=lr, momentum=config.momentum, fused=fused or None)
    if config.momentum:  # fused SGD allocates it in its first step, and leaves it undefined if that is left out
        for leaf in leaves:
            optimizer.state[leaf]["momentum_buffer"] = torch.zeros_like(leaf)
    return optimizer


def outer_lr(config: DistillConfig, step: int) -> float:
    """The outer learning rate of a step, the first of which is 1."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * (1 + math.cos(math.pi * min((step - 1) / config.steps, 1.0))) / 2


def clip(leaves: Sequence[Tensor], bound: float) -> Tensor:
    """Scales each run's hypergradient down to norm `bound` where it is longer; returns the norms before, (R,)."""
    norms = norms_of(leaves)
    factors = (bound / (norms + 1e-6)).clamp(max=1.0)
    for leaf in leaves:
        if leaf.grad is not None:
            leaf.grad.mul_(factors[:, None, None])
    return norms


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """For each run the norm of the gradients of all tensors together, (R,)."""
    gradients = [t.grad.flatten(1) for t in tensors if t.grad is not None]
    return torch.linalg.vector_norm(torch.cat(gradients, dim=1), dim=1)  # on a GPU few calls are what counts
