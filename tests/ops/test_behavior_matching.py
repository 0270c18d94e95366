"""behavior_matching: a case worked by hand, then every implementation against float64.

Rounding to tf32 (a relative 2⁻¹¹) can put a ReLU on the other side of its kink, where the derivative jumps; the CUDA
cases keep their hidden units away from it. How far the result lies from the exact one depends on the case; how far it
lies from a twin that rounds the same operands does not.
"""

import pytest
import torch
from oracle import random_problem, relative_error, to_tf32, weighted_loss

from sdw_fast import get_num_threads, set_num_threads
from sdw_fast.ops import behavior_matching
from sdw_fast.ops._mlp import mlp_activations

TWIN_CASES = [((1, 1), 1), ((3, 2), 5), ((17, 13, 6), 300), ((11, 31, 7, 3), 1), ((17, 64, 64, 64, 6), 129)]
CPU_CASES = [
    ((1, 1), 1),
    ((3, 2), 7),
    ((17, 33, 6), 255),
    ((17, 64, 64, 64, 6), 257),
    ((11, 100, 3), 1000),
    ((376, 31, 40), 513),
    ((9, 130, 201, 4), 300),  # zeros of the ReLU left out
]
CUDA_CASES = [
    ((1, 1), 1),
    ((3, 2), 33),
    ((11, 31, 7, 3), 1),
    ((17, 33, 6), 65),
    ((5, 40, 40, 40, 40, 2), 40),
    ((376, 31, 40), 31),
    ((6, 300, 5), 35),  # more than one pass of columns, and an inner length that ends in a part of a piece
    ((17, 64, 64, 64, 6), 96),
    ((4, 600, 600, 2), 35),  # activations that leave little shared memory
    ((4, 900, 500, 2), 33),  # activations beyond shared memory
    ((2, 3, 1), 128 * 32 + 1),  # 129 tiles of 32 rows for 128 blocks: the first has two, the last tile one row
]


