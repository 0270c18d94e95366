"""The last layer of a policy, the only place where one head differs from another: z to the output, and the loss of it.

|            | output a       | row's loss        | error e  | slope  | moved         | curvature      | c        |
| ---------- | -------------- | ----------------- | -------- | ------ | ------------- | -------------- | -------- |
| "tanh"     | tanh(z)        | ‖a − y‖² / A      | a − y    | 1 − a² | (1 − a²)∘Rz   | 1 − a² − 2 e∘a | 2/(N·A)  |
| "identity" | z              | ‖a − y‖² / A      | a − y    | 1      | Rz            | 1              | 2/(N·A)  |
| "softmax"  | p = softmax(z) | −Σ_j y_j log p_j  | σ p − y  | 1      | Rz − ⟨p, Rz⟩  | σ p            | 1/N      |

with σ = Σ_j y_j, as the targets of a row need not add up to 1. For the mean loss of N rows and R the derivative along
v, δ = c e∘slope, Rδ = c curvature∘moved, ∂⟨g, v⟩/∂y = −c moved and ⟨g, v⟩ = c ⟨e, moved⟩.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Identity:
    """Squared error of z itself. Outputs, targets and tangents are (rows, A)."""

    def output(self, z: Tensor) -> Tensor:
        return z

    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        """Returns the terms of the rows' losses, (rows, A); the mean loss is their sum by `count(rows, A)`."""
        return (self.output(z) - y).square()

    def count(self, rows: int, outputs: int) -> int:
        return rows * outputs

    def scale(self, rows: int, outputs: int) -> float:
        """Returns c."""
        return 2 / (rows * outputs)

    def error(self, a: Tensor, y: Tensor) -> Tensor:
        return a - y

    def delta(self, scaled_error: Tensor, a: Tensor) -> Tensor:
        """Returns δ from c e."""
        return scaled_error

    def moved(self, a: Tensor, tangent: Tensor) -> Tensor:
        return tangent

    def curvature(self, a: Tensor, y: Tensor, error: Tensor) -> Tensor:
        return torch.ones_like(a)


class Tanh(Identity):
    """Squared error of tanh(z)."""

    def output(self, z: Tensor) -> Tensor:
        return torch.tanh(z)

    def delta(self, scaled_error: Tensor, a: Tensor) -> Tensor:
        return scaled_error * (1 - a * a)

    def moved(self, a: Tensor, tangent: Tensor) -> Tensor:
        return (1 - a * a) * tangent

    def curvature(self, a: Tensor, y: Tensor, error: Tensor) -> Tensor:
        return 1 - a * a - 2 * error * a


class Softmax(Identity):
    """Cross entropy with targets that are probabilities, as torch.nn.functional.cross_entropy has it."""

    def output(self, z: Tensor) -> Tensor:
        return torch.softmax(z, 1)

    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        return -y * torch.log_softmax(z, 1)

    def count(self, rows: int, outputs: int) -> int:
        return rows

    def scale(self, rows: int, outputs: int) -> float:
        return 1 / rows

    def error(self, a: Tensor, y: Tensor) -> Tensor:
        return y.sum(1, keepdim=True) * a - y

    def moved(self, a: Tensor, tangent: Tensor) -> Tensor:
        return tangent - (a * tangent).sum(1, keepdim=True)

    def curvature(self, a: Tensor, y: Tensor, error: Tensor) -> Tensor:
        return y.sum(1, keepdim=True) * a


HEADS = {"tanh": Tanh(), "identity": Identity(), "softmax": Softmax()}


def check_head(op: str, head: str) -> None:
    """Raises ValueError unless there is such a head."""
    if head not in HEADS:
        raise ValueError(f"{op}: head must be 'tanh', 'identity' or 'softmax', got {head!r}")


def one_hot(op: str, head: str, params: Sequence[Tensor], **targets: Tensor) -> Tensor:
    """Returns `targets`, one tensor by its name, as probabilities: of "softmax" it may be class numbers.

    Class numbers are a tensor of integers with a number a row, (rows,) or, of R problems, (R, rows).

    Raises:
        ValueError: a class number is not one of the outputs of the network.
    """
    (name, values), *_ = targets.items()
    integers = isinstance(values, Tensor) and values.dtype in (torch.uint8, torch.int8, torch.int32, torch.int64)
    if head != "softmax" or not integers or not params or not isinstance(params[-1], Tensor) or params[-1].ndim == 0:
        return values
    classes = params[-1].shape[-1]
    # What a compiler or vmap hides, scatter refuses, in words of its own.
    if not torch.compiler.is_compiling() and not torch._C._functorch.is_batchedtensor(values):
        least, most = map(int, values.aminmax())
        if least < 0 or most >= classes:
            raise ValueError(
                f"{op}: {name} of integers are class numbers from 0 to {classes - 1}, as the network has {classes} "
                f"outputs; got {least if least < 0 else most}"
            )
    return params[-1].new_zeros(*values.shape, classes).scatter(-1, values.long()[..., None], 1)
