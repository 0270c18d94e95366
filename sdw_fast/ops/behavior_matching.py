"""The outer loss of offline behavior distillation: weighted squared error between a policy and target actions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sdw_fast.ops._backend import (
    _C,
    check_precision,
    cuda_memory,
    cuda_stream,
    cuda_workspace,
    float32_products,
    resolve_backend,
    views,
    without_autocast,
)
from sdw_fast.ops._head import HEADS, Identity, check_head, one_hot
from sdw_fast.ops._mlp import (
    check_floating,
    check_mlp,
    check_problems,
    check_rows,
    cut,
    flatten,
    layer_widths,
    mlp_activations,
    mlp_deltas,
    side_by_side,
)
from sdw_fast.ops._registration import Adjoint, check_constant, register, wants_gradient
from sdw_fast.ops.weighted_bc_loss import check_weights, known

# In backend "cuda", problems of so many rows go through PyTorch's products, smaller ones through the kernel. On an H200
# the loss and gradient of 17-256-256-256-6 in tf32 take the kernel 92 ns a row, the products 11 ns a row behind 1 ms of
# launches.
ROWS_FOR_PRODUCTS = 16_384
# Numbers that the activations of a chunk of rows hold at most: 4 GiB, or a sixteenth of the device's memory. Smaller
# chunks are slower: each has launches of its own, and products over fewer rows.
CHUNK = 1 << 30


def behavior_matching(
    params: Iterable[Tensor],
    states: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    head: str = "tanh",
    precision: str = "tf32",
    backend: str = "auto",
) -> Tensor:
    """Returns the weighted error of a policy, differentiable in `params` alone.

    | head | z = MLP(s) | result |
    | --- | --- | --- |
    | "tanh" | a = tanh(z) | Σ_i w_i ‖a_i − y_i‖² / (M·A) |
    | "identity" | a = z | Σ_i w_i ‖a_i − y_i‖² / (M·A) |
    | "softmax" | p = softmax(z) | Σ_i w_i (−Σ_j y_ij log p_ij) / M |

    The gradient for the parameters is computed in the same pass as the loss, so that `.backward()` costs nothing. In
    backend "torch" alone it can be differentiated again; the others refuse to.

    R independent problems of one shape run in one call when every tensor has a leading dimension R: each parameter
    (R, …), states (R, M, D), targets (R, M, A), weights (R, M); in backend "cpu" a thread each. Each loss has the bits
    of a call of its own.

    Backend "cuda" runs one kernel for small M and, from 16,384 rows on, PyTorch's matrix products in chunks of rows.

    Args:
        params: [W1, b1, W2, b2, …] of the ReLU policy, in `torch.nn.Linear` layout, W (out, in).
        states: (M, D), normalized as the policy shall see them.
        targets: (M, A) target actions y; with "softmax" probabilities of A classes, or class numbers from 0 to A − 1,
            (M,) of an integer dtype.
        weights: (M,); a row of weight zero counts for nothing, whatever its target (NaN included).
        head: "tanh", "identity" or "softmax", as above.
        precision: Of the products in backend "cuda": "tf32", operands rounded to 10 bits of mantissa for the tensor
            cores, sums in float32; or "ieee", float32 throughout; PyTorch's own settings do not matter. The others
            compute in the tensors' own precision.
        backend: "auto", "cpu", "cuda" or "torch"; "torch" also takes float64.

    Returns:
        The loss, a scalar tensor; of R problems (R,).

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or backend are not as said, or states, targets or weights
            require a gradient.
    """
    op = "behavior_matching"
    params = list(params)
    check_head(op, head)
    targets = one_hot(op, head, params, targets=targets)
    check_floating(op, states=states, targets=targets, weights=weights)
    if batched := states.ndim == 3:
        problems = check_problems(op, params, states=states, targets=targets, weights=weights)
        _check_problem(op, [param[0] for param in params], states[0], targets[0], weights[0])
    else:
        problems = 1
        _check_problem(op, params, states, targets, weights)
    asked = wants_gradient(states), wants_gradient(targets), wants_gradient(weights)
    check_constant(op, **dict(zip(("states", "targets", "weights"), asked, strict=True)))
    check_precision(op, precision)
    resolved = resolve_backend(op, backend, [states, targets, weights, *params])
    states, targets, weights = (tensor if batched else tensor[None] for tensor in (states, targets, weights))
    if resolved == "torch":
        each = zip(*(param if batched else param[None] for param in params), strict=True)
        with without_autocast(states.device):
            problem = zip(each, states, targets, weights, strict=True)
            losses = torch.stack([_twin(HEADS[head], *data) for data in problem])
    else:
        data = flatten(params, problems), states, targets, weights
        losses = _op(*data, layer_widths(params), head, precision == "ieee", resolved, False)
    return losses if batched else losses.reshape(())


def _check_problem(op: str, params: Sequence[Tensor], states: Tensor, targets: Tensor, weights: Tensor) -> None:
    check_rows(op, states=states, targets=targets)
    check_mlp(op, params, states, targets)
    check_weights(op, weights, states.shape[0])


def _twin(head: Identity, params: Sequence[Tensor], states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The loss of one problem; autograd differentiates it."""
    z = mlp_activations(params, states)[-1]  # (M, A)
    return _total(head, z, targets, weights) / head.count(*z.shape)


