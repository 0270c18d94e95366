"""What knn leaves out by proof: how much is looked at on either device, and that it changes no answer."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from oracle import brute_force, surface

from sdw_fast import _C
from sdw_fast.ops import _knn_cuda as packing
from sdw_fast.ops import knn
from sdw_fast.ops._knn_frame import Frame
from sdw_fast.ops._knn_search import NO_SELF, Rows

HAS_GPU = torch.cuda.is_available() and hasattr(_C, "knn_cuda")
DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"))]

# (queries, references or None, k) -> squared distances, indices, counts
Search = Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]


@pytest.fixture(params=DEVICES)
def search(request: pytest.FixtureRequest) -> Search:
    """The CUDA kernel on packed references, with every row found."""
    if request.param == "emulated":
        request.getfixturevalue("cuda_on_cpu")
    device = torch.device("cpu" if request.param == "emulated" else "cuda")

    def run(x: np.ndarray, y: np.ndarray | None, k: int, prune: bool = True, portion: int | None = None):
        queries = torch.from_numpy(x).to(device)
        points = queries if y is None else torch.from_numpy(y).to(device)
        frame = Frame(Rows(points), float(points.abs().max()))
        index = packing.CudaKnnIndex(points, frame.coordinates(points))
        join = index.self_join(k) if y is None else index.join(queries, frame.coordinates(queries), k, NO_SELF)
        join.prune = prune
        squared = torch.full((len(x), k), torch.nan, dtype=torch.float64)
        found = torch.full((len(x), k), -1)
        for first in range(0, join.groups, portion or join.groups):
            last = min(first + (portion or join.groups), join.groups)
            rows = join.rows(first, last)
            row, part = torch.empty(rows, dtype=torch.int64, device=device), torch.empty((rows, k), device=device)
            some_squared, some_found = part.double(), part.long()
            join.search(first, last, row, some_squared, some_found)
            squared[row.cpu()], found[row.cpu()] = some_squared.cpu(), some_found.cpu()
        return squared.numpy(), found.numpy(), join.counts.cpu().numpy()

    return run


def check(search: Search, x: np.ndarray, y: np.ndarray | None, k: int) -> np.ndarray:
    """Indices identical to brute force; where they are not, a tie within the last digits of a float64 sum."""
    squared, found, counts = search(x, y, k)
    expected, expected_index = brute_force(x, y, k)
    np.testing.assert_allclose(squared, expected, rtol=1e-13, atol=0)
    different = found != expected_index
    assert different.mean() < 0.01
    points = (x if y is None else y).astype(np.float64)
    truth = ((x[:, None].astype(np.float64) - points[found]) ** 2).sum(-1)
    np.testing.assert_allclose(truth[different], expected[different], rtol=1e-13, atol=0)
    assert all(len(set(row)) == k for row in found.tolist())
    return counts


def test_by_hand(search: Search) -> None:
    # Four corners of a 3 by 4 rectangle: from (0, 0) the others lie at 3, 4 and 5.
    corners = np.array([[0, 0], [3, 0], [0, 4], [3, 4]], np.float32)
    squared, found, counts = search(corners, None, 3)
    np.testing.assert_array_equal(squared, [[9, 16, 25]] * 4)
    np.testing.assert_array_equal(found, [[1, 2, 3], [0, 3, 2], [3, 0, 1], [2, 1, 0]])
    np.testing.assert_array_equal(counts, [[1, 4, 0]])  # one leaf, wanted by four queries, none searched again
    # From the middle of the lower side: (0, 0) and (3, 0) tie at 1.5, the lower index first.
    squared, found, _ = search(np.array([[1.5, 0]], np.float32), corners, 2)
    np.testing.assert_array_equal(squared, [[2.25, 2.25]])
    np.testing.assert_array_equal(found, [[0, 1]])


def test_ties_go_to_the_lower_index(search: Search) -> None:
    grid = np.random.default_rng(2).integers(0, 3, (300, 2)).astype(np.float32)
    for x, y, k in [(grid, None, 50), (grid[:40], grid, 90), (np.full((200, 3), 5.3, np.float32), None, 20)]:
        squared, found, counts = search(x, y, k)
        expected, expected_index = brute_force(x, y, k)
        np.testing.assert_array_equal(squared, expected)
        np.testing.assert_array_equal(found, expected_index)
        assert counts[:, 2].sum() > 0  # lists overflowed


def test_data_far_from_the_origin_keep_their_digits(search: Search) -> None:
    # With close pairs: 2^-13 apart at 1000, the last digits float32 has there.
    x = surface(400, 17, 3) + 1000
    x[200:] = x[:200]
    x[200:, 3] += 2.0**-13
    counts = check(search, x, None, 5)
    assert counts[:, 2].sum() == 0


def test_neighbors_closer_than_float32_resolves(search: Search) -> None:
    rng = np.random.default_rng(4)
    centers = rng.standard_normal((5, 6))
    x = centers[rng.integers(0, 5, 300)] + 1e-11 * rng.standard_normal((300, 6))  # float64
    assert check(search, x, None, 7)[:, 2].sum() == 300
    outlier = surface(200, 4, 5)
    outlier[17] = 3e30
    check(search, outlier, None, 4)
    for scale in (1e-30, 1e34):
        check(search, (surface(100, 5, 6) * scale).astype(np.float64), None, 4)


@pytest.mark.usefixtures("cuda_on_cpu")
def test_equal_rows_whose_coordinates_differ_by_rounding() -> None:
    # Rows of high index lie first in the tree: k neighbors at distance 0 are found long before the right ones.
    x = torch.full((200, 3), 0.9)
    coordinates = x.clone()
    coordinates[:100, 0] += 2.0**-24
    index = packing.CudaKnnIndex(x, coordinates)
    assert index.order[:32].min() == 100
    join = index.self_join(5)
    row, squared, found = torch.empty(200).long(), torch.empty(200, 5).double(), torch.empty(200, 5).long()
    join.search(0, join.groups, row, squared, found)
    assert not squared.any()
    np.testing.assert_array_equal(found[row.argsort()], brute_force(x.numpy(), None, 5)[1])


def test_pruning_changes_the_work_and_not_the_answer(search: Search) -> None:
    rng = np.random.default_rng(7)
    x = (10 * rng.standard_normal((30, 6)))[rng.integers(0, 30, 1500)] + rng.standard_normal((1500, 6))
    x = x.astype(np.float32)
    squared, found, counts = search(x, None, 5)
    all_squared, all_found, all_counts = search(x, None, 5, prune=False)
    np.testing.assert_array_equal(squared, all_squared)
    np.testing.assert_array_equal(found, all_found)
    leaves = -(-len(x) // 64)
    np.testing.assert_array_equal(all_counts.sum(0)[:2], [leaves * len(counts), leaves * len(x)])
    assert counts[:, 0].sum() < 0.3 * leaves * len(counts)  # boxes tested
    assert counts[:, 1].sum() < 0.1 * leaves * len(x)  # leaves scanned


def test_portions_are_independent(search: Search) -> None:
    x = surface(330, 5, 8)
    whole, parts = search(x, None, 4), search(x, None, 4, portion=3)
    for one, other in zip(whole[:2], parts[:2], strict=True):  # what is looked at depends on a block's other groups
        np.testing.assert_array_equal(one, other)


def test_any_order_of_threads_gives_the_same_bits(search: Search, request: pytest.FixtureRequest) -> None:
    x = surface(500, 11, 9)
    results = []
    for seed in (1, 2, 3):
        if request.node.callspec.params["search"] == "emulated":
            request.getfixturevalue("cuda_on_cpu").set_seed(seed)
        results.append(search(x, None, 6))
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(one, other)


def test_native_scans_where_nothing_can_be_pruned() -> None:
    def join(x: np.ndarray) -> _C.KnnJoin:
        points = torch.from_numpy(x)
        frame = Frame(Rows(points), float(points.abs().max()))
        return _C.KnnIndex(points, frame.coordinates(points), frame.scale).self_join(10)

    x = np.random.default_rng(6).random((2000, 64), dtype=np.float32)
    assert join(x).scans
    assert not join(surface(3000, 17, 7)).scans
    for queries, references, k in [(x, None, 10), (x[:100], x, 64), (x + 1000, None, 10)]:
        distances, indices = knn(queries, references, k=k, backend="native")
        squared, expected = brute_force(queries, references, k)
        np.testing.assert_allclose(distances, np.sqrt(squared), rtol=2e-7, atol=1e-30)
        np.testing.assert_array_equal(indices, expected)


def test_widths_and_workspace(emulated: ModuleType) -> None:
    widths = [emulated.knn_cuda_width(dims) for dims in range(1, 67)]
    assert widths[16] == 20
    assert widths[64:] == [0, 0]
    assert all(width >= dims and width % 4 == 0 for dims, width in enumerate(widths[:64], 1))
    assert sorted(set(widths[:64])) == [4, 8, 12, 16, 20, 24, 32, 48, 64]
    # k = 10: lists of 16 keys of 8 bytes, and a threshold a query.
    assert emulated.knn_cuda_workspace(1000, 10) == 1000 * (16 * 8 + 4)


def test_tree_order() -> None:
    # On a line it is the sorted order of blocks, and within one that of the index.
    x = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float()[:, None]
    order = packing.tree_order(x, 32)
    for block, expected in zip(x[order, 0].split(32), torch.arange(1000.0).split(32), strict=True):
        np.testing.assert_array_equal(block.sort().values, expected)
    # Rows of equal value stay in the order of their index; negative zero and zero are neighbors.
    np.testing.assert_array_equal(packing.tree_order(torch.zeros(500, 2), 32), torch.arange(500))
    mixed = torch.tensor([-1.0, 3.0, -0.0, 0.0, -2.0, 2.0, 1.0, -3.0]).repeat_interleave(16)[:, None]
    by_value = mixed[packing.tree_order(mixed, 16), 0].view(8, 16)
    np.testing.assert_array_equal(by_value, mixed.sort(0).values.view(8, 16))
    # Every block is a subtree: halves of a node do not overlap along the axis that splits it.
    y = torch.from_numpy(surface(5 * 32 + 3, 3, 13))
    order = packing.tree_order(y, 32)
    assert sorted(order.tolist()) == list(range(len(y)))
    left, right = y[order[:128]], y[order[128:]]
    assert any(left[:, d].max() <= right[:, d].min() for d in range(3))


@pytest.mark.usefixtures("cuda_on_cpu")
def test_boxes_hold_their_points_and_nothing_else() -> None:
    x = torch.from_numpy(surface(2200, 5, 14))
    index = packing.CudaKnnIndex(x, x)
    assert index.coordinates.shape == (35, 2, 64, 4)
    assert index.leaf_boxes.shape == (2, 2, 2, 32, 4)
    assert index.cell_boxes.shape == (1, 2, 2, 32, 4)
    leaf_boxes = index.leaf_boxes.permute(1, 0, 3, 2, 4).reshape(2, 64, 8)[:, :, :5]
    cell_boxes = index.cell_boxes.permute(1, 0, 3, 2, 4).reshape(2, 32, 8)[:, :, :5]
    for boxes, size, count in [(leaf_boxes, 64, 35), (cell_boxes, 2048, 2)]:
        for number in range(count):
            inside = x[index.order[number * size : (number + 1) * size]]
            np.testing.assert_array_equal(boxes[0, number], inside.amin(0))
            np.testing.assert_array_equal(boxes[1, number], inside.amax(0))
        assert (boxes[0, count:] == 1e30).all()
        assert (boxes[1, count:] == -1e30).all()
    np.testing.assert_array_equal(index.row[:2200], index.order)
    assert (index.row[2200:] == -1).all()
    assert index.first_row[34] == index.order[34 * 64 :].min()


@pytest.mark.usefixtures("cuda_on_cpu")
def test_the_binding_refuses_what_does_not_fit() -> None:
    x = torch.from_numpy(surface(100, 5, 15))
    join = packing.CudaKnnIndex(x, x).self_join(3)
    good = (torch.empty(100, dtype=torch.int64), torch.empty(100, 3).double(), torch.empty(100, 3).long())
    join.search(0, 4, *good)
    with pytest.raises(ValueError, match="outputs must have shape"):
        join.search(0, 4, good[0], torch.empty(100, 4).double(), good[2])
    with pytest.raises(TypeError, match="squared must be float64"):
        join.search(0, 4, good[0], torch.empty(100, 3), good[2])
    join.points = x.double()
    with pytest.raises(ValueError, match="queries and references must agree"):
        join.search(0, 4, *good)


def test_the_filter_keeps_what_half_precision_moves(search: Search) -> None:
    # One neighbor or two a leaf, on a sphere about the queries, at radii that differ by less than halves resolve there.
    for dimension in (3, 6, 15, 17, 40):
        rng = np.random.default_rng(dimension)
        y = rng.standard_normal((2000, dimension))
        radius = np.append(1 + 3e-5 * rng.permutation(40), rng.uniform(1.5, 3, 1960))
        y *= radius[:, None] / np.linalg.norm(y, axis=1, keepdims=True)
        center = rng.standard_normal(dimension)
        y += (center := center * 15 / np.linalg.norm(center))
        x = np.repeat(center[None], 32, 0)
        squared, found, counts = search(x, np.concatenate([y, -y]), 5)
        expected, expected_index = brute_force(x, y, 5)
        np.testing.assert_array_equal(found, expected_index)
        np.testing.assert_allclose(squared, expected, rtol=1e-11, atol=0)
        assert counts[:, 2].sum() == 0  # none searched again: the filter had the last word


def test_the_filter_spares_the_scan(search: Search) -> None:
    # In eleven effective dimensions boxes leave a query half of all leaves.
    rng = torch.Generator().manual_seed(0)
    points = (torch.randn(2000, 11, generator=rng) @ torch.randn(11, 17, generator=rng) / 2).sin_()
    points += 0.01 * torch.randn(2000, 17, generator=rng)
    x = ((points - points.mean(0)) / (points.std(0, correction=0) + 1e-3)).numpy()
    counts = check(search, x, None, 5)
    assert counts[:, 0].sum() > 0.9 * 32 * len(counts)
    assert counts[:, 1].sum() < 0.3 * 32 * len(x)
