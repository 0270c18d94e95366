"""What the CUDA kernel of knn works on: references and queries in the order of a kd-tree, packed into leaves and boxes.

All of it is made by PyTorch on the device; nothing here waits for the device or brings data to the host.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from sdw_fast.ops._backend import _C, cuda_stream, cuda_workspace

_SAMPLES = 128  # points of a node of the tree that its widest axis is found from
LIST_BYTES = 1 << 29  # of the lists of one portion of a join
_NO_ROW = 1 << 62  # in first_row of what has no points


def tree_order(coordinates: torch.Tensor, block: int) -> torch.Tensor:
    """The rows of (N, D) float32 coordinates in the order of a balanced kd-tree, down to blocks of `block` rows.

    A node of 2^l blocks (the last of its level may have fewer) is split in the middle of its places, along the axis in
    which a sample of its points varies most. A level is one stable sort by (node, value): equal rows stay in the order
    of their index, and the same coordinates give the same order.
    """
    rows, device = coordinates.shape[0], coordinates.device
    order = torch.arange(rows, device=device)
    levels = (-(-rows // block) - 1).bit_length()
    for size in (block << level for level in range(levels, 0, -1)):
        start = torch.arange(0, rows, size, device=device)
        length = (rows - start).clamp(max=size)
        samples = min(size, _SAMPLES)
        picked = start[:, None] + torch.arange(samples, device=device) * length[:, None] // samples
        axis = coordinates[order[picked]].var(1).argmax(1)  # [nodes]
        node = torch.arange(rows, device=device) // size
        bits = coordinates[order, axis[node]].view(torch.int32)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
        order = order[((node << 32) + ordered).sort(stable=True).indices]
    return order


class CudaKnnIndex:
    """References on a device, ready to be searched; the interface of `_C.KnnTree`.

    Args:
        points: (N, D) float32 or float64, contiguous: distances are those of these, in float64.
        coordinates: (N, D) float32 to prune by, see csrc/include/sdw/knn.h.
    """

    def __init__(self, points: torch.Tensor, coordinates: torch.Tensor) -> None:
        leaf, fan, far = _C.knn_cuda_leaf, _C.knn_cuda_fan, _C.knn_cuda_far
        rows, dims = coordinates.shape
        self.points = points
        self.order = tree_order(coordinates, fan)
        self.sorted = _widened(coordinates, self.order)  # [N, W]
        width = self.sorted.shape[1]
        missing = -rows % leaf
        low = self.sorted.new_zeros((rows + missing, width))
        low[:rows] = self.sorted
        low[rows:, :dims] = far
        leaves = low.shape[0] // leaf
        self.coordinates = low.view(leaves, leaf, width // 4, 4).transpose(1, 2).contiguous()
        high = low.view(leaves, leaf, width).clone() if missing else low.view(leaves, leaf, width)
        if missing:
            high[-1, -missing:, :dims] = -far
        leaf_low, leaf_high = low.view(leaves, leaf, width).amin(1), high.amax(1)
        self.halves = _halves(self.sorted, leaves)
        self.leaf_boxes = _packed(leaf_low, leaf_high)
        self.cell_boxes = _packed(_reduced(leaf_low, far).amin(1), _reduced(leaf_high, -far).amax(1))
        self.row = pad(self.order, (0, missing), value=-1)
        first_row = pad(self.order, (0, missing), value=_NO_ROW).view(leaves, leaf).amin(1)
        self.first_row = pad(first_row, (0, -leaves % fan), value=_NO_ROW)

    def self_join(self, k: int) -> CudaKnnJoin:
        return CudaKnnJoin(self, self.points, self.sorted, self.order, k, 0)

    def join(self, points: torch.Tensor, coordinates: torch.Tensor, k: int, self_offset: int) -> CudaKnnJoin:
        order = tree_order(coordinates, _C.knn_cuda_fan)
        return CudaKnnJoin(self, points, _widened(coordinates, order), order, k, self_offset)


class CudaKnnJoin:
    """Queries joined with an index, in groups of 32; the interface of `_C.KnnJoin`.

    `counts` (groups, 3) says of every group that was searched how many leaves were tested against its queries, how
    many pairs of a query and a leaf were scanned, and how many queries were searched again in float64. `prune` may be
    set to False to look at everything, for comparison.
    """

    def __init__(
        self,
        index: CudaKnnIndex,
        points: torch.Tensor,
        coordinates: torch.Tensor,
        order: torch.Tensor,
        k: int,
        self_offset: int,
    ) -> None:
        self.index, self.points, self.coordinates, self.order = index, points, coordinates, order
        self.k, self.self_offset, self.prune = k, self_offset, True
        self.groups = -(-order.shape[0] // _C.knn_cuda_fan)
        self.portion = max(1, LIST_BYTES // _C.knn_cuda_workspace(_C.knn_cuda_fan, k))  # groups
        self.counts = order.new_zeros((self.groups, 3), dtype=torch.int32)

    def rows(self, first: int, last: int) -> int:
        return min(last * _C.knn_cuda_fan, self.order.shape[0]) - first * _C.knn_cuda_fan

    def search(self, first: int, last: int, row: torch.Tensor, squared: torch.Tensor, found: torch.Tensor) -> None:
        """Enqueues the search for groups [first, last): rows of the queries, squared distances, indices."""
        start, rows = first * _C.knn_cuda_fan, self.rows(first, last)
        row.copy_(self.order[start : start + rows])
        advice = "search fewer queries at a time"
        workspace = cuda_workspace("knn", _C.knn_cuda_workspace(rows, self.k), row.device, advice)
        with cuda_stream(row) as stream:
            _C.knn_cuda(
                self.index.points,
                self.index.coordinates,
                self.index.halves,
                self.index.row,
                self.index.first_row,
                self.index.leaf_boxes,
                self.index.cell_boxes,
                self.points,
                self.coordinates,
                self.order,
                first=start,
                k=self.k,
                self_offset=self.self_offset,
                prune=self.prune,
                workspace=workspace,
                counts=self.counts[first:last],
                squared=squared,
                index=found,
                stream=stream,
            )


def _widened(coordinates: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows in this order, filled up with zeros to the width that the kernels have."""
    dims = coordinates.shape[1]
    return pad(coordinates[order], (0, _C.knn_cuda_width(dims) - dims))


