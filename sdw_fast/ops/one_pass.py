"""Losses whose gradient is computed in the same pass as their value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# From the differentiable inputs, and whether their gradients are wanted: the loss and these gradients.
Evaluate = Callable[[Sequence[Tensor], bool], tuple[Tensor, list[Tensor] | None]]


class OnePassLoss(torch.autograd.Function):
    """`OnePassLoss.apply(evaluate, *inputs)` is the loss that `evaluate` finds for `inputs`, differentiable in them.

    The gradients wait on the graph and are handed over to the first backward pass without a copy; a second one (with
    `retain_graph=True`) evaluates again.
    """

    @staticmethod
    def forward(ctx: Any, evaluate: Evaluate, *inputs: Tensor) -> Tensor:
        loss, ctx.gradients = evaluate(inputs, any(ctx.needs_input_grad))
        ctx.evaluate = evaluate
        ctx.save_for_backward(*inputs)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            _, ctx.gradients = ctx.evaluate(ctx.saved_tensors, True)
        gradients, ctx.gradients = ctx.gradients, None
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:  # asking another device would wait for it
            torch._foreach_mul_(gradients, grad_loss)  # one launch for all
        return (None, *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[1:], strict=True)))
