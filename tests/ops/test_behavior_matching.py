import pytest
import torch
from oracle import policy, random_problem, relative_error

from sdw_fast import get_num_threads, set_num_threads
from sdw_fast.ops import behavior_matching


def plain_loss(params, states, targets, weights):
    return (weights * (policy(params, states) - targets).square().sum(1)).sum() / targets.numel()


def random_case(widths, rows, seed, dtype=torch.float64):
    states, targets, params = random_problem(widths, rows, seed, dtype)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return [p.requires_grad_() for p in params], states, targets, weights


@pytest.mark.parametrize(
    ("widths", "rows"), [((1, 1), 1), ((3, 2), 5), ((17, 13, 6), 300), ((11, 31, 7, 3), 1), ((17, 64, 64, 64, 6), 129)]
)
def test_float64_agrees_with_autograd(widths, rows):
    params, states, targets, weights = random_case(widths, rows, seed=rows)
    loss = behavior_matching(params, states, targets, weights)
    expected = plain_loss(params, states, targets, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(3 * loss, params)
    assert relative_error(gradients, torch.autograd.grad(3 * expected, params)) < 1e-12


@pytest.mark.parametrize(
    ("widths", "rows"),
    [
        ((1, 1), 1),
        ((3, 2), 7),
        ((17, 33, 6), 255),
        ((17, 64, 64, 64, 6), 257),
        ((11, 100, 3), 1000),
        ((376, 31, 40), 513),
        ((9, 130, 201, 4), 300),  # zeros of the ReLU left out
    ],
)
def test_compiled_agrees_with_float64(widths, rows):
    params, states, targets, weights = random_case(widths, rows, seed=rows, dtype=torch.float32)
    weights[: rows // 3] *= 1000
    loss = behavior_matching(params, states, targets, weights, backend="cpu")
    double = [p.detach().double().requires_grad_() for p in params]
    expected = behavior_matching(double, states.double(), targets.double(), weights.double())
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    gradients = torch.autograd.grad(loss, params)
    assert relative_error(gradients, torch.autograd.grad(expected, double)) < 2e-6


@pytest.mark.parametrize("hidden", [(70, 64), (160, 200)])
def test_compiled_gives_the_same_bits_for_every_thread_count(hidden):
    params, states, targets, weights = random_case((17, *hidden, 6), 1234, seed=2, dtype=torch.float32)
    before = get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 2):
            set_num_threads(threads)
            loss = behavior_matching(params, states, targets, weights, backend="cpu")
            results.append([loss, *torch.autograd.grad(loss, params)])
    finally:
        set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_graph_kept_gives_the_same_gradient_twice(backend):
    params, states, targets, weights = random_case((3, 8, 2), 20, seed=0, dtype=torch.float32)
    loss = behavior_matching(params, states, targets, weights, backend=backend)
    first = torch.autograd.grad(2 * loss, params, retain_graph=True)
    second = torch.autograd.grad(2 * loss, params)
    assert all(torch.equal(x, y) and x is not y for x, y in zip(first, second, strict=True))


def test_by_hand():
    # π(s) = tanh(0) = 0 against y = (1, 2), weights 1 and 3, states 1 and 2: loss (1·1 + 3·4)/2 = 6.5;
    # ∂/∂w = Σ w 2(0 − y) s / 2 = −1 − 12 = −13, ∂/∂b = −1 − 6 = −7.
    params = [torch.zeros(1, 1, requires_grad=True), torch.zeros(1, requires_grad=True)]
    states, targets, weights = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 3.0])
    loss = behavior_matching(params, states, targets, weights)
    loss.backward()
    assert loss.item() == 6.5
    assert params[0].grad.item() == -13
    assert params[1].grad.item() == -7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_weight_zero_counts_for_nothing(dtype):
    params, states, targets, weights = random_case((5, 9, 2), 20, seed=3, dtype=dtype)
    weights[::2] = 0
    targets[::2] = float("nan")
    loss = behavior_matching(params, states, targets, weights)
    expected = plain_loss(params, states[1::2], targets[1::2], weights[1::2]) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, params), torch.autograd.grad(expected, params))


@pytest.mark.parametrize("wrong", ["states", "targets", "weights"])
def test_gradients_that_do_not_exist_are_refused(wrong):
    params, states, targets, weights = random_case((3, 4, 2), 5, seed=0)
    arguments = {"states": states, "targets": targets, "weights": weights}
    arguments[wrong].requires_grad_()
    with pytest.raises(ValueError, match=f"not differentiable in {wrong}"):
        behavior_matching(params, **arguments)


def test_bad_weights_are_named():
    params, states, targets, _ = random_case((3, 4, 2), 5, seed=0)
    with pytest.raises(ValueError, match=r"weights must have shape \(5,\), got \(5, 1\)"):
        behavior_matching(params, states, targets, torch.ones(5, 1, dtype=torch.float64))
