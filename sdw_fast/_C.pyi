"""Types of the compiled core. Tensors are passed by DLPack; outputs are written in place."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

has_cuda: bool
cuda_left_out: str  # without CUDA alone

def active_isa() -> str: ...
def supported_isas() -> list[str]: ...
def num_threads() -> int: ...
def set_num_threads(threads: int, shared: bool = False) -> None: ...  # shared: they are PyTorch's, see set_openmp
def set_openmp(
    parallel: int, num_threads: int, thread_num: int, in_parallel: int
) -> None: ...  # addresses in the process
def cuda_device_description() -> str: ...
def cuda_runtime_version() -> int: ...
def cuda_architectures() -> list[int]: ...
def cuda_obstacle(device: int) -> str: ...  # why it cannot run the kernels; "" where it can

# The ops: one signature on both devices, `_cuda` where CUDA was compiled in. Parameters are flat, (R, P): W1, b1, W2,
# b2, … one behind the other. Only CUDA looks at `ieee`, at `workspace`, of the bytes that the op's _workspace says, and
# at `stream`, the handle of PyTorch's current stream; its tensors lie on the current device.
class _BehaviorMatching(Protocol):
    def __call__(
        self,
        widths: Sequence[int],
        head: str,  # "tanh", "identity", "softmax"
        params: Tensor,
        states: Tensor,
        targets: Tensor,
        weights: Tensor,
        losses: Tensor,
        gradients: Tensor | None,
        ieee: bool = False,
        workspace: Tensor | None = None,
        stream: int = 0,
    ) -> None: ...

behavior_matching_cpu: _BehaviorMatching
behavior_matching_cuda: _BehaviorMatching

def behavior_matching_cuda_workspace(rows: int, widths: Sequence[int], want_gradients: bool) -> int: ...

class UnrolledBCParams: ...

def UnrolledBCOptions(
    *,
    problems: int,
    rows: int,
    widths: Sequence[int],
    steps: int,
    window: int,
    head: str,
    momentum: float,
    keep_tape: bool,
    recompute: bool,
    ieee: bool,
) -> UnrolledBCParams: ...

class UnrolledBCTape:
    def backward(
        self,
        grad_trained: Tensor,
        grad_observations: Tensor | None,
        grad_actions: Tensor | None,
        grad_params: Tensor | None,
        grad_lr: Tensor,
        stream: int = 0,
    ) -> None: ...

class _UnrolledBC(Protocol):
    def __call__(
        self,
        options: UnrolledBCParams,
        observations: Tensor,
        actions: Tensor,
        params: Tensor,
        lr: Tensor,
        trained: Tensor,
        workspace: Tensor | None = None,
        stream: int = 0,
    ) -> UnrolledBCTape | None: ...

unrolled_bc_cpu: _UnrolledBC
unrolled_bc_cuda: _UnrolledBC

def unrolled_bc_cpu_memory(options: UnrolledBCParams) -> int: ...
def unrolled_bc_cuda_workspace(options: UnrolledBCParams) -> int: ...

class _WeightedBCLoss(Protocol):
    def __call__(
        self,
        pred: Tensor,
        target: Tensor,
        weights: Tensor,
        loss: Tensor,
        gradient: Tensor | None,
        workspace: Tensor | None = None,
        stream: int = 0,
    ) -> None: ...

weighted_bc_loss_cpu: _WeightedBCLoss
weighted_bc_loss_cuda: _WeightedBCLoss

def weighted_bc_loss_cuda_workspace(rows: int, columns: int) -> int: ...
def scale_cuda(values: Tensor, factors: Tensor, stream: int) -> None: ...

class KnnTree:
    def self_join(self, k: int) -> KnnJoin: ...
    def join(
        self, points: Tensor, coordinates: Tensor, k: int, self_offset: int, reach: Tensor | None = None
    ) -> KnnJoin: ...

def KnnIndex(points: Tensor, coordinates: Tensor, scale: float) -> KnnTree: ...

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
knn_cuda_half: float

def knn_cuda_width(dims: int) -> int: ...
def knn_cuda_filter_width(dims: int) -> int: ...
def knn_cuda_workspace(rows: int, k: int) -> int: ...
def knn_cuda(
    points: Tensor,
    coordinates: Tensor,
    halves: Tensor,
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
