"""The weighted behavior-cloning loss for those who bring their own network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdw_fast.ops._backend import _C, cuda_stream, cuda_workspace, resolve_backend, views, without_autocast
from sdw_fast.ops._mlp import check_floating, check_rows
from sdw_fast.ops._registration import Adjoint, check_constant, register, wants_gradient


def weighted_bc_loss(pred: Tensor, target: Tensor, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Returns Σ_i w_i ‖pred_i − target_i‖² / (M·A), differentiable in `pred` alone.

    The gradient is computed in the same pass over memory as the loss. It can be differentiated again.

    Args:
        pred: (M, A), what the network says.
        target: (M, A).
        weights: (M,); a row of weight zero counts for nothing, whatever its target (NaN included).
        backend: "auto", "cpu", "cuda" or "torch"; "torch" also takes float64.

    Returns:
        The loss, a scalar tensor.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or backend are not as said, or target or weights require a
            gradient.
    """
    check_floating("weighted_bc_loss", pred=pred, target=target, weights=weights)
    check_rows("weighted_bc_loss", pred=pred, target=target)
    if pred.shape != target.shape:
        raise ValueError(
            f"weighted_bc_loss: pred and target must have one shape, got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
    check_weights("weighted_bc_loss", weights, pred.shape[0])
    check_constant("weighted_bc_loss", target=wants_gradient(target), weights=wants_gradient(weights))
    resolved = resolve_backend("weighted_bc_loss", backend, [pred, target, weights])
    if resolved == "torch":
        with without_autocast(pred.device):
            return weighted_error(pred, target, weights)
    return _op(pred, target, weights, resolved, False)


def weighted_error(pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The twin: Σ_i w_i ‖pred_i − target_i‖² / (M·A)."""
    error = torch.where(weights[:, None] == 0, 0, pred - target)  # (M, A); 0 · NaN would be NaN
    return (weights[:, None] * error.square()).sum() / pred.numel()


def _run(pred: Tensor, target: Tensor, weights: Tensor, backend: str, keep: bool) -> tuple[Tensor, Adjoint | None]:
    """The kernels of csrc/cpu/weighted_bc_loss.cpp and csrc/cuda/weighted_bc_loss.cu."""
    loss = pred.new_empty(1)
    gradient = pred.new_empty(pred.shape) if keep else None
    x, y, w, value, slope = views(pred, target, weights, loss, gradient)
    if backend == "cpu":
        _C.weighted_bc_loss_cpu(x, y, w, value, slope)
    else:
        with cuda_stream(pred) as stream:
            size = _C.weighted_bc_loss_cuda_workspace(*pred.shape)
            workspace = cuda_workspace("weighted_bc_loss", size, pred.device, "use smaller batches")
            _C.weighted_bc_loss_cuda(x, y, w, value, slope, workspace, stream)
    return loss.view(()), None if gradient is None else known(gradient)


def _second(direction: Tensor, grad: Tensor, pred: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ⟨direction, grad · ∇H⟩ for grad and pred, ∇H = 2 w (pred − target) / (M·A)."""
    scale = 2 / pred.numel() * weights[:, None]
    slope = torch.where(scale == 0, 0, scale * (pred - target))  # (M, A)
    return (direction * slope).sum(), grad * scale * direction


def known(gradient: Tensor) -> Adjoint:
    """The adjoint of losses whose gradient is known, a row of it a loss: it is handed over without a copy."""

    def adjoint(grad_losses: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        if grad_losses.dim() == 0 and not gradient.is_cuda:  # the common case, by a shorter way
            if (factor := grad_losses.item()) != 1:
                gradient.mul_(factor)
        else:
            factors = grad_losses.reshape(-1)
            _scale(gradient.view(len(factors), -1), factors)
        return [gradient]

    return adjoint


def _scale(rows: Tensor, factors: Tensor) -> None:
    """Multiplies each row by its factor in place: 1 as a rule, but to ask another device would mean to wait."""
    if rows.is_cuda:
        with cuda_stream(rows) as stream:  # no traffic where the factor is 1
            _C.scale_cuda(rows, factors, stream)
    elif any(factor != 1 for factor in factors.tolist()):
        rows.mul_(factors[:, None])


def check_weights(op: str, weights: Tensor, rows: int) -> None:
    """Raises ValueError unless `weights` is (rows,)."""
    if weights.shape != (rows,):
        raise ValueError(f"{op}: weights must have shape ({rows},), got {tuple(weights.shape)}")


_op = register(
    "weighted_bc_loss",
    ["pred", "target", "weights"],
    "str backend",
    _run,
    result=lambda pred, *_: pred.new_empty(()),
    differentiable=1,
    once=True,
    second=_second,
    problems=False,
)