def random_case(widths, rows, seed, dtype=torch.float32, device="cpu", kinks=True):
    """params, states, targets, weights; without kinks, biases are moved until no state lies near a hidden unit's."""
    states, targets, params = random_problem(widths, rows, seed)
    weights = torch.randn(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
    weights[: rows // 3] *= 1000 if kinks else 1
    for layer in range(1, 1 if kinks else len(widths) - 1):
        h = mlp_activations(params, states)[layer - 1]
        z = h @ params[2 * layer - 2].T + params[2 * layer - 1]  # (rows, units)
        ordered = torch.cat([z.min(0).values[None] - 1, z.sort(dim=0).values, z.max(0).values[None] + 1])
        gap, at = ordered.diff(dim=0).max(dim=0)
        params[2 * layer - 1] -= ordered.gather(0, at[None])[0] + gap / 2
    params, (states, targets, weights) = (
        [x.to(device, dtype) for x in tensors] for tensors in (params, (states, targets, weights))
    )
    return [p.requires_grad_() for p in params], states, targets, weights


def double_of(params, *data):
    return [p.detach().double().requires_grad_() for p in params], *(x.double() for x in data)


def rounded_twin(params, states, targets, weights):
    """Loss and gradients in float64, but for the operands of the products, which are rounded to tf32."""
    params, states, targets, weights = double_of(params, states, targets, weights)
    params = [p.detach() for p in params]
    h = [states]
    for layer in range(0, len(params), 2):
        z = to_tf32(h[-1]) @ to_tf32(params[layer]).T + params[layer + 1]
        h.append(z.relu() if layer < len(params) - 2 else z.tanh())
    error = h[-1] - targets
    weighted = weights[:, None] * error / error.numel()
    delta = 2 * weighted * (1 - h[-1].square())
    gradients = []
    for layer in range(len(params) // 2 - 1, -1, -1):
        gradients[:0] = [to_tf32(delta).T @ to_tf32(h[layer]), delta.sum(0)]
        delta = (to_tf32(delta) @ to_tf32(params[2 * layer])) * (h[layer] > 0)
    return (weighted * error).sum(), gradients


def check(case, kernel, precision, tolerance, rounded_tolerance=None):
    params = case[0]
    loss = behavior_matching(*case, precision=precision, backend=kernel.backend)
    assert loss.shape == ()
    gradients = [g / 3 for g in torch.autograd.grad(3 * loss, params)]
    assert [g.shape for g in gradients] == [p.shape for p in params]
    double = double_of(*case)
    exact = weighted_loss(*double)
    references = [(exact.detach(), torch.autograd.grad(exact, double[0]), tolerance)]
    if rounded_tolerance is not None:
        references.append((*rounded_twin(*case), rounded_tolerance))
    for value, slopes, bound in references:
        assert relative_error([loss.detach()], [value]) < bound
        assert relative_error(gradients, slopes) < bound


def test_by_hand(kernel):
    # π(s) = tanh(0) = 0 against y = (1, 2), weights 1 and 3, states 1 and 2: loss (1·1 + 3·4)/2 = 6.5;
    # ∂/∂w = Σ w 2(0 − y) s / 2 = −1 − 12 = −13, ∂/∂b = −1 − 6 = −7.
    params = [torch.zeros(1, 1, device=kernel.device), torch.zeros(1, device=kernel.device)]
    params = [p.requires_grad_() for p in params]
    states = targets = torch.tensor([[1.0], [2.0]], device=kernel.device)
    weights = torch.tensor([1.0, 3.0], device=kernel.device)
    loss = behavior_matching(params, states, targets, weights, backend=kernel.backend)
    loss.backward()
    assert loss.item() == 6.5
    assert params[0].grad.item() == -13
    assert params[1].grad.item() == -7


@pytest.mark.parametrize(("widths", "rows"), TWIN_CASES)
def test_twin_agrees_with_float64(widths, rows):
    params, *data = random_case(widths, rows, seed=rows, dtype=torch.float64)
    loss = behavior_matching(params, *data)
    expected = weighted_loss(params, *data)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(3 * loss, params)
    assert relative_error(gradients, torch.autograd.grad(3 * expected, params)) < 1e-12


@pytest.mark.parametrize(("kernel", "widths", "rows"), [("cpu", *case) for case in CPU_CASES], indirect=["kernel"])
def test_cpu_agrees_with_float64(kernel, widths, rows):
    check(random_case(widths, rows, seed=rows), kernel, "tf32", 2e-6)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(
    ("kernel", "widths", "rows"),
    [
        *(("emulated", *case) for case in CUDA_CASES),
        *(("cuda", *case) for case in [*CUDA_CASES, ((17, 256, 256, 256, 6), 300)]),
    ],
    indirect=["kernel"],
)
def test_cuda_agrees_with_float64(kernel, widths, rows, precision):
    seed = rows if rows < 4000 else 0  # of the large ones, one whose outputs do not saturate
    case = random_case(widths, rows, seed, device=kernel.device, kinks=False)
    check(case, kernel, precision, *([1e-5] if precision == "ieee" else [2e-2, 1e-3]))


def test_large_weights_and_saturated_outputs(kernel):
    params, states, targets, weights = random_case((5, 20, 3), 40, seed=4, device=kernel.device, kinks=False)
    weights[::3] *= 1e6
    with torch.no_grad():
        params[-2][0] *= 100  # one output at ±1, where tanh has no slope
    check((params, states, targets, weights), kernel, "ieee", 2e-5 if kernel.backend == "cpu" else 1e-5)


def test_problems_side_by_side_are_those_apart(kernel):
    cases = [random_case((5, 20, 3), 70, seed=seed, device=kernel.device) for seed in range(3)]
    factors = torch.tensor([1.0, 3.0, -0.5], device=kernel.device)
    params = [torch.stack(p).detach().requires_grad_() for p in zip(*(case[0] for case in cases), strict=True)]
    data = [torch.stack(tensors) for tensors in zip(*(case[1:] for case in cases), strict=True)]
    losses = behavior_matching(params, *data, backend=kernel.backend)
    assert losses.shape == (3,)
    for all_the_same in (False, True):
        of = torch.ones_like(factors) if all_the_same else factors
        gradients = torch.autograd.grad(losses, params, of, retain_graph=True)
        for r, case in enumerate(cases):
            loss = behavior_matching(*case, backend=kernel.backend)
            assert torch.equal(losses[r], loss)
            for g, expected in zip(gradients, torch.autograd.grad(of[r] * loss, case[0]), strict=True):
                assert torch.equal(g[r], expected)


@pytest.mark.parametrize("hidden", [(70, 64), (160, 200)])
def test_compiled_gives_the_same_bits_for_every_thread_count(hidden):
    params, *data = random_case((17, *hidden, 6), 1234, seed=2)
    before = get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 2):
            set_num_threads(threads)
            loss = behavior_matching(params, *data, backend="cpu")
            results.append([loss, *torch.autograd.grad(loss, params)])
    finally:
        set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    ("kernel", "widths", "rows"),
    [("emulated", (7, 50, 34, 3), 100), ("cuda", (7, 50, 34, 3), 100), ("cuda", (17, 256, 256, 6), 5000)],
    indirect=["kernel"],
)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_order_of_threads_and_blocks_does_not_matter(kernel, widths, rows, precision, request):
    params, *data = random_case(widths, rows, seed=5, device=kernel.device)
    results = []
    for seed in range(1, 6):
        if kernel.device == "cpu":
            request.getfixturevalue("cuda_on_cpu").set_seed(seed)
        loss = behavior_matching(params, *data, precision=precision, backend="cuda")
        results.append([loss.detach(), *torch.autograd.grad(loss, params)])
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


def test_loss_alone_and_a_graph_kept(kernel):
    params, *data = random_case((3, 8, 2), 40, seed=0, device=kernel.device)
    loss = behavior_matching(params, *data, backend=kernel.backend)
    with torch.no_grad():
        assert torch.equal(behavior_matching(params, *data, backend=kernel.backend), loss)
    first = torch.autograd.grad(2 * loss, params, retain_graph=True)
    second = torch.autograd.grad(2 * loss, params)
    assert all(torch.equal(x, y) and x is not y for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_row_of_weight_zero_counts_for_nothing(kernel, precision, dtype):
    if dtype == torch.float64 and kernel.backend != "torch":
        pytest.skip("compiled for float32")
    options = {"precision": precision, "backend": kernel.backend}
    params, states, targets, weights = random_case((5, 9, 2), 50, seed=3, dtype=dtype, device=kernel.device)
    weights[::2] = 0
    without = behavior_matching(params, states, targets, weights, **options)
    hidden = targets.clone()
    hidden[::2] = torch.nan
    loss = behavior_matching(params, states, hidden, weights, **options)
    assert torch.equal(loss, without)
    gradients = torch.autograd.grad(loss, params)
    for one, other in zip(gradients, torch.autograd.grad(without, params), strict=True):
        assert torch.equal(one, other)
    if precision == "ieee":
        expected = weighted_loss(params, states[1::2], targets[1::2], weights[1::2]) / 2
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, params))


