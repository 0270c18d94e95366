"""Losses whose compiled kernel computes the gradient in the same pass as the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdw_fast.ops._backend import _C, cuda_stream

# From the differentiable input, and whether its gradient is wanted: the losses, and the gradients of their sum. One
# loss, of shape (), or R of them, (R,), each with a row of the gradient.
Evaluate = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]


class OnePassLoss(torch.autograd.Function):
    """`OnePassLoss.apply(evaluate, x)` are the losses that `evaluate` finds for x, differentiable in x.

    The gradient waits on the graph and is handed over to the first backward pass without a copy; a second one (with
    `retain_graph=True`) evaluates again.
    """

    @staticmethod
    def forward(ctx: Any, evaluate: Evaluate, x: Tensor) -> Tensor:
        losses, ctx.gradient = evaluate(x.detach().contiguous(), ctx.needs_input_grad[1])
        ctx.evaluate = evaluate
        ctx.save_for_backward(x)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[None, Tensor]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            _, gradient = ctx.evaluate(ctx.saved_tensors[0].detach().contiguous(), True)
        factors = grad_losses.detach().reshape(-1).contiguous()
        _scale(gradient.view(len(factors), -1), factors)
        return None, gradient


def _scale(rows: Tensor, factors: Tensor) -> None:
    """Multiplies each row by its factor in place: 1 as a rule, but to ask another device would mean to wait."""
    if rows.is_cuda:
        with cuda_stream(rows) as stream:  # no traffic where the factor is 1
            _C.scale_cuda(rows, factors, stream)
    elif any(factor != 1 for factor in factors.tolist()):
        rows.mul_(factors[:, None])
