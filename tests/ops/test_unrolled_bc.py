from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import assert_agree, autograd_unroll, hypergradient, leaves, random_problem, relative_error

from sdw_fast import _C, get_num_threads, set_num_threads
from sdw_fast.ops import unrolled_bc


@pytest.fixture(autouse=True)
def one_torch_thread():
    """The oracles' products are too small to share out; waiting for each other costs more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("tape", ["full", "recompute"])
@pytest.mark.parametrize(("widths", "rows", "steps", "window"), CASES)
def test_float64_agrees_with_autograd(widths, rows, steps, window, tape, momentum):
    problem = *random_problem(widths, rows, seed=rows), 0.1

    def ours(s, a, theta, lr):
        return unrolled_bc(s, a, theta, steps=steps, lr=lr, momentum=momentum, window=window, tape=tape), None

    def oracle(s, a, theta, lr):
        return autograd_unroll(s, a, theta, steps, lr, momentum, window or steps)

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


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_two_steps_with_momentum_by_hand(backend):
    # π(s) = tanh(w s + b) at s = 1, y = 0, with w so small that tanh is the identity, and b = 0 at the start: with
    # z = w + b, g = 2z for both. z_1 = z_0 − 2·α·2z_0 = (1 − 4α) z_0, the velocity of each is u_1 = 2α z_0, and
    # u_2 = μ u_1 + 2α z_1, so that w_2 = w_0 − u_1 − u_2 = w_0 − 2α z_0 (1 + μ + 1 − 4α).
    w0, alpha, mu = 1e-4, 0.1, 0.5
    s, y = torch.tensor([[1.0]]), torch.tensor([[0.0]])
    w, b = torch.tensor([[w0]], requires_grad=True), torch.zeros(1, requires_grad=True)
    trained, _ = unrolled_bc(s, y, [w, b], steps=2, lr=alpha, momentum=mu, backend=backend)
    moved = 2 * alpha * (2 + mu - 4 * alpha)  # of w, a unit of z_0
    assert trained.item() == pytest.approx(w0 * (1 - moved))
    trained.backward()
    assert (w.grad.item(), b.grad.item()) == pytest.approx((1 - moved, -moved))


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


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got"):
        unrolled_bc(*random_problem((3, 5, 2), 4, seed=0), steps=2, lr=0.1, momentum=momentum)


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


# Where the compiled kernels run here: on the CPU, and on a GPU if there is one.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and _C.has_cuda else [])]

# The compiled kernel: more shapes, at the edges of its tiles (4, 6, 8 rows), vectors (4, 8, 16) and panels (8, 16, 32).
COMPILED_CASES = [
    *(case for case in CASES if case[2] <= 20),
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("tape", ["full", "recompute"])
@pytest.mark.parametrize(("widths", "rows", "steps", "window"), COMPILED_CASES)
def test_compiled_agrees_with_float64(widths, rows, steps, window, tape, momentum, device):
    observations, actions, params = random_problem(widths, rows, seed=rows, dtype=torch.float32, gain=1.0)

    def unroll(backend):
        options = {"momentum": momentum, "window": window, "tape": tape, "precision": "ieee", "backend": backend}
        return lambda s, a, theta, lr: (unrolled_bc(s, a, theta, steps=steps, lr=lr, **options), None)

    lr = 0.1 * (1 - momentum)  # moves as far
    on_device = [tensor.to(device) for tensor in (observations, actions, *params)]
    actual = hypergradient(unroll(device), on_device[0], on_device[1], on_device[2:], lr)
    double = [tensor.double() for tensor in (observations, actions, *params)]
    expected = hypergradient(unroll("torch"), double[0], double[1], double[2:], float(torch.tensor(lr)))
    assert_agree(actual, expected, 2e-5)


@pytest.mark.parametrize("bias", [-0.2, 0.2, 3.0], ids=["few units on", "most units on", "every unit on"])
def test_compiled_agrees_with_float64_however_many_units_are_on(bias):
    # Products over hidden units leave out what is zero, or do not, as the share of zeros says.
    observations, actions, params = random_problem((6, 128, 144, 130, 3), 70, seed=4, dtype=torch.float32, gain=0.5)
    for layer in (1, 3, 5):
        params[layer] += bias
    expected = [tensor.double() for tensor in (observations, actions, *params)]

    def unroll(backend):
        return lambda s, a, theta, lr: (unrolled_bc(s, a, theta, steps=4, lr=lr, backend=backend), None)

    actual = hypergradient(unroll("cpu"), observations, actions, params, 0.01)
    exact = hypergradient(unroll("torch"), expected[0], expected[1], expected[2:], float(torch.tensor(0.01)))
    assert_agree(actual, exact, 2e-5)


def test_compiled_training_that_diverges_says_so():
    observations, actions, params = random_problem((6, 128, 128, 3), 40, seed=5, dtype=torch.float32)
    params[2][3, 7] = float("nan")
    for tensor in unrolled_bc(observations, actions, params, steps=2, lr=0.1, backend="cpu"):
        assert tensor.isnan().any()


def test_compiled_adjoint_is_right_along_its_own_trajectory():
    # θ_t of the compiled training is its result after t steps; the float64 adjoint runs back along these.
    observations, actions, params = random_problem((17, 64, 64, 6), 48, seed=0, dtype=torch.float32)
    steps, lr = 60, 0.1
    theta = [params]
    for t in range(1, steps + 1):
        theta.append(unrolled_bc(observations, actions, params, steps=t, lr=lr, backend="cpu"))
    adjoint = covectors = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in params]
    adjoint = [v.double() for v in adjoint]
    expected_s = torch.zeros_like(observations, dtype=torch.float64)
    expected_a = torch.zeros_like(actions, dtype=torch.float64)
    for t in range(steps - 1, -1, -1):
        one_step = leaves(observations.double(), actions.double(), [p.double() for p in theta[t]], lr)
        s, a, start, _ = one_step
        out = unrolled_bc(s, a, start, steps=1, lr=lr, backend="torch")
        *data, d_s, d_a = torch.autograd.grad(out, [*start, s, a], adjoint)
        adjoint = data
        expected_s += d_s
        expected_a += d_a
    s, a, start, alpha = leaves(observations, actions, params, lr)
    out = unrolled_bc(s, a, start, steps=steps, lr=alpha, backend="cpu")
    d_s, d_a, *d_start = torch.autograd.grad(out, [s, a, *start], covectors)
    assert relative_error([d_s], [expected_s]) < 1e-5
    assert relative_error([d_a], [expected_a]) < 1e-5
    assert relative_error(d_start, adjoint) < 1e-5


def test_compiled_error_after_100_steps_is_that_of_float32():
    # The training is chaotic: what float32 can do is shown by the PyTorch twin. Medians over ten draws.
    ours, twins = [], []
    for seed in range(10):
        observations, actions, params = random_problem((17, 32, 32, 32, 6), 40, seed=seed, dtype=torch.float32)

        def unroll(backend):
            return lambda s, a, theta, lr: (unrolled_bc(s, a, theta, steps=100, lr=lr, backend=backend), None)

        double = [tensor.double() for tensor in (observations, actions, *params)]
        exact = hypergradient(unroll("torch"), double[0], double[1], double[2:], float(torch.tensor(0.1)))[1]
        for backend, errors in (("cpu", ours), ("torch", twins)):
            gradients = hypergradient(unroll(backend), observations, actions, params, 0.1)[1]
            errors.append(relative_error(gradients[:2], exact[:2]))
    assert sorted(ours)[5] <= 1.5 * sorted(twins)[5]


@pytest.mark.parametrize("hidden", [(70, 64), (160, 200)])
def test_compiled_gives_the_same_bits_for_every_thread_count_and_tape(hidden):
    observations, actions, params = random_problem((17, *hidden, 6), 140, seed=2, dtype=torch.float32)

    def run(threads, tape):
        set_num_threads(threads)
        theta, gradients = hypergradient(
            lambda s, a, start, lr: (unrolled_bc(s, a, start, steps=25, lr=lr, tape=tape, backend="cpu"), None),
            observations,
            actions,
            params,
            0.1,
        )
        return [*theta, *gradients]

    before = get_num_threads()
    try:
        first = run(1, "full")
        for threads, tape in [(1, "full"), (2, "full"), (3, "recompute"), (7, "recompute")]:
            assert all(torch.equal(x, y) for x, y in zip(first, run(threads, tape), strict=True))
    finally:
        set_num_threads(before)


def test_compiled_tape_gives_the_same_gradient_again():
    observations, actions, params = random_problem((5, 20, 2), 10, seed=0, dtype=torch.float32)
    observations.requires_grad_()
    for tape in ("full", "recompute"):
        out = unrolled_bc(observations, actions, params, steps=10, lr=0.1, tape=tape, backend="cpu")
        first = torch.autograd.grad(out[0].sum(), observations, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(out[0].sum(), observations)[0])


def test_compiled_runs_from_several_python_threads():
    observations, actions, params = random_problem((17, 64, 64, 6), 64, seed=4, dtype=torch.float32)

    def run(_):
        return hypergradient(
            lambda s, a, start, lr: (unrolled_bc(s, a, start, steps=20, lr=lr, backend="cpu"), None),
            observations,
            actions,
            params,
            0.1,
        )[1]

    expected = run(0)
    with ThreadPoolExecutor(4) as pool:
        for gradients in pool.map(run, range(8)):
            assert all(torch.equal(x, y) for x, y in zip(gradients, expected, strict=True))


def test_compiled_takes_strided_tensors():
    observations, actions, params = random_problem((6, 12, 4), 10, seed=0, dtype=torch.float32)
    strided = [torch.stack([p, p], -1)[..., 0] for p in params]
    expected = unrolled_bc(observations, actions, params, steps=3, lr=0.1, backend="cpu")
    actual = unrolled_bc(observations.t().contiguous().t(), actions, strided, steps=3, lr=0.1, backend="cpu")
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_a_tape_that_cannot_fit_is_refused_before_it_is_allocated():
    observations, actions = torch.zeros(4096, 4), torch.zeros(4096, 4, requires_grad=True)
    _, _, params = random_problem((4, 1024, 1024, 1024, 4), 1, seed=0, dtype=torch.float32)
    with pytest.raises(MemoryError, match=r'tape of 20000 steps .* GiB.*tape="recompute" needs'):
        unrolled_bc(observations, actions, params, steps=20_000, lr=0.1, backend="cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"window": 4}, ValueError, "window must be between 1 and steps = 3"),
        ({"tape": "half"}, ValueError, "'full' or 'recompute'"),
        ({"lr": torch.ones(2)}, ValueError, "scalar tensor"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"precision": "half"}, ValueError, "'tf32' or 'ieee'"),
        (
            {"observations": torch.zeros(2, 4, 3)},
            ValueError,
            r"of 2 problems, actions must have that leading dimension",
        ),
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
