"""What a policy makes of its last layer, in both ops: cases worked by hand, then shapes against float64 autograd.

"tanh" has the tests of each op; here are "identity" and "softmax", whose targets are probabilities or class numbers.
"""

import math

import pytest
import torch
from oracle import (
    assert_agree,
    autograd_unroll,
    equal,
    hypergradient,
    placed,
    random_problem,
    relative_error,
    unroll,
    weighted_loss,
)

from sdw_fast import get_num_threads, set_num_threads
from sdw_fast.ops import behavior_matching, unrolled_bc

# widths, rows, steps, window: one row, one layer, wide, deep; outputs beyond a vector (4, 8, 16), a panel (8, 16, 32),
# a warp (32) and its pairs (64).
CASES = [
    ((1, 2), 1, 1, None),
    ((3, 2), 5, 5, None),
    ((17, 33, 9), 8, 4, 2),
    ((5, 8, 8, 8, 8, 2), 33, 4, None),
    ((4, 20, 70), 19, 3, None),
]
CPU_CASES = [
    *CASES,
    ((11, 64, 70, 64, 3), 70, 12, 9),
    ((8, 300, 17), 12, 3, None),
    ((5, 131, 260, 40), 150, 4, None),
]
HEADS = ["identity", "softmax"]


def tensors(kernel, *values):
    return [torch.tensor(value, device=kernel.device, requires_grad=True) for value in values]


def test_one_step_of_identity_by_hand(kernel):
    # z = w s + b = 0.5 with w = 0.25, b = 0, s = 2, and y = 1: δ = 2 (z − y) = −1, so α = 0.1 gives w = 0.25 + 0.2. For
    # H = w_1 = w − 2α(ws + b − y)s: ∂/∂s = −2α(2ws + b − y) = 0, ∂/∂y = 2αs = 0.4, ∂/∂w = 1 − 2αs² = 0.2,
    # ∂/∂b = −2αs = −0.4 and ∂/∂α = −δs = 2.
    s, y, w, b, lr = tensors(kernel, [[2.0]], [[1.0]], [[0.25]], [0.0], 0.1)
    trained, _ = unrolled_bc(s, y, [w, b], steps=1, lr=lr, head="identity", backend=kernel.backend)
    assert trained.item() == pytest.approx(0.45)
    trained.backward()
    assert [t.grad.item() for t in (s, y, w, b, lr)] == pytest.approx([0.0, 0.4, 0.2, -0.4, 2.0], abs=1e-7)


def test_one_step_of_softmax_by_hand(kernel):
    # Two classes, w = b = 0: p = (1/2, 1/2), and δ = p − y = (−1/2, 1/2) for y = (1, 0). With s = 2 and α = 0.1 w_1 is
    # (0.1, −0.1). H = its first, −α (σ p_0 − y_0) s: ∂/∂y_0 = −αs(p_0 − 1) = 0.1, ∂/∂y_1 = −αs p_0 = −0.1,
    # ∂/∂s = −αδ_0 = 0.05, ∂/∂b = ∓αs p_0 p_1 = ∓0.05, ∂/∂w = (1, 0) ∓ 0.05 s, and ∂/∂α = −δ_0 s = 1.
    s, y, w, b, lr = tensors(kernel, [[2.0]], [[1.0, 0.0]], [[0.0], [0.0]], [0.0, 0.0], 0.1)
    trained, bias = unrolled_bc(s, y, [w, b], steps=1, lr=lr, head="softmax", backend=kernel.backend)
    assert trained.flatten().tolist() == pytest.approx([0.1, -0.1])
    assert bias.tolist() == pytest.approx([0.05, -0.05])
    trained[0, 0].backward()
    actual = [x for t in (s, y, w, b, lr) for x in t.grad.flatten().tolist()]
    assert actual == pytest.approx([0.05, 0.1, -0.1, 0.9, 0.1, -0.05, 0.05, 1.0])


