"""Losses whose gradient is computed in the same pass as their value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdw_fast import _C
from sdw_fast.ops.backend import cuda_stream

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
        _scale(gradients, grad_loss)
        return (None, *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[1:], strict=True)))


def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiplies in place by the loss's own gradient: 1 as a rule, but to ask another device would mean to wait."""
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return
    if len(gradients) > 1 or not factor.is_cuda or factor.dtype != torch.float32 or not hasattr(_C, "scale_cuda"):
        torch._foreach_mul_(gradients, factor)
        return
    with cuda_stream(factor) as stream:  # a large one: no traffic where the factor is 1
        _C.scale_cuda(gradients[0].view(-1), factor.reshape(1), stream)
