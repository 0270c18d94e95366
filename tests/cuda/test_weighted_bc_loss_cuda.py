"""The CUDA kernel of weighted_bc_loss against the float64 twin: emulated, and on a GPU where there is one."""

import pytest
import torch

from sdw_fast.ops import weighted_bc_loss


def random_case(rows, columns, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    pred, target = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    weights = torch.rand(rows, generator=generator)
    weights[: rows // 3] *= 1000
    return [x.to(device) for x in (pred, target, weights)]


def loss_and_gradient(pred, target, weights, **options):
    pred = pred.clone().requires_grad_()
    loss = weighted_bc_loss(pred, target, weights, **options)
    return loss.detach(), torch.autograd.grad(3 * loss, pred)[0]


def check(pred, target, weights):
    loss, gradient = loss_and_gradient(pred, target, weights, backend="cuda")
    expected = loss_and_gradient(*(x.double() for x in (pred, target, weights)), backend="torch")
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=0)
    assert (gradient.double() - expected[1]).norm() < 1e-6 * expected[1].norm()


# 8,192 elements a chunk: one element, less than a vector, one chunk exactly, an odd end in the second and third.
SHAPES = [(1, 1), (3, 1), (1, 7), (2048, 4), (1366, 6), (2731, 7), (5, 4000), (1, 8193)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_agrees_with_float64(cuda_on_cpu, rows, columns):
    cuda_on_cpu.set_seed(rows)
    check(*random_case(rows, columns, seed=rows))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_arrays_need_no_alignment(cuda_on_cpu, offset):
    pred, target, weights = random_case(400, 6, seed=offset)
    storage = torch.zeros(2400 + offset)
    storage[offset:] = target.flatten()
    check(pred, storage[offset:].view(400, 6), weights)


def test_a_row_of_weight_zero_counts_for_nothing(cuda_on_cpu):
    pred, target, weights = random_case(300, 5, seed=0)
    weights[::2] = 0
    target[::2] = torch.nan
    loss, gradient = loss_and_gradient(pred, target, weights, backend="cuda")
    expected = loss_and_gradient(pred, target, weights, backend="torch")
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient, expected[1])
    assert not gradient[::2].any()


def test_the_order_of_threads_and_blocks_does_not_matter(cuda_on_cpu):
    case = random_case(2731, 7, seed=2)
    results = []
    for seed in range(1, 5):
        cuda_on_cpu.set_seed(seed)
        results.append(loss_and_gradient(*case, backend="cuda"))
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


def test_loss_alone_and_a_graph_kept(cuda_on_cpu):
    pred, target, weights = random_case(100, 3, seed=1)
    loss = weighted_bc_loss(pred, target, weights, backend="cuda")
    tracked = pred.clone().requires_grad_()
    again = weighted_bc_loss(tracked, target, weights, backend="cuda")
    assert torch.equal(loss, again)
    assert loss.shape == ()
    first = torch.autograd.grad(2 * again, tracked, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(2 * again, tracked)[0])


@pytest.mark.parametrize("count", [1, 255, 1000])
def test_scaling_in_place(emulated, count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    for factor in (1.0, -2.5):
        scaled = values.clone()
        emulated.scale_cuda(scaled, torch.tensor([factor]), 0)
        assert torch.equal(scaled, values * factor)


def test_a_small_workspace_is_refused(cuda_on_cpu):
    pred, target, weights = random_case(100, 3, seed=1)
    with pytest.raises(ValueError, match="workspace is too small"):
        cuda_on_cpu.weighted_bc_loss_cuda(
            pred, target, weights, torch.empty(1), None, torch.empty(7, dtype=torch.uint8), 0
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (1_000_003, 6)])
def test_on_the_gpu(rows, columns):
    check(*random_case(rows, columns, seed=rows, device="cuda"))
