"""The weighted behavior-cloning loss for those who bring their own network."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sdw_fast.ops._backend import _C, cuda_stream, cuda_workspace, resolve_backend
from sdw_fast.ops._mlp import check_floating, check_rows
from sdw_fast.ops._one_pass import OnePassLoss


def weighted_bc_loss(pred: Tensor, target: Tensor, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Returns Σ_i w_i ‖pred_i − target_i‖² / (M·A), differentiable in `pred` alone.

    The gradient is computed in the same pass over memory as the loss.

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
    check_constant("weighted_bc_loss", target=target, weights=weights)
    resolved = resolve_backend("weighted_bc_loss", backend, [pred, target, weights])
    if resolved == "torch":
        return weighted_error(pred, target, weights)
    return OnePassLoss.apply(partial(_compiled, resolved, target, weights), pred)


def weighted_error(pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The twin: Σ_i w_i ‖pred_i − target_i‖² / (M·A)."""
    error = torch.where(weights[:, None] == 0, 0, pred - target)  # (M, A); 0 · NaN would be NaN
    return (weights[:, None] * error.square()).sum() / pred.numel()


def _compiled(
    backend: str, target: Tensor, weights: Tensor, pred: Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The kernels of csrc/cpu/weighted_bc_loss.cpp and csrc/cuda/weighted_bc_loss.cu: the loss, its gradient (M, A)."""
    loss = pred.new_empty(1)
    gradient = pred.new_empty(pred.shape) if want_gradient else None
    tensors = pred, target.detach().contiguous(), weights.detach().contiguous(), loss, gradient
    if backend == "cpu":
        _C.weighted_bc_loss_cpu(*tensors)
    else:
        with cuda_stream(pred) as stream:
            size = _C.weighted_bc_loss_cuda_workspace(*pred.shape)
            workspace = cuda_workspace("weighted_bc_loss", size, pred.device, "use smaller batches")
            _C.weighted_bc_loss_cuda(*tensors, workspace, stream)
    return loss.view(()), gradient


def check_weights(op: str, weights: Tensor, rows: int) -> None:
    """Raises ValueError unless `weights` is (rows,)."""
    if weights.shape != (rows,):
        raise ValueError(f"{op}: weights must have shape ({rows},), got {tuple(weights.shape)}")


def check_constant(op: str, **tensors: Tensor) -> None:
    """Raises ValueError where a gradient is asked for that the op does not have."""
    asking = [name for name, tensor in tensors.items() if tensor.requires_grad]
    if asking and torch.is_grad_enabled():
        raise ValueError(
            f"{op} is not differentiable in {', '.join(asking)}; pass {asking[0]}.detach(), or write the loss in plain "
            "PyTorch if you need that gradient"
        )