def _halves(coordinates: torch.Tensor, leaves: int) -> torch.Tensor:
    """What the kernel's filter reads of (N, W) sorted coordinates: pairs of float16 as int32, see sdw/knn.h.

    Of a point as many leading coordinates as there is room for, and the squared norm of these as they are rounded.
    Places without a point have a norm that is far from everything.
    """
    leaf, width = _C.knn_cuda_leaf, _C.knn_cuda_filter_width(coordinates.shape[1])
    leading = coordinates[:, : width - 1] * _C.knn_cuda_half
    halves = leading.new_zeros((leaves * leaf, width), dtype=torch.float16)
    halves[: len(leading), : leading.shape[1]] = leading
    halves[: len(leading), -1] = halves[: len(leading)].float().square_().sum(1)
    halves[len(leading) :, -1] = 60000
    tiles = halves.view(torch.int32).view(leaves, leaf // 16, 2, 8, width // 16, 4, 2)
    return tiles.permute(0, 1, 4, 3, 5, 2, 6).reshape(leaves, leaf // 16, width // 16, 32, 4)


def _reduced(ends: torch.Tensor, fill: float) -> torch.Tensor:
    """(n, W) ends of boxes as (packs, 32, W), the last pack filled up."""
    fan = _C.knn_cuda_fan
    return pad(ends, (0, 0, 0, -ends.shape[0] % fan), value=fill).view(-1, fan, ends.shape[1])


def _packed(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """(n, W) low and high ends as packs of 32 boxes, [packs, 2, W/4, 32, 4]; empty boxes are far from everything."""
    far, fan = _C.knn_cuda_far, _C.knn_cuda_fan
    ends = torch.stack([_reduced(low, far), _reduced(high, -far)], 1)  # [packs, 2, 32, W]
    return ends.view(ends.shape[0], 2, fan, -1, 4).transpose(2, 3).contiguous()
