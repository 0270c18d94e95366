"""The network of the ops: a ReLU multilayer perceptron up to its head (_head.py), and checks of what comes in.

params = [W1, b1, W2, b2, …] as `torch.nn.Linear` has them, W_l (out, in), b_l (out,):
h_l = relu(h_{l-1} W_lᵀ + b_l), z = h_{L-1} W_Lᵀ + b_L.
R networks of one shape have a leading dimension R on each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def mlp_activations(params: Sequence[Tensor], inputs: Tensor) -> list[Tensor]:
    """Returns [h_0 = inputs, h_1, …, h_{L-1}, z], each (rows, width)."""
    activations = [inputs]
    last = len(params) // 2 - 1
    for layer in range(last + 1):
        z = torch.addmm(params[2 * layer + 1], activations[-1], params[2 * layer].t())  # (rows, width)
        activations.append(z if layer == last else z.relu_())
    return activations


def mlp_deltas(params: Sequence[Tensor], activations: Sequence[Tensor], delta: Tensor) -> Iterator[Tensor]:
    """Yields δ_L = `delta`, δ_{L-1}, …, δ_1, each (rows, width): δ_{l-1} = [h_{l-1} > 0] ∘ (δ_l W_l)."""
    yield delta
    for layer in range(len(params) // 2 - 1, 0, -1):
        delta = torch.ops.aten.threshold_backward(delta @ params[2 * layer], activations[layer], 0)
        yield delta


def flatten(params: Sequence[Tensor], problems: int) -> Tensor:
    """Returns the parameters as the kernels take them, (R, P): a row a network, W1, b1, W2, b2, … behind each other."""
    return torch.cat([param.reshape(problems, -1) for param in params], dim=1)


def unflatten(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Cuts (R, P) into tensors of the shapes of `params`."""
    parts = flat.split([param.numel() // len(flat) for param in params], dim=1)
    return [part.reshape(param.shape) for part, param in zip(parts, params, strict=True)]


def cut(flat: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Cuts (R, P) into W1 (R, out, in), b1 (R, out), …"""
    shapes = [shape for fan_in, fan_out in pairwise(widths) for shape in ((fan_out, fan_in), (fan_out,))]
    return unflatten(flat, [flat.new_empty(len(flat), *shape) for shape in shapes])


def side_by_side(problems: Iterable[Sequence[Tensor]]) -> Tensor:
    """The parameters of R problems, each as `cut` gives those of one, (R, P)."""
    return torch.cat([flatten(params, 1) for params in problems])


def layer_widths(params: Sequence[Tensor]) -> list[int]:
    """Returns [inputs, hidden widths, outputs]."""
    return [params[0].shape[-1], *(bias.shape[-1] for bias in params[1::2])]


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raises TypeError unless all are tensors of one floating dtype, float32 or float64."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name} must be float32 or float64, got {tensor.dtype}")
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        raise TypeError(f"{op}: all tensors must have one dtype, got {dtypes}")


def check_problems(op: str, params: Sequence[Tensor], **tensors: Tensor) -> int:
    """Returns the number of problems R, that of the first of `tensors`, a batch of matrices (R, rows, columns).

    Raises:
        TypeError, ValueError: one of the others, or of the parameters, is no tensor with that leading dimension.
    """
    (name, first), *others = tensors.items()
    problems = first.shape[0]
    for other, tensor in [*others, *((f"params[{i}]", param) for i, param in enumerate(params))]:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {other} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.ndim == 0 or tensor.shape[0] != problems or problems == 0:
            raise ValueError(
                f"{op}: with {name} {tuple(first.shape)} of {problems} problems, {other} must have that leading "
                f"dimension, at least 1; got shape {tuple(tensor.shape)}"
            )
    return problems


def check_mlp(op: str, params: Sequence[Tensor], inputs: Tensor, outputs: Tensor) -> None:
    """Raises TypeError or ValueError unless `params` is an MLP from the columns of `inputs` to those of `outputs`."""
    if len(params) == 0 or len(params) % 2 != 0:
        raise ValueError(f"{op}: params must be [W1, b1, W2, b2, …] with one bias a weight, got {len(params)} tensors")
    check_floating(op, inputs=inputs, **{f"params[{i}]": param for i, param in enumerate(params)})
    width = inputs.shape[1]
    for layer, (weight, bias) in enumerate(zip(params[::2], params[1::2], strict=True), start=1):
        if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] < 1:
            raise ValueError(
                f"{op}: W{layer} must have shape (out, {width}) as torch.nn.Linear has it, got {tuple(weight.shape)}"
            )
        width = weight.shape[0]
        if bias.shape != (width,):
            raise ValueError(f"{op}: b{layer} must have shape ({width},), got {tuple(bias.shape)}")
    if width != outputs.shape[1]:
        raise ValueError(f"{op}: the last layer must have {outputs.shape[1]} outputs, one an action, got {width}")


def check_rows(op: str, **matrices: Tensor) -> None:
    """Raises ValueError unless all are matrices (rows, columns) with one number of rows, none of them empty."""
    shapes = {name: tuple(matrix.shape) for name, matrix in matrices.items()}
    if any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
        raise ValueError(f"{op}: expected non-empty matrices (rows, columns), got {shapes}")
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"{op}: expected the same number of rows, got {shapes}")


def check_tape(steps: int, window: int | None, tape: str) -> None:
    """Raises ValueError where they are not as `unrolled_bc` takes them."""
    if not 1 <= steps < 1 << 63:
        raise ValueError(f"unrolled_bc: steps must be at least 1 and below 2^63, got {steps}")
    if window is not None and not 1 <= window <= steps:
        raise ValueError(f"unrolled_bc: window must be between 1 and steps = {steps}, or None, got {window}")
    if tape not in ("full", "recompute"):
        raise ValueError(f"unrolled_bc: tape must be 'full' or 'recompute', got {tape!r}")


def learning_rates(lr: float | Tensor, observations: Tensor, batched: bool) -> Tensor:
    """Returns α of each problem, (R,), with the dtype and device of the observations."""
    problems = len(observations) if batched else 1
    if isinstance(lr, Tensor):
        if lr.numel() != 1 and not (batched and lr.shape == (problems,)):
            expected = "a float, a scalar tensor or a tensor (R,)" if batched else "a float or a scalar tensor"
            raise ValueError(f"unrolled_bc: lr must be {expected}, got shape {tuple(lr.shape)}")
        return lr.to(observations).reshape(-1).expand(problems)
    if not abs(lr) <= torch.finfo(observations.dtype).max:
        raise ValueError(f"unrolled_bc: lr must be finite in {observations.dtype}, got {lr}")
    return observations.new_full((problems,), lr)
