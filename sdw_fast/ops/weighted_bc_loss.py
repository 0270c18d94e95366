"""The weighted behavior-cloning loss for those who bring their own network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sdw_fast import _C
from sdw_fast.ops.backend import cuda_stream, cuda_workspace, resolve_backend
from sdw_fast.ops.mlp import check_floating, check_rows
from sdw_fast.ops.one_pass import OnePassLoss


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
    check_weights("weighted_bc_loss", weights, pred.shape[0], constants={"target": target})
    resolved = resolve_backend("weighted_bc_loss", backend, [pred, target, weights])
    evaluate = {"torch": _torch, "cpu": _cpu, "cuda": _cuda}[resolved]
    return OnePassLoss.apply(partial(evaluate, target, weights), pred)


def check_weights(op: str, weights: Tensor, rows: int, constants: dict[str, Tensor]) -> None:
    """Raises ValueError unless `weights` is (rows,) and neither it nor any of `constants` requires a gradient."""
    if weights.shape != (rows,):
        raise ValueError(f"{op}: weights must have shape ({rows},), got {tuple(weights.shape)}")
    asking = [name for name, tensor in {**constants, "weights": weights}.items() if tensor.requires_grad]
    if asking and torch.is_grad_enabled():
        raise ValueError(
            f"{op} is not differentiable in {', '.join(asking)}; pass {asking[0]}.detach(), or write the loss in plain "
            "PyTorch if you need that gradient"
        )


def weighted_error(pred: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss and its gradient for `pred` (M, A)."""
    error = torch.where(weights[:, None] == 0, 0, pred - target)
    weighted = weights[:, None] * error / pred.numel()
    return (weighted * error).sum(), 2 * weighted


def _torch(
    target: Tensor, weights: Tensor, inputs: Sequence[Tensor], want_gradient: bool
) -> tuple[Tensor, list[Tensor] | None]:
    loss, gradient = weighted_error(inputs[0], target, weights)
    return loss, [gradient] if want_gradient else None


def _cpu(
    target: Tensor, weights: Tensor, inputs: Sequence[Tensor], want_gradient: bool
) -> tuple[Tensor, list[Tensor] | None]:
    """The kernel of csrc/cpu/weighted_bc_loss.cpp."""
    pred = inputs[0].detach().contiguous()
    gradient = torch.empty(pred.shape) if want_gradient else None
    loss = _C.weighted_bc_loss(pred, target.detach().contiguous(), weights.detach().contiguous(), gradient)
    return torch.tensor(loss), None if gradient is None else [gradient]


def _cuda(
    target: Tensor, weights: Tensor, inputs: Sequence[Tensor], want_gradient: bool
) -> tuple[Tensor, list[Tensor] | None]:
    """The kernel of csrc/cuda/weighted_bc_loss.cu."""
    pred = inputs[0].detach().contiguous()
    gradient = torch.empty_like(pred) if want_gradient else None
    loss = pred.new_empty(1)
    with cuda_stream(pred) as stream:
        size = _C.weighted_bc_loss_cuda_workspace(*pred.shape)
        workspace = cuda_workspace("weighted_bc_loss", size, pred.device, "use smaller batches")
        _C.weighted_bc_loss_cuda(
            pred, target.detach().contiguous(), weights.detach().contiguous(), loss, gradient, workspace, stream
        )
    return loss[0], None if gradient is None else [gradient]
