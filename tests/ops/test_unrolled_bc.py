import pytest
import torch
from oracle import assert_agree, autograd_unroll, hypergradient, random_problem

from sdw_fast.ops import unrolled_bc

# widths, rows, steps, window: 1 to 5 layers, odd widths, 1 to 30 steps.
CASES = [
    ((1, 1), 1, 1, None),
    ((3, 2), 5, 7, None),
    ((17, 13, 6), 9, 10, 4),
    ((11, 31, 7, 3), 33, 30, None),
    ((5, 8, 8, 8, 2), 7, 12, 5),
    ((7, 19, 3, 23, 9, 1), 13, 20, None),
    ((17, 64, 64, 64, 6), 40, 5, 1),
    ((2, 100, 4), 1, 15, 15),
    ((30, 9, 9), 50, 30, 29),
    ((4, 6, 5, 6, 5, 3), 21, 3, None),
]


@pytest.mark.parametrize("tape", ["full", "recompute"])
@pytest.mark.parametrize(("widths", "rows", "steps", "window"), CASES)
def test_float64_agrees_with_autograd(widths, rows, steps, window, tape):
    problem = *random_problem(widths, rows, seed=rows), 0.1

    def ours(s, a, theta, lr):
        return unrolled_bc(s, a, theta, steps=steps, lr=lr, window=window, tape=tape), None

    def oracle(s, a, theta, lr):
        return autograd_unroll(s, a, theta, steps, lr, window or steps)

    assert_agree(hypergradient(ours, *problem), hypergradient(oracle, *problem), 1e-10)


def test_one_step_of_one_weight_by_hand():
    # π(s) = tanh(w s + b) with w = b = 0 at s = 2, y = 0.5: a = 0, δ = 2 (a − y)(1 − a²) = −1, so one step with
    # α = 0.1 gives w = 0 − 0.1·δ·s = 0.2 and b = 0.1. For H = w_1: ∂H/∂α = −δ s = 2; w_1 = −α·2(a − y)(1 − a²)·s has
    # ∂/∂y = 2αs = 0.4; ∂/∂s = −α δ, as a does not move with s while w = 0: 0.1;
    # ∂/∂b = −α s · d(2(a − y)(1 − a²))/dz = −0.2·2 = −0.4 (only a − y moves at a = 0), ∂/∂w = 1 − 0.4·s = 0.2.
    s = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    w = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    trained_w, trained_b = unrolled_bc(s, y, [w, b], steps=1, lr=lr)
    assert trained_w.item() == pytest.approx(0.2)
    assert trained_b.item() == pytest.approx(0.1)
    trained_w.backward()
    gradients = [t.grad.item() for t in (s, y, w, b, lr)]
    assert gradients == pytest.approx([0.1, 0.4, 0.2, -0.4, 2.0])


def test_only_what_is_asked_for_gets_a_gradient():
    observations, actions, params = random_problem((3, 5, 2), 4, seed=0, dtype=torch.float32)
    actions.requires_grad_()
    params[0].requires_grad_()
    sum(p.sum() for p in unrolled_bc(observations, actions, params, steps=3, lr=0.1)).backward()
    assert actions.grad is not None
    assert params[0].grad is not None
    assert observations.grad is None
    assert params[1].grad is None
    assert not unrolled_bc(observations, actions.detach(), [p.detach() for p in params], steps=3, lr=0.1)[
        0
    ].requires_grad


def test_a_second_derivative_is_refused():
    observations, actions, params = random_problem((3, 5, 2), 4, seed=0)
    actions.requires_grad_()
    out = unrolled_bc(observations, actions, params, steps=2, lr=0.1)
    (gradient,) = torch.autograd.grad(out[0].square().sum(), actions, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_graph_kept_gives_the_same_gradient_twice():
    observations, actions, params = random_problem((3, 5, 2), 4, seed=0, dtype=torch.float32)
    observations.requires_grad_()
    outer = unrolled_bc(observations, actions, params, steps=4, lr=0.1)[0].sum()
    first = torch.autograd.grad(outer, observations, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(outer, observations)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"window": 4}, ValueError, "window must be between 1 and steps = 3"),
        ({"tape": "half"}, ValueError, "'full' or 'recompute'"),
        ({"lr": torch.ones(2)}, ValueError, "scalar tensor"),
        ({"backend": "tpu"}, ValueError, "'tpu' is not available"),
        ({"actions": torch.zeros(5, 2)}, ValueError, "same number of rows"),
        ({"actions": torch.zeros(4, 3)}, ValueError, "must have 3 outputs"),
        ({"observations": torch.zeros(4)}, ValueError, "non-empty matrices"),
        ({"observations": torch.zeros(0, 3), "actions": torch.zeros(0, 2)}, ValueError, "non-empty matrices"),
        ({"observations": torch.zeros(4, 3).double()}, TypeError, "one dtype"),
        ({"observations": torch.zeros(4, 3).half()}, TypeError, "float32 or float64"),
        ({"observations": [[0.0]]}, TypeError, "must be a torch.Tensor"),
        ({"params": [torch.zeros(5, 3)]}, ValueError, "one bias a weight"),
        ({"params": [torch.zeros(3, 2), torch.zeros(2)]}, ValueError, r"W1 must have shape \(out, 3\)"),
        ({"params": [torch.zeros(2, 3), torch.zeros(3)]}, ValueError, r"b1 must have shape \(2,\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"observations": torch.zeros(4, 3), "actions": torch.zeros(4, 2), "steps": 3, "lr": 0.1}
    arguments["params"] = [torch.zeros(5, 3), torch.zeros(5), torch.zeros(2, 5), torch.zeros(2)]
    arguments.update(change)
    with pytest.raises(error, match=message):
        unrolled_bc(**arguments)