def test_nan_is_not_hidden(kernel):
    params, *data = random_case((5, 9, 2), 50, seed=3, device=kernel.device)
    with torch.no_grad():
        params[0][0, 0] = torch.nan
    assert behavior_matching(params, *data, backend=kernel.backend).isnan()


def test_emulated_workspace_holds_what_shared_memory_does_not(emulated):
    assert emulated.behavior_matching_cuda_workspace(33, (4, 900, 500, 2), False) > 2 * 32 * 4 * 1406
    assert emulated.behavior_matching_cuda_workspace(33, (4, 256, 256, 256, 2), False) < 1000


def test_emulated_too_deep_a_network_is_refused(cuda_on_cpu):
    with pytest.raises(RuntimeError, match="at most 32 layers"):
        behavior_matching(*random_case((3, *[2] * 33, 2), 4, seed=0), backend="cuda")


@pytest.mark.parametrize("wrong", ["states", "targets", "weights"])
def test_gradients_that_do_not_exist_are_refused(wrong):
    params, states, targets, weights = random_case((3, 4, 2), 5, seed=0)
    arguments = {"states": states, "targets": targets, "weights": weights}
    arguments[wrong].requires_grad_()
    with pytest.raises(ValueError, match=f"not differentiable in {wrong}"):
        behavior_matching(params, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(5, 1)}, r"weights must have shape \(5,\), got \(5, 1\)"),
        ({"precision": "bf16"}, "precision must be 'tf32' or 'ieee', got 'bf16'"),
        ({"backend": "tpu"}, "'tpu' is not available"),
        ({"states": torch.ones(2, 5, 3)}, r"states \(2, 5, 3\) of 2 problems, targets must have that leading"),
    ],
)
def test_bad_input_is_named(change, message):
    params, states, targets, weights = random_case((3, 4, 2), 5, seed=0)
    arguments = {"states": states, "targets": targets, "weights": weights, **change}
    with pytest.raises(ValueError, match=message):
        behavior_matching(params, **arguments)
