"""The outer loss of offline behavior distillation: weighted squared error between a policy and target actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdw_fast import _C
from sdw_fast.ops.backend import check_precision, cuda_stream, cuda_workspace, resolve_backend
from sdw_fast.ops.mlp import check_floating, check_mlp, check_rows, mlp_activations, mlp_deltas, mlp_gradients
from sdw_fast.ops.one_pass import OnePassLoss
from sdw_fast.ops.weighted_bc_loss import check_weights, weighted_error


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

    Args:
        params: [W1, b1, W2, b2, …] of the ReLU policy, in `torch.nn.Linear` layout, W (out, in).
        states: (M, D), normalized as the policy shall see them.
        targets: (M, A) target actions y.
        weights: (M,); a row of weight zero counts for nothing, whatever its target (NaN included).
        precision: Of the products in backend "cuda": "tf32", operands rounded to 10 bits of mantissa for the tensor
            cores, sums in float32; or "ieee", float32 throughout. The others compute in the tensors' own precision.
        backend: "auto", "cpu", "cuda" or "torch"; "torch" also takes float64.

    Returns:
        The loss, a scalar tensor.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or backend are not as said, or states, targets or weights
            require a gradient.
    """
    check_floating("behavior_matching", states=states, targets=targets, weights=weights)
    check_rows("behavior_matching", states=states, targets=targets)
    check_mlp("behavior_matching", params, states, targets)
    check_weights("behavior_matching", weights, states.shape[0], constants={"states": states, "targets": targets})
    check_precision("behavior_matching", precision)
    resolved = resolve_backend("behavior_matching", backend, [states, targets, weights, *params])
    backends: dict[str, Callable[..., Any]] = {
        "torch": _torch,
        "cpu": _cpu,
        "cuda": partial(_cuda, precision == "ieee"),
    }
    return OnePassLoss.apply(partial(backends[resolved], states, targets, weights), *params)


def _torch(
    states: Tensor, targets: Tensor, weights: Tensor, params: Sequence[Tensor], want_gradients: bool
) -> tuple[Tensor, list[Tensor] | None]:
    activations = mlp_activations(params, states)
    output = activations[-1]  # (M, A)
    loss, grad_output = weighted_error(output, targets, weights)
    if not want_gradients:
        return loss, None
    deltas = mlp_deltas(params, activations, grad_output * (1 - output * output))
    return loss, mlp_gradients(activations, deltas)


def _cpu(
    states: Tensor, targets: Tensor, weights: Tensor, params: Sequence[Tensor], want_gradients: bool
) -> tuple[Tensor, list[Tensor] | None]:
    """The kernel of csrc/cpu/behavior_matching.cpp."""
    gradients = [torch.empty(param.shape) for param in params] if want_gradients else None
    loss = _C.behavior_matching(
        [param.detach().contiguous() for param in params],
        states.contiguous(),
        targets.contiguous(),
        weights.contiguous(),
        gradients,
    )
    return torch.tensor(loss), gradients


def _cuda(
    ieee: bool,
    states: Tensor,
    targets: Tensor,
    weights: Tensor,
    params: Sequence[Tensor],
    want_gradients: bool,
) -> tuple[Tensor, list[Tensor] | None]:
    """The kernel of csrc/cuda/behavior_matching.cu, which writes all gradients into one tensor."""
    sizes = [param.numel() for param in params]
    gradients = states.new_empty(sum(sizes)) if want_gradients else None
    loss = states.new_empty(1)
    with cuda_stream(states) as stream:
        widths = [states.shape[1], *(bias.shape[0] for bias in params[1::2])]
        size = _C.behavior_matching_cuda_workspace(states.shape[0], widths, want_gradients)
        workspace = cuda_workspace("behavior_matching", size, states.device, "use a narrower policy")
        _C.behavior_matching_cuda(
            [param.detach().contiguous() for param in params],
            states.contiguous(),
            targets.contiguous(),
            weights.contiguous(),
            loss,
            gradients,
            workspace,
            ieee,
            stream,
        )
    if gradients is None:
        return loss[0], None
    return loss[0], [part.view_as(param) for part, param in zip(gradients.split(sizes), params, strict=True)]
