"""Types of the compiled core. Tensors are passed by DLPack; outputs are written in place."""

from collections.abc import Sequence

from torch import Tensor

has_cuda: bool

def active_isa() -> str: ...
def supported_isas() -> list[str]: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def cuda_device_description() -> str: ...
def cuda_runtime_version() -> int: ...

class UnrolledBCTape:
    def backward(
        self,
        grad_trained: Sequence[Tensor],
        grad_observations: Tensor | None,
        grad_actions: Tensor | None,
        grad_params: Sequence[Tensor] | None,
    ) -> float: ...

def unrolled_bc(
    observations: Tensor,
    actions: Tensor,
    params: Sequence[Tensor],
    trained: Sequence[Tensor],
    *,
    steps: int,
    window: int,
    lr: float,
    recompute: bool,
    keep_tape: bool,
) -> UnrolledBCTape | None: ...
def behavior_matching(
    params: Sequence[Tensor], states: Tensor, targets: Tensor, weights: Tensor, gradients: Sequence[Tensor] | None
) -> float: ...
def weighted_bc_loss(pred: Tensor, target: Tensor, weights: Tensor, gradient: Tensor | None) -> float: ...
