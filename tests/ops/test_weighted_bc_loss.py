"""weighted_bc_loss: a case worked by hand, then every implementation against plain PyTorch in float64."""

import pytest
import torch

from sdw_fast import _C
from sdw_fast.ops import weighted_bc_loss

# CPU: 65,536 elements a chunk. CUDA: 8,192; less than a vector, one chunk exactly, an odd end in the second and third.
SHAPES = [(1, 1), (3, 1), (1, 7), (7, 3), (1000, 6), (33, 17), (5, 100), (2048, 4), (2731, 7), (5, 4000), (1, 8193)]
LARGE = [(300_000, 1), (100_001, 7)]


def random_case(rows, columns, device="cpu", dtype=torch.float32, heavy=1000):
    generator = torch.Generator().manual_seed(rows)
    pred, target = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    weights = torch.rand(rows, generator=generator)
    weights[: rows // 3] *= heavy
    return [x.to(device, dtype) for x in (pred, target, weights)]


def loss_and_gradient(pred, target, weights, backend):
    pred = pred.clone().requires_grad_()
    loss = weighted_bc_loss(pred, target, weights, backend=backend)
    assert loss.shape == ()
    return loss.detach(), torch.autograd.grad(3 * loss, pred)[0]


def check(pred, target, weights, backend, tolerance):
    loss, gradient = loss_and_gradient(pred, target, weights, backend)
    pred, target, weights = (x.double() for x in (pred, target, weights))
    error = pred - target
    expected = (weights * error.square().sum(1)).sum() / pred.numel()
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    exact = 3 * 2 * weights[:, None] * error / pred.numel()
    assert (gradient.double() - exact).norm() <= tolerance * exact.norm()


def test_by_hand(kernel):
    # Errors (1, 2) with weight 1 and (0, 3) with weight 2 over 4 numbers: (5 + 18)/4; gradient 2 w e / 4.
    pred = torch.tensor([[1.0, 2.0], [0.0, 3.0]], device=kernel.device, requires_grad=True)
    weights = torch.tensor([1.0, 2.0], device=kernel.device)
    loss = weighted_bc_loss(pred, torch.zeros_like(pred), weights, backend=kernel.backend)
    loss.backward()
    assert loss.item() == 5.75
    assert pred.grad.tolist() == [[0.5, 1.0], [0.0, 3.0]]


@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, *LARGE])
def test_twin_agrees_with_float64(rows, columns):
    check(*random_case(rows, columns, dtype=torch.float64), "torch", 1e-12)


@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, *LARGE])
def test_cpu_agrees_with_float64(rows, columns):
    # A chunk's sum is in float, and fewer lanes make longer sums.
    check(*random_case(rows, columns, heavy=1), "cpu", 2e-6 if _C.active_isa() == "portable" else 1e-6)


@pytest.mark.parametrize(
    ("kernel", "rows", "columns"),
    [
        *(("emulated", *shape) for shape in SHAPES),
        *(("cuda", *shape) for shape in [*SHAPES, *LARGE, (1_000_003, 6)]),
    ],
    indirect=["kernel"],
)
def test_cuda_agrees_with_float64(kernel, rows, columns):
    check(*random_case(rows, columns, kernel.device), kernel.backend, 1e-6)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_arrays_need_no_alignment(kernel, offset):
    pred, target, weights = random_case(400, 6, kernel.device)
    storage = torch.zeros(2400 + offset, device=kernel.device)
    storage[offset:] = target.flatten()
    check(pred, storage[offset:].view(400, 6), weights, kernel.backend, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_weight_zero_counts_for_nothing(kernel, dtype):
    if dtype == torch.float64 and kernel.backend != "torch":
        pytest.skip("compiled for float32")
    pred = torch.ones(3, 2, dtype=dtype, device=kernel.device, requires_grad=True)
    target = torch.tensor([[0.0, 0], [float("nan"), 1], [float("inf"), 0]], dtype=dtype, device=kernel.device)
    weights = torch.tensor([1.0, 0, 0], dtype=dtype, device=kernel.device)
    loss = weighted_bc_loss(pred, target, weights, backend=kernel.backend)
    loss.backward()
    assert loss.item() == pytest.approx(2 / 6)
    assert pred.grad[0].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert not pred.grad[1:].any()


def test_loss_alone_and_a_graph_kept(kernel):
    pred, target, weights = random_case(100, 3, kernel.device)
    loss = weighted_bc_loss(pred, target, weights, backend=kernel.backend)
    tracked = pred.clone().requires_grad_()
    again = weighted_bc_loss(tracked, target, weights, backend=kernel.backend)
    assert torch.equal(loss, again)
    first = torch.autograd.grad(2 * again, tracked, retain_graph=True)[0]
    second = torch.autograd.grad(2 * again, tracked)[0]
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_a_second_derivative_is_right(kernel):
    pred, target, weights = random_case(5, 3, kernel.device)
    weights[0] = 0
    target[0] = torch.nan
    pred.requires_grad_()
    loss = weighted_bc_loss(pred, target, weights, backend=kernel.backend)
    plain = (weights[1:] * (pred - target)[1:].square().sum(1)).sum() / pred.numel()
    seconds = []
    for first in (loss, plain):
        (gradient,) = torch.autograd.grad(first.square(), pred, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), pred, create_graph=True)
        seconds += [second, torch.autograd.grad(second.sum(), pred)[0]]
    torch.testing.assert_close(seconds[:2], seconds[2:])


@pytest.mark.parametrize(
    ("kernel", "rows"), [("emulated", 2731), ("cuda", 2731), ("cuda", 300_001)], indirect=["kernel"]
)
def test_order_of_threads_and_blocks_does_not_matter(kernel, rows, request):
    case = random_case(rows, 7, kernel.device)
    results = []
    for seed in range(1, 5):
        if kernel.device == "cpu":
            request.getfixturevalue("cuda_on_cpu").set_seed(seed)
        results.append(loss_and_gradient(*case, "cuda"))
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("count", [1, 255, 1000])
def test_emulated_scaling_in_place(emulated, count):
    values = torch.randn(2, count, generator=torch.Generator().manual_seed(count))
    factors = torch.tensor([1.0, -2.5])
    scaled = values.clone()
    emulated.scale_cuda(scaled, factors, 0)
    assert torch.equal(scaled, values * factors[:, None])


def test_emulated_small_workspace_is_refused(cuda_on_cpu):
    pred, target, weights = random_case(100, 3)
    with pytest.raises(ValueError, match="workspace is too small"):
        cuda_on_cpu.weighted_bc_loss_cuda(
            pred, target, weights, torch.empty(1), None, torch.empty(7, dtype=torch.uint8), 0
        )


def test_shapes_and_gradients_are_checked():
    pred = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="one shape"):
        weighted_bc_loss(pred, torch.zeros(3, 1), torch.ones(3))
    with pytest.raises(ValueError, match=r"weights must have shape \(3,\)"):
        weighted_bc_loss(pred, pred, torch.ones(2))
    with pytest.raises(ValueError, match="not differentiable in target, weights"):
        weighted_bc_loss(pred, torch.zeros(3, 2, requires_grad=True), torch.ones(3, requires_grad=True))
    with pytest.raises(TypeError, match="one dtype"):
        weighted_bc_loss(pred, pred.double(), torch.ones(3))
    with pytest.raises(ValueError, match=r"one device, got \['cpu', 'meta'\]"):
        weighted_bc_loss(pred, pred.to("meta"), torch.ones(3))
