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
    momentum: float,
    recompute: bool,
    keep_tape: bool,
) -> UnrolledBCTape | None: ...
def behavior_matching(
    params: Sequence[Tensor], states: Tensor, targets: Tensor, weights: Tensor, gradients: Sequence[Tensor] | None
) -> float: ...
def weighted_bc_loss(pred: Tensor, target: Tensor, weights: Tensor, gradient: Tensor | None) -> float: ...

# Where CUDA was compiled in. Tensors lie on the current device; `stream` is the handle of PyTorch's current stream.
def behavior_matching_cuda_workspace(rows: int, widths: Sequence[int], want_gradients: bool) -> int: ...
def behavior_matching_cuda(
    params: Sequence[Tensor],
    states: Tensor,
    targets: Tensor,
    weights: Tensor,
    loss: Tensor,
    gradients: Tensor | None,
    workspace: Tensor,
    ieee: bool,
    stream: int,
) -> None: ...
def scale_cuda(values: Tensor, factor: Tensor, stream: int) -> None: ...

class UnrolledBCCudaProblem:
    def __init__(
        self,
        *,
        problems: int,
        rows: int,
        widths: Sequence[int],
        steps: int,
        window: int,
        momentum: float,
        keep_tape: bool,
        recompute: bool,
        ieee: bool,
    ) -> None: ...
    @property
    def workspace(self) -> int: ...

def unrolled_bc_cuda(
    problem: UnrolledBCCudaProblem,
    observations: Tensor,
    actions: Tensor,
    params: Tensor,
    lr: Tensor,
    trained: Tensor,
    workspace: Tensor,
    stream: int,
) -> None: ...
def unrolled_bc_cuda_backward(
    problem: UnrolledBCCudaProblem,
    again: bool,
    grad_trained: Tensor,
    lr: Tensor,
    grad_observations: Tensor | None,
    grad_actions: Tensor | None,
    grad_params: Tensor | None,
    grad_lr: Tensor,
    workspace: Tensor,
    stream: int,
) -> None: ...
def weighted_bc_loss_cuda_workspace(rows: int, columns: int) -> int: ...
def weighted_bc_loss_cuda(
    pred: Tensor,
    target: Tensor,
    weights: Tensor,
    loss: Tensor,
    gradient: Tensor | None,
    workspace: Tensor,
    stream: int,
) -> None: ...

class KnnIndex:
    def __init__(self, points: Tensor, coordinates: Tensor, scale: float) -> None: ...
    def self_join(self, k: int) -> KnnJoin: ...
    def join(self, points: Tensor, coordinates: Tensor, k: int, self_offset: int) -> KnnJoin: ...

class KnnJoin:
    @property
    def groups(self) -> int: ...
    @property
    def scans(self) -> bool: ...
    def rows(self, first: int, last: int) -> int: ...
    def search(self, first: int, last: int, query: Tensor, squared: Tensor, index: Tensor) -> None: ...

# The same on CUDA, where it was compiled in, on what sdw_fast/ops/_knn_cuda.py packs.
knn_cuda_max_dims: int
knn_cuda_max_k: int
knn_cuda_leaf: int
knn_cuda_fan: int
knn_cuda_far: float

def knn_cuda_width(dims: int) -> int: ...
def knn_cuda_workspace(rows: int, k: int) -> int: ...
def knn_cuda(
    points: Tensor,
    coordinates: Tensor,
    row: Tensor,
    first_row: Tensor,
    leaf_boxes: Tensor,
    cell_boxes: Tensor,
    query_points: Tensor,
    query_coordinates: Tensor,
    query_row: Tensor,
    *,
    first: int,
    k: int,
    self_offset: int,
    prune: bool,
    workspace: Tensor,
    counts: Tensor,
    squared: Tensor,
    index: Tensor,
    stream: int,
) -> None: ...