def test_losses_by_hand(kernel):
    # z = 0 for two classes, weights 1 and 3, y = (1, 0) and (1/2, 0): (1·log 2 + 3·log 2 / 2) / 2, and
    # ∂/∂b = (1·(−1/2, 1/2) + 3·(−1/4, 1/4)) / 2. Squared error instead: (1·1 + 3/4) / 4, ∂/∂b = (−2 − 3, 0) / 4.
    zeros, y = torch.zeros(2, 1, device=kernel.device), torch.tensor([[1.0, 0.0], [0.5, 0.0]], device=kernel.device)
    weights = torch.tensor([1.0, 3.0], device=kernel.device)
    for head, expected, slopes in (
        ("softmax", 1.25 * math.log(2), [-0.625, 0.625]),
        ("identity", 0.4375, [-1.25, 0.0]),
    ):
        bias = torch.zeros(2, device=kernel.device, requires_grad=True)
        loss = behavior_matching([zeros, bias], zeros, y, weights, head=head, backend=kernel.backend)
        loss.backward()
        assert loss.item() == pytest.approx(expected)
        assert bias.grad.tolist() == pytest.approx(slopes)


def test_probabilities_of_nearly_zero_and_one_neither_overflow_nor_vanish(kernel):
    # z = (1000, 0, −1000): log p = (0, −1000, −2000). With one class p = 1.
    zeros, y = torch.zeros(3, 1, device=kernel.device), torch.tensor([[0.0, 1.0, 0.0]], device=kernel.device)
    bias = torch.tensor([1000.0, 0.0, -1000.0], device=kernel.device, requires_grad=True)
    options = {"head": "softmax", "backend": kernel.backend}
    loss = behavior_matching([zeros, bias], zeros[:1], y, y[0, 1:2], **options)
    loss.backward()
    assert loss.item() == 1000
    assert bias.grad.tolist() == pytest.approx([1, -1, 0])
    trained = unrolled_bc(zeros[:1], y, [zeros, bias.detach()], steps=1, lr=1.0, **options)
    assert trained[1].tolist() == pytest.approx([999, 1, -1000])
    one = zeros[:1, 0], zeros[:1], torch.ones_like(y[:, :1]), y[0, 1:2]
    assert behavior_matching([zeros[:1], one[0]], *one[1:], **options).item() == 0


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("tape", ["full", "recompute"])
@pytest.mark.parametrize(("widths", "rows", "steps", "window"), CASES)
def test_twin_agrees_with_float64_autograd(widths, rows, steps, window, tape, momentum, head):
    problem = *random_problem(widths, rows, seed=rows, gain=1.0, head=head), 0.05
    ours = unroll("torch", steps, head=head, momentum=momentum, window=window, tape=tape)

    def oracle(s, a, theta, lr):
        return autograd_unroll(s, a, theta, steps, lr, momentum, window or steps, head)

    assert_agree(hypergradient(ours, *problem), hypergradient(oracle, *problem), 1e-9)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("momentum", "tape"), [(0.0, "full"), (0.8, "recompute")])
@pytest.mark.parametrize(
    ("kernel", "widths", "rows", "steps", "window"),
    [*(("cpu", *case) for case in CPU_CASES), *((kernel, *case) for kernel in ("emulated", "cuda") for case in CASES)],
    indirect=["kernel"],
)
def test_compiled_agrees_with_float64(kernel, widths, rows, steps, window, tape, momentum, head):
    s, a, params = random_problem(widths, rows, seed=rows, dtype=torch.float32, gain=1.0, head=head)
    options = {"head": head, "momentum": momentum, "window": window}
    lr = 0.05 * (1 - momentum)
    compiled = unroll(kernel.backend, steps, tape=tape, precision="ieee", **options)
    actual = hypergradient(compiled, *placed(kernel, s, a, params), lr)
    exact = s.double(), a.double(), [p.double() for p in params], float(torch.tensor(lr))
    assert_agree(actual, hypergradient(unroll("torch", steps, **options), *exact), 1e-4)  # of alpha, terms cancel


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("widths", "rows"), [((1, 2), 1), ((3, 2), 7), ((17, 33, 9), 300), ((4, 20, 70), 65)])
def test_weighted_loss_agrees_with_float64(kernel, widths, rows, head):
    s, y, params = random_problem(widths, rows, seed=rows, dtype=torch.float32, gain=1.0, head=head)
    weights = torch.linspace(-1, 2, rows).clamp(min=0)
    weights[-1] = 3
    double = [p.double().requires_grad_() for p in params]
    expected = weighted_loss(double, s.double(), y.double(), weights.double(), head)
    slopes = torch.autograd.grad(expected, double)
    y[weights == 0] = torch.nan  # counts for nothing
    s, y, params = placed(kernel, s, y, params)
    params = [p.requires_grad_() for p in params]
    options = {"head": head, "precision": "ieee", "backend": kernel.backend}
    loss = behavior_matching(params, s, y, weights.to(kernel.device), **options)
    actual = torch.autograd.grad(loss, params)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert relative_error(actual, slopes) < 1e-5


