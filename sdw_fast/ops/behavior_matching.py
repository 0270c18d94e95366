"""The outer loss of offline behavior distillation: weighted squared error between a policy and target actions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sdw_fast.ops._backend import _C, check_precision, cuda_stream, cuda_workspace, resolve_backend
from sdw_fast.ops._mlp import (
    check_floating,
    check_mlp,
    check_problems,
    check_rows,
    flatten,
    layer_widths,
    mlp_activations,
)
from sdw_fast.ops._one_pass import OnePassLoss
from sdw_fast.ops.weighted_bc_loss import check_constant, check_weights, weighted_error


def behavior_matching(
    params: Sequence[Tensor],
    states: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    precision: str = "tf32",
    backend: str = "auto",
) -> Tensor:
    """Returns Σ_i w_i ‖tanh(MLP(s_i)) − y_i‖² / (M·A), differentiable in `params` alone.

    The gradient for the parameters is computed in the same pass as the loss, so that `.backward()` costs nothing.

    R independent problems of one shape run in one call when every tensor has a leading dimension R: each parameter
    (R, …), states (R, M, D), targets (R, M, A), weights (R, M). Each loss has the bits of a call of its own.

    Args:
        params: [W1, b1, W2, b2, …] of the ReLU policy, in `torch.nn.Linear` layout, W (out, in).
        states: (M, D), normalized as the policy shall see them.
        targets: (M, A) target actions y.
        weights: (M,); a row of weight zero counts for nothing, whatever its target (NaN included).
        precision: Of the products in backend "cuda": "tf32", operands rounded to 10 bits of mantissa for the tensor
            cores, sums in float32; or "ieee", float32 throughout. The others compute in the tensors' own precision.
        backend: "auto", "cpu", "cuda" or "torch"; "torch" also takes float64.

    Returns:
        The loss, a scalar tensor; of R problems (R,).

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or backend are not as said, or states, targets or weights
            require a gradient.
    """
    op = "behavior_matching"
    check_floating(op, states=states, targets=targets, weights=weights)
    if batched := states.ndim == 3:
        problems = check_problems(op, params, states=states, targets=targets, weights=weights)
        _check_problem(op, [param[0] for param in params], states[0], targets[0], weights[0])
    else:
        problems = 1
        _check_problem(op, params, states, targets, weights)
    check_constant(op, states=states, targets=targets, weights=weights)
    check_precision(op, precision)
    resolved = resolve_backend(op, backend, [states, targets, weights, *params])
    states, targets, weights = (tensor if batched else tensor[None] for tensor in (states, targets, weights))
    if resolved == "torch":
        each = zip(*(param if batched else param[None] for param in params), strict=True)
        losses = torch.stack([_twin(*problem) for problem in zip(each, states, targets, weights, strict=True)])
    else:
        evaluate = partial(_compiled, resolved, precision == "ieee", layer_widths(params), states, targets, weights)
        losses = OnePassLoss.apply(evaluate, flatten(params, problems))
    return losses if batched else losses.reshape(())


def _check_problem(op: str, params: Sequence[Tensor], states: Tensor, targets: Tensor, weights: Tensor) -> None:
    check_rows(op, states=states, targets=targets)
    check_mlp(op, params, states, targets)
    check_weights(op, weights, states.shape[0])


def _twin(params: Sequence[Tensor], states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The loss of one problem; autograd differentiates it."""
    output = mlp_activations(params, states)[-1]  # (M, A)
    return weighted_error(output, targets, weights)


def _compiled(
    backend: str,
    ieee: bool,
    widths: list[int],
    states: Tensor,
    targets: Tensor,
    weights: Tensor,
    params: Tensor,
    want_gradients: bool,
) -> tuple[Tensor, Tensor | None]:
    """The kernels of csrc/cpu/behavior_matching.cpp and csrc/cuda/behavior_matching.cu.

    From states (R, M, D), targets (R, M, A), weights (R, M) and params (R, P): losses (R,) and gradients (R, P).
    """
    losses = params.new_empty(len(params))
    gradients = params.new_empty(params.shape) if want_gradients else None
    states, targets, weights = (tensor.detach().contiguous() for tensor in (states, targets, weights))
    if backend == "cpu":
        _C.behavior_matching_cpu(widths, params, states, targets, weights, losses, gradients)
    else:
        with cuda_stream(params) as stream:
            size = _C.behavior_matching_cuda_workspace(states.shape[1], widths, want_gradients)
            workspace = cuda_workspace("behavior_matching", size, params.device, "use a narrower policy")
            _C.behavior_matching_cuda(
                widths, params, states, targets, weights, losses, gradients, ieee, workspace, stream
            )
    return losses, gradients
