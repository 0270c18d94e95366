"""unrolled_bc: cases worked by hand, then every implementation against autograd through the unrolled training."""

import importlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from oracle import (
    Tf32Products,
    assert_agree,
    autograd_unroll,
    equal,
    hypergradient,
    leaves,
    placed,
    random_problem,
    relative_error,
    unroll,
)

from sdw_fast.ops import unrolled_bc
from sdw_fast.ops._mlp import flatten, unflatten

twin = importlib.import_module("sdw_fast.ops.unrolled_bc")._run

# widths, rows, steps, window: 1 to 5 layers, odd widths, 1 to 30 steps.
TWIN_CASES = [
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

# More shapes, at the edges of its tiles (4, 6, 8 rows), vectors (4, 8, 16) and panels (8, 16, 32).
CPU_CASES = [
    *(case for case in TWIN_CASES if case[2] <= 20),
    ((1, 200, 1), 1, 1, None),
    ((17, 33, 32, 31, 6), 8, 4, 2),
    ((16, 15, 17, 48, 65), 9, 9, None),
    ((376, 40, 17), 6, 3, None),
    ((3, 5, 5, 5, 5, 5, 5, 5, 2), 47, 6, None),
    ((17, 256, 256, 256, 6), 256, 5, None),
    ((8, 1024, 3), 12, 2, 2),
    ((11, 128, 128, 3), 1, 20, 7),
    ((5, 131, 260, 150, 40), 150, 4, None),  # zeros of the ReLU left out, at odd widths
    ((11, 64, 70, 64, 3), 70, 20, 9),  # the narrowest layers that they are left out for
    ((3, 300, 129, 2), 65, 3, 2),
]

# widths, rows, steps, window: 1 to 4 layers, odd widths, one row to three tiles of rows and a bit; the last is wide
# enough for every way in which columns are dealt out to warps, and for several blocks of weight tiles in a layer.
EMULATED_CASES = [
    ((1, 1), 1, 1, None),
    ((3, 2), 5, 5, None),
    ((17, 40, 6), 33, 3, 2),
    ((11, 31, 7, 3), 17, 5, None),
    ((5, 8, 19, 8, 2), 50, 4, None),
    ((40, 300, 100), 20, 2, 1),
    ((9, 12, 20), 9, 2, None),  # the last tile of 32 rows half used, outputs in both of its halves
]


def doubled(observations, actions, params):
    return observations.double(), actions.double(), [p.double() for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_step_of_one_weight_by_hand(kernel, dtype):
    # π(s) = tanh(w s + b) with w = b = 0 at s = 2, y = 0.5: a = 0, δ = 2 (a − y)(1 − a²) = −1, so one step with
    # α = 0.1 gives w = 0 − 0.1·δ·s = 0.2 and b = 0.1. For H = w_1: ∂H/∂α = −δ s = 2; w_1 = −α·2(a − y)(1 − a²)·s has
    # ∂/∂y = 2αs = 0.4; ∂/∂s = −α δ, as a does not move with s while w = 0: 0.1;
    # ∂/∂b = −α s · d(2(a − y)(1 − a²))/dz = −0.2·2 = −0.4 (only a − y moves at a = 0), ∂/∂w = 1 − 0.4·s = 0.2.
    if dtype == torch.float64 and kernel.backend != "torch":
        pytest.skip("compiled for float32")
    values = [[[2.0]], [[0.5]], [[0.0]], [0.0], 0.1]
    s, y, w, b, lr = (torch.tensor(v, dtype=dtype, device=kernel.device, requires_grad=True) for v in values)
    trained_w, trained_b = unrolled_bc(s, y, [w, b], steps=1, lr=lr, backend=kernel.backend)
    assert trained_w.item() == pytest.approx(0.2)
    assert trained_b.item() == pytest.approx(0.1)
    trained_w.backward()
    assert [t.grad.item() for t in (s, y, w, b, lr)] == pytest.approx([0.1, 0.4, 0.2, -0.4, 2.0])


def test_two_steps_with_momentum_by_hand(kernel):
    # π(s) = tanh(w s + b) at s = 1, y = 0, with w so small that tanh is the identity, and b = 0 at the start: with
    # z = w + b, g = 2z for both. z_1 = z_0 − 2·α·2z_0 = (1 − 4α) z_0, the velocity of each is u_1 = 2α z_0, and
    # u_2 = μ u_1 + 2α z_1, so that w_2 = w_0 − u_1 − u_2 = w_0 − 2α z_0 (1 + μ + 1 − 4α).
    w0, alpha, mu = 1e-4, 0.1, 0.5
    s, y, w, b = (torch.tensor(v, device=kernel.device) for v in ([[1.0]], [[0.0]], [[w0]], [0.0]))
    w.requires_grad_()
    b.requires_grad_()
    options = {"precision": "ieee", "backend": kernel.backend}
    trained, _ = unrolled_bc(s, y, [w, b], steps=2, lr=alpha, momentum=mu, **options)
    moved = 2 * alpha * (2 + mu - 4 * alpha)  # of w, a unit of z_0
    assert trained.item() == pytest.approx(w0 * (1 - moved))
    trained.backward()
    assert (w.grad.item(), b.grad.item()) == pytest.approx((1 - moved, -moved))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("tape", ["full", "recompute"])
@pytest.mark.parametrize(("widths", "rows", "steps", "window"), TWIN_CASES)
def test_twin_agrees_with_float64_autograd(widths, rows, steps, window, tape, momentum):
    problem = *random_problem(widths, rows, seed=rows), 0.1
    ours = unroll("auto", steps, momentum=momentum, window=window, tape=tape)

    def oracle(s, a, theta, lr):
        return autograd_unroll(s, a, theta, steps, lr, momentum, window or steps)

    assert_agree(hypergradient(ours, *problem), hypergradient(oracle, *problem), 1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("tape", ["full", "recompute"])
@pytest.mark.parametrize(
    ("kernel", "widths", "rows", "steps", "window", "tolerance"),
    [
        *((kernel, *case, 2e-5) for kernel in ("cpu", "cuda") for case in CPU_CASES),
        *(("emulated", *case, 1e-5) for case in EMULATED_CASES),
        *(("cuda", *case, 2e-5) for case in EMULATED_CASES),
    ],
    indirect=["kernel"],
)
def test_compiled_agrees_with_float64(kernel, widths, rows, steps, window, tolerance, tape, momentum):
    problem = random_problem(widths, rows, seed=rows, dtype=torch.float32, gain=1.0)
    options = {"momentum": momentum, "window": window}
    lr = 0.1 * (1 - momentum)  # moves as far
    compiled = unroll(kernel.backend, steps, tape=tape, precision="ieee", **options)
    actual = hypergradient(compiled, *placed(kernel, *problem), lr)
    expected = hypergradient(unroll("torch", steps, **options), *doubled(*problem), float(torch.tensor(lr)))
    assert_agree(actual, expected, tolerance)


@pytest.mark.parametrize("bias", [-0.2, 0.2, 3.0], ids=["few units on", "most units on", "every unit on"])
def test_cpu_agrees_with_float64_however_many_units_are_on(bias):
    # Products over hidden units leave out what is zero, or do not, as the share of zeros says.
    observations, actions, params = random_problem((6, 128, 144, 130, 3), 70, seed=4, dtype=torch.float32, gain=0.5)
    for layer in (1, 3, 5):
        params[layer] += bias
    actual = hypergradient(unroll("cpu", 4), observations, actions, params, 0.01)
    exact = hypergradient(unroll("torch", 4), *doubled(observations, actions, params), float(torch.tensor(0.01)))
    assert_agree(actual, exact, 2e-5)


def test_training_that_diverges_says_so(kernel):
    observations, actions, params = placed(kernel, *random_problem((6, 128, 128, 3), 40, seed=5, dtype=torch.float32))
    params[2][3, 7] = float("nan")
    for tensor in unrolled_bc(observations, actions, params, steps=2, lr=0.1, backend=kernel.backend):
        assert tensor.isnan().any()


@pytest.mark.parametrize(
    ("kernel", "widths", "rows", "steps", "precision", "rounding", "tolerance"),
    [
        ("cpu", (17, 64, 64, 6), 48, 60, "ieee", nullcontext, 1e-5),
        *((kernel, (17, 48, 48, 6), 40, 4, "ieee", nullcontext, 1e-5) for kernel in ("emulated", "cuda")),
        ("emulated", (17, 48, 48, 6), 40, 4, "tf32", Tf32Products, 1e-4),
        ("cuda", (17, 48, 48, 6), 40, 4, "tf32", Tf32Products, 2e-3),  # a tensor core's sums are cut off, not rounded
        # has no unit near a kink
        *((kernel, (17, 48, 48, 6), 40, 1, "tf32", nullcontext, 2e-3) for kernel in ("emulated", "cuda")),
        *(("cuda", widths, 256, 10, "ieee", nullcontext, 1e-5) for widths in [(17, *[256] * 3, 6), (11, 100, 31, 3)]),
        *(("cuda", widths, 256, 10, "tf32", Tf32Products, 2e-3) for widths in [(17, *[256] * 3, 6), (11, 100, 31, 3)]),
    ],
    indirect=["kernel"],
)
def test_compiled_adjoint_is_right_along_its_own_trajectory(
    kernel, widths, rows, steps, precision, rounding, tolerance
):
    # θ_t of the compiled training is its result after t steps; the float64 adjoint runs back along these.
    problem = random_problem(widths, rows, seed=0, dtype=torch.float32, gain=1.4 if kernel.backend == "cpu" else 1.0)
    observations, actions, params = placed(kernel, *problem)
    options = {"lr": 0.1, "precision": precision, "backend": kernel.backend}
    theta = [params, *(unrolled_bc(observations, actions, params, steps=t + 1, **options) for t in range(steps))]
    generator = torch.Generator().manual_seed(1)
    covectors = [torch.randn(p.shape, generator=generator).to(kernel.device) for p in params]
    adjoint, sums = [v.double() for v in covectors], [0.0, 0.0, 0.0]
    for start in reversed(theta[:-1]):
        s, a, *leaf = (tensor.double() for tensor in (observations, actions, *start))
        data = torch.full_like(s[0, :1], 0.1), s[None], a[None], flatten(leaf, 1)
        with rounding():  # which looks into a twin, not into an op
            backward = twin(*data, [*widths], "tanh", 1, 1, 0.0, False, False, "torch", True)[1]
            *d_data, d_params = backward(flatten(adjoint, 1), [True] * 4)
        adjoint, sums = unflatten(d_params, leaf), [total + d[0] for total, d in zip(sums, d_data, strict=True)]
    s, a, leaf, lr = leaves(observations, actions, params, 0.1)
    out = unrolled_bc(s, a, leaf, steps=steps, **{**options, "lr": lr})
    actual = torch.autograd.grad(out, [lr, s, a, *leaf], covectors)
    assert_agree(([out[0].detach()], actual), ([out[0].detach()], [*sums, *adjoint]), tolerance)


def test_compiled_error_after_100_steps_is_that_of_float32():
    # The training is chaotic: what float32 can do is shown by the PyTorch twin. Medians over ten draws.
    ours, twins = [], []
    for seed in range(10):
        problem = random_problem((17, 32, 32, 32, 6), 40, seed=seed, dtype=torch.float32)
        exact = hypergradient(unroll("torch", 100), *doubled(*problem), float(torch.tensor(0.1)))[1]
        for backend, errors in (("cpu", ours), ("torch", twins)):
            gradients = hypergradient(unroll(backend, 100), *problem, 0.1)[1]
            errors.append(relative_error(gradients[:2], exact[:2]))
    assert sorted(ours)[5] <= 1.5 * sorted(twins)[5]


@pytest.mark.parametrize("kernel", ["emulated", "cuda"], indirect=True)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tf32_rounds_and_ieee_does_not(kernel, precision):
    observations, actions, params = placed(kernel, *random_problem((17, 40, 6), 33, seed=0, dtype=torch.float32))
    exact = unrolled_bc(*doubled(observations, actions, params), steps=1, lr=0.1, backend="torch")
    changes = [(after - before.double()) for after, before in zip(exact, params, strict=True)]
    least, most = {"ieee": (0, 1e-5), "tf32": (1e-4, 2e-3)}[precision]
    result = unrolled_bc(observations, actions, params, steps=1, lr=0.1, precision=precision, backend="cuda")
    actual = [after.double() - before.double() for after, before in zip(result, params, strict=True)]
    assert least <= relative_error(actual, changes) < most


def test_one_rate_for_all_problems_gets_the_sum_of_their_gradients(kernel):
    problem = placed(kernel, *random_problem((3, 4, 2), 6, seed=0, dtype=torch.float32))
    s, a, *theta = (torch.stack([tensor, 2 * tensor]) for tensor in (problem[0], problem[1] / 2, *problem[2]))

    def gradient(lr):
        out = unrolled_bc(s, a, theta, steps=2, lr=lr, backend=kernel.backend)
        return torch.autograd.grad(sum(p.sum() for p in out), lr)[0]

    each = gradient(torch.full((2,), 0.1, requires_grad=True))
    assert gradient(torch.tensor(0.1, requires_grad=True)).item() == pytest.approx(each.sum().item())


@pytest.mark.parametrize("tape", ["full", "recompute"])
def test_graph_kept_gives_the_same_gradient_twice(kernel, tape):
    observations, actions, params = placed(kernel, *random_problem((3, 5, 2), 4, seed=0, dtype=torch.float32))
    observations.requires_grad_()
    outer = unrolled_bc(observations, actions, params, steps=10, lr=0.1, tape=tape, backend=kernel.backend)[0].sum()
    first = torch.autograd.grad(outer, observations, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(outer, observations)[0])


def test_only_what_is_asked_for_gets_a_gradient(kernel):
    options = {"steps": 3, "lr": 0.1, "precision": "ieee"}
    observations, actions, params = placed(kernel, *random_problem((3, 5, 2), 4, seed=0, dtype=torch.float32))
    actions.requires_grad_()
    params[0].requires_grad_()
    gradients = []
    for backend in (kernel.backend, "torch"):
        sum(p.sum() for p in unrolled_bc(observations, actions, params, backend=backend, **options)).backward()
        gradients.append([actions.grad, params[0].grad])
        actions.grad = params[0].grad = None
    assert relative_error(*gradients) < 1e-5
    assert observations.grad is None
    assert params[1].grad is None
    still = [tensor.detach() for tensor in (actions, *params)]
    trained = unrolled_bc(observations, still[0], still[1:], backend=kernel.backend, **options)
    assert not trained[0].requires_grad


def test_a_second_derivative_is_refused(kernel):
    observations, actions, params = placed(kernel, *random_problem((3, 5, 2), 4, seed=0, dtype=torch.float32))
    actions.requires_grad_()
    out = unrolled_bc(observations, actions, params, steps=2, lr=0.1, backend=kernel.backend)
    (gradient,) = torch.autograd.grad(out[0].square().sum(), actions, create_graph=True)
    with pytest.raises(RuntimeError, match="unrolled_bc: the gradient cannot be differentiated a second time"):
        gradient.sum().backward()


@pytest.mark.parametrize("kernel", ["cpu", "emulated", "cuda"], indirect=True)
def test_strided_tensors_are_taken(kernel):
    observations, actions, params = placed(kernel, *random_problem((6, 12, 4), 10, seed=0, dtype=torch.float32))
    strided = [torch.stack([p, p], -1)[..., 0] for p in params]
    options = {"steps": 3, "lr": 0.1, "backend": kernel.backend}
    expected = unrolled_bc(observations, actions, params, **options)
    assert equal(unrolled_bc(observations.t().contiguous().t(), actions, strided, **options), expected)


def test_compiled_runs_from_several_python_threads():
    problem = random_problem((17, 64, 64, 6), 64, seed=4, dtype=torch.float32)

    def run(_):
        return hypergradient(unroll("cpu", 20), *problem, 0.1)[1]

    expected = run(0)
    with ThreadPoolExecutor(4) as pool:
        for gradients in pool.map(run, range(8)):
            assert equal(gradients, expected)


@pytest.mark.parametrize(
    ("tape", "steps"), [("full", 10**9), ("full", 2**63 - 1), ("recompute", 10**13), ("recompute", 2**63 - 1)]
)
def test_compiled_steps_beyond_all_memory_are_refused_before_they_are_counted(tape, steps):
    """Even the list of so many steps would not fit: the process would be killed while it is made."""
    observations, actions, params = random_problem((64, 64, 64), 512, 0, torch.float32)
    observations.requires_grad_()
    with pytest.raises(MemoryError, match=rf"tape of {steps} steps .* GiB"):
        unrolled_bc(observations, actions, params, steps=steps, lr=0.1, tape=tape, backend="cpu")


@pytest.mark.parametrize("problems", [(), (2,)])
def test_compiled_tape_that_cannot_fit_is_refused_before_it_is_allocated(problems):
    observations, actions = torch.zeros(*problems, 4096, 4), torch.zeros(*problems, 4096, 4, requires_grad=True)
    params = [p.expand(*problems, *p.shape) for p in random_problem((4, 1024, 1024, 1024, 4), 1, 0, torch.float32)[2]]
    with pytest.raises(MemoryError, match=r'tape of 20000 steps .* GiB.*tape="recompute" needs'):
        unrolled_bc(observations, actions, params, steps=20_000, lr=0.1, backend="cpu")


def test_emulated_too_deep_a_network_is_refused(cuda_on_cpu):
    observations, actions, params = random_problem((2,) * 34, 4, seed=0, dtype=torch.float32)
    with pytest.raises(ValueError, match=r'at most 32 layers; use backend="torch"'):
        unrolled_bc(observations, actions, params, steps=1, lr=0.1, backend="cuda")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *(({"steps": steps}, ValueError, "steps must be at least 1 and below") for steps in (0, 1 << 63)),
        ({"window": 4}, ValueError, "window must be between 1 and steps = 3"),
        ({"tape": "half"}, ValueError, "'full' or 'recompute'"),
        *(({"momentum": mu}, ValueError, r"momentum must be in \[0, 1\), got") for mu in (-0.1, 1.0)),
        ({"lr": torch.ones(2)}, ValueError, "scalar tensor"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"precision": "half"}, ValueError, "'tf32' or 'ieee'"),
        ({"observations": torch.zeros(2, 4, 3)}, ValueError, "of 2 problems, actions must have that leading dimension"),
        ({"observations": torch.zeros(4, 4, 3), "actions": torch.zeros(4, 4, 2)}, ValueError, r"params\[0\] must have"),
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
