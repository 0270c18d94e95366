"""A second derivative is right or refused, in every composition: never dropped."""

import pytest
import torch
from oracle import policy, random_problem
from test_torch_library import grad_of_vmap
from torch.func import grad

from sdw_fast.ops import behavior_matching, unrolled_bc, weighted_bc_loss

REFUSED = "the gradient cannot be differentiated a second time"


@pytest.fixture
def problem(kernel):
    """observations, actions, params, weights; actions and params require gradients."""
    observations, actions, params = random_problem((5, 8, 2), 20, seed=4, dtype=torch.float32)
    data = observations, actions.requires_grad_(), [p.requires_grad_() for p in params], torch.linspace(0.5, 1, 20)
    return [[y.to(kernel.device) for y in x] if isinstance(x, list) else x.to(kernel.device) for x in data]


def hypergradient(loss, problem):
    """Of a differentiable inner loop written by hand, for its observations."""
    observations, actions, params, weights = problem
    s = observations.clone().requires_grad_()
    for _ in range(4):
        gradients = torch.autograd.grad(loss(policy(params, s), actions.detach(), weights), params, create_graph=True)
        params = [p - 0.5 * g for p, g in zip(params, gradients, strict=True)]
    return torch.autograd.grad(policy(params, observations).square().sum(), s)[0]


def test_an_inner_loop_around_weighted_bc_loss(kernel, problem):
    def plain(pred, target, weights):
        return (weights[:, None] * (pred - target).square()).sum() / pred.numel()

    def ours(pred, target, weights):
        return weighted_bc_loss(pred, target, weights, backend=kernel.backend)

    torch.testing.assert_close(hypergradient(ours, problem), hypergradient(plain, problem), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("inside_a_sum", [False, True])
def test_a_penalty_on_a_hypergradient_is_refused(kernel, problem, inside_a_sum):
    observations, actions, params, _ = problem
    loss = unrolled_bc(observations, actions, params, steps=3, lr=0.1, backend=kernel.backend)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, actions, create_graph=True)
    penalty = gradient.square().sum()
    with pytest.raises(RuntimeError, match=f"unrolled_bc: {REFUSED}"):
        (loss + penalty if inside_a_sum else penalty).backward()


@pytest.mark.parametrize("inside_a_sum", [False, True])
def test_behavior_matching_is_right_twice_in_pytorch_and_refused_elsewhere(kernel, problem, inside_a_sum):
    observations, actions, params, weights = problem
    loss = behavior_matching(params, observations, actions.detach(), weights, backend=kernel.backend)
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    total = sum(g.square().sum() for g in gradients) + (loss if inside_a_sum else 0)
    if kernel.backend == "torch":
        assert torch.autograd.grad(total, params[0])[0].any()
    else:
        with pytest.raises(RuntimeError, match=f"behavior_matching: {REFUSED}"):
            total.backward()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_under_torch_func(backend):
    s, a, params = random_problem((5, 8, 2), 20, seed=4, dtype=torch.float32)
    weights = torch.linspace(0, 1, 20)

    def error(pred):
        return weighted_bc_loss(torch.tanh(pred), a, weights, backend=backend)

    def plain(pred):
        return (weights[:, None] * (torch.tanh(pred) - a).square()).sum() / a.numel()

    def twice(f):
        return grad(lambda x: grad(f)(x).square().sum())

    torch.testing.assert_close(twice(error)(a), twice(plain)(a))
    with pytest.raises(RuntimeError, match=f"unrolled_bc: {REFUSED}"):
        twice(lambda x: unrolled_bc(s, x, params, steps=2, lr=0.1, backend=backend)[0].square().sum())(a)


@grad_of_vmap
def test_a_gradient_that_does_not_exist_is_refused_under_vmap_too():
    s, a, params = random_problem((5, 8, 2), 20, seed=4, dtype=torch.float32)

    def matched(targets):
        losses = torch.func.vmap(lambda y: behavior_matching(params, s, y, torch.ones(20), backend="cpu"))
        return losses(torch.stack([targets, targets])).sum()

    with pytest.raises(ValueError, match="not differentiable in targets"):
        grad(matched)(a)
