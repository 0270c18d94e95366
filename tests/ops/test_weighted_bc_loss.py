import pytest
import torch

from sdw_fast.ops import weighted_bc_loss


def test_by_hand():
    # Errors (1, 2) with weight 1 and (0, 3) with weight 2 over 4 numbers: (5 + 18)/4; gradient 2 w e / 4.
    pred = torch.tensor([[1.0, 2.0], [0.0, 3.0]], requires_grad=True)
    loss = weighted_bc_loss(pred, torch.zeros(2, 2), torch.tensor([1.0, 2.0]))
    loss.backward()
    assert loss.item() == 5.75
    assert pred.grad.tolist() == [[0.5, 1.0], [0.0, 3.0]]


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (1000, 6), (33, 17), (5, 100), (300_000, 1), (100_001, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_autograd(shape, dtype):
    generator = torch.Generator().manual_seed(shape[0])
    pred = torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
    target = torch.randn(shape, generator=generator, dtype=dtype)
    weights = 100 * torch.rand(shape[0], generator=generator, dtype=dtype)
    loss = weighted_bc_loss(pred, target, weights)
    expected = (weights * (pred - target).square().sum(1)).sum() / pred.numel()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, pred), torch.autograd.grad(2 * expected, pred))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_weight_zero_counts_for_nothing(dtype):
    pred = torch.ones(3, 2, dtype=dtype, requires_grad=True)
    target = torch.tensor([[0.0, 0], [float("nan"), 1], [float("inf"), 0]], dtype=dtype)
    loss = weighted_bc_loss(pred, target, torch.tensor([1.0, 0, 0], dtype=dtype))
    loss.backward()
    assert loss.item() == pytest.approx(2 / 6)
    assert torch.equal(pred.grad[1:], torch.zeros(2, 2, dtype=dtype))


def test_graph_kept_gives_the_same_gradient_twice():
    pred = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = weighted_bc_loss(pred, torch.zeros(40, 3), torch.ones(40))
    first = torch.autograd.grad(loss, pred, retain_graph=True)[0]
    second = torch.autograd.grad(loss, pred)[0]
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


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