def _total(head: Identity, z: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The sum of the weighted losses of rows."""
    none = weights[:, None] == 0  # 0 · NaN would be NaN
    losses = head.losses(z, targets.masked_fill(none, 0)).masked_fill(none, 0)  # (rows, A)
    return (weights[:, None] * losses).sum()


def _products(
    head: Identity, params: Sequence[Tensor], states: Tensor, targets: Tensor, weights: Tensor, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """The loss of one problem and, if `keep`, its gradients: by PyTorch's products, a chunk of rows after another.

    cuBLAS looks at where operands lie in memory when it chooses how to multiply. All are copies here, and so the bits
    do not depend on where a problem lies.
    """
    params = [param.clone() for param in params]
    gradients = [torch.zeros_like(param) for param in params] if keep else []
    total = states.new_zeros(())
    chunks = len(states) * sum(layer_widths(params)) // _chunk(states.device) + 1
    for s, y, w in zip(*(tensor.chunk(chunks) for tensor in (states, targets, weights)), strict=True):
        copy = s.clone(memory_format=torch.contiguous_format)
        total += _add_chunk(head, params, copy, y, w, head.scale(*targets.shape), gradients)
    return total / head.count(*targets.shape), gradients


def _chunk(device: torch.device) -> int:
    if device.type != "cuda":
        return CHUNK
    return min(CHUNK, torch.cuda.get_device_properties(device).total_memory // (16 * 4))


def _add_chunk(
    head: Identity,
    params: Sequence[Tensor],
    states: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float,
    gradients: Sequence[Tensor],
) -> Tensor:
    """The sum of the weighted losses of some rows; their part of the gradients, with c = `scale`, is added to those."""
    *activations, z = mlp_activations(params, states)
    if gradients:
        output = head.output(z)  # (rows, A)
        error = scale * weights[:, None] * head.error(output, targets)
        error.masked_fill_(weights[:, None] == 0, 0)  # 0 · NaN would be NaN
        deltas = mlp_deltas(params, activations, head.delta(error, output))
        for layer, delta in zip(reversed(range(len(activations))), deltas, strict=True):
            gradients[2 * layer].addmm_(delta.t(), activations[layer])
            gradients[2 * layer + 1] += delta.sum(0)
    return _total(head, z, targets, weights)


def _run(
    params: Tensor,
    states: Tensor,
    targets: Tensor,
    weights: Tensor,
    widths: list[int],
    head: str,
    ieee: bool,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Adjoint | None]:
    """The kernels of csrc/cpu/behavior_matching.cpp and csrc/cuda/behavior_matching.cu, or PyTorch's products.

    From params (R, P), states (R, M, D), targets (R, M, A), weights (R, M): losses (R,).
    """
    if backend == "cuda" and states.shape[1] >= ROWS_FOR_PRODUCTS:
        params, states, targets, weights = (t.detach() for t in (params, states, targets, weights))
        with (
            cuda_memory("behavior_matching", "use a narrower policy"),
            without_autocast(params.device),
            float32_products("ieee" if ieee else "tf32"),
        ):
            problems = zip(zip(*cut(params, widths), strict=True), states, targets, weights, strict=True)
            results = [_products(HEADS[head], *problem, keep) for problem in problems]
        losses = torch.stack([loss for loss, _ in results])
        return losses, known(side_by_side(slopes for _, slopes in results)) if keep else None
    losses = params.new_empty(len(params))
    gradients = params.new_empty(params.shape) if keep else None
    p, s, y, w, values, slopes = views(params, states, targets, weights, losses, gradients)
    if backend == "cpu":
        _C.behavior_matching_cpu(widths, head, p, s, y, w, values, slopes)
    else:
        with cuda_stream(params) as stream:
            size = _C.behavior_matching_cuda_workspace(states.shape[1], widths, keep)
            workspace = cuda_workspace("behavior_matching", size, params.device, "use a narrower policy")
            _C.behavior_matching_cuda(widths, head, p, s, y, w, values, slopes, ieee, workspace, stream)
    return losses, None if gradients is None else known(gradients)


_op = register(
    "behavior_matching",
    ["params", "states", "targets", "weights"],
    "SymInt[] widths, str head, bool ieee, str backend",
    _run,
    result=lambda params, *_: params.new_empty(params.shape[0]),
    differentiable=1,
    once=True,
    second='pass backend="torch" if you need that, or detach() the gradient',
    problems=True,
)