@pytest.mark.parametrize("head", HEADS)
def test_problems_side_by_side_are_those_apart(kernel, head):
    cases = [placed(kernel, *random_problem((5, 20, 4), 20, r, torch.float32, head=head)) for r in range(3)]
    s, a = (torch.stack(x).requires_grad_() for x in list(zip(*cases, strict=True))[:2])
    params = [torch.stack(p) for p in zip(*(case[2] for case in cases), strict=True)]
    options = {"head": head, "backend": kernel.backend}
    trained = unrolled_bc(s, a, params, steps=3, lr=0.05, **options)
    weights = torch.ones(3, 20, device=kernel.device)
    losses = behavior_matching(trained, s.detach(), a.detach(), weights, **options)
    gradients = torch.autograd.grad(losses.sum(), [s, a])
    for r, (s_r, a_r, params_r) in enumerate(cases):
        leaves = s_r.clone().requires_grad_(), a_r.clone().requires_grad_()
        loss = behavior_matching(
            unrolled_bc(*leaves, params_r, steps=3, lr=0.05, **options), s_r, a_r, weights[r], **options
        )
        assert torch.equal(losses[r], loss)
        assert equal([g[r] for g in gradients], torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("head", HEADS)
def test_compiled_gives_the_same_bits_for_every_thread_count_and_tape(head):
    problem = random_problem((17, 160, 40), 70, seed=2, dtype=torch.float32, gain=1.0, head=head)
    before = get_num_threads()
    try:
        results = []
        for threads, tape in [(1, "full"), (3, "recompute")]:
            set_num_threads(threads)
            theta, gradients = hypergradient(unroll("cpu", 10, head=head, tape=tape), *problem, 0.05)
            results.append([*theta, *gradients])
    finally:
        set_num_threads(before)
    assert equal(*results)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_class_numbers_are_targets(kernel, dtype):
    observations, _, params = placed(kernel, *random_problem((3, 8, 4), 6, seed=0, dtype=torch.float32))
    params = [p.requires_grad_() for p in params]
    classes = torch.tensor([0, 3, 1, 1, 2, 0], dtype=dtype, device=kernel.device)
    probabilities = torch.nn.functional.one_hot(classes.long(), 4).float()
    options = {"head": "softmax", "backend": kernel.backend}
    weights = torch.ones(6, device=kernel.device)
    results = []
    for targets in (classes, probabilities):
        trained = unrolled_bc(observations, targets, params, steps=2, lr=0.1, **options)
        loss = behavior_matching(trained, observations, targets, weights, **options)
        results.append([loss, *trained, *torch.autograd.grad(loss, params)])
    assert equal(*results)
    if kernel.backend == "torch":
        expected = torch.nn.functional.cross_entropy(policy_logits(trained, observations), classes.long())
        torch.testing.assert_close(loss, expected)
    batched = [p[None].expand(2, *p.shape) for p in params]
    trained = unrolled_bc(observations.expand(2, -1, -1), classes.expand(2, -1), batched, steps=2, lr=0.1, **options)
    assert equal([p[1] for p in trained], results[0][1:7][: len(trained)])


def policy_logits(params, observations):
    h = torch.relu(torch.nn.functional.linear(observations, *params[:2]))
    return torch.nn.functional.linear(h, *params[2:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"head": "relu"}, ValueError, "head must be 'tanh', 'identity' or 'softmax', got 'relu'"),
        ({"targets": torch.tensor([0, 4])}, ValueError, r"class numbers from 0 to 3.* 4 outputs; got 4"),
        ({"targets": torch.tensor([0, -1])}, ValueError, "got -1"),
        ({"targets": torch.tensor([0, 1, 2])}, ValueError, "same number of rows"),
        ({"targets": torch.tensor([True, False])}, TypeError, "float32 or float64, got torch.bool"),
        ({"targets": torch.tensor([0, 1]), "head": "tanh"}, TypeError, "float32 or float64, got torch.int64"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"targets": torch.tensor([0, 1]), "head": "softmax", **change}
    targets = arguments.pop("targets")
    params = [torch.zeros(4, 3), torch.zeros(4)]
    with pytest.raises(error, match=message):
        unrolled_bc(torch.zeros(2, 3), targets, params, steps=1, lr=0.1, **arguments)
    with pytest.raises(error, match=message):
        behavior_matching(params, torch.zeros(2, 3), targets, torch.ones(2), **arguments)
