"""The ops as PyTorch's own: registered, compiled without a graph break, and under torch.func."""

import importlib

import pytest
import torch
from oracle import random_problem
from torch.func import grad, jacrev, jvp, vmap

from sdw_fast.ops import _registration, behavior_matching, knn, unrolled_bc, weighted_bc_loss
from sdw_fast.ops._mlp import flatten, layer_widths

STEPS = {"steps": 4, "momentum": 0.5}
# torch.func.grad of a vmap ends in an assertion inside PyTorch 2.5. It passes on 2.13.
grad_of_vmap = pytest.mark.xfail(
    torch.__version__.startswith("2.5."),
    reason="an assertion inside PyTorch 2.5",
    raises=RuntimeError,
    strict=True,
)


@pytest.fixture
def problem():
    """observations, actions, params, weights in float32."""
    return *random_problem((4, 6, 3), 5, seed=0, dtype=torch.float32), torch.linspace(0.5, 2, 5)


def stacked(tensors):
    return [torch.stack([tensor, 0.5 * tensor, -tensor]) for tensor in tensors]


def outer_loss(backend, problem):
    observations, actions, params, weights = problem

    def loss(s, a, *theta):
        trained = unrolled_bc(s, a, theta or params, lr=0.1, backend=backend, **STEPS)
        return behavior_matching(trained, observations, actions, weights, backend=backend)

    return loss


def opchecked(op, *arguments):
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


HEADS = ["tanh", "identity", "softmax"]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("backend", "head", "dtype"),
    [
        ("cpu", "tanh", torch.float32),
        ("cpu", "softmax", torch.float32),
        ("torch", "identity", torch.float32),
        ("torch", "tanh", torch.float64),
    ],
)
def test_opcheck_of_unrolled_bc(problem, backend, head, dtype, keep):
    observations, actions, params, _ = problem
    data = [torch.full((2,), 0.1), *(torch.stack([x, x]) for x in (observations, actions, flatten(params, 1)[0]))]
    data = [x.to(dtype) for x in data]
    options = layer_widths(params), head, 3, 2, 0.5, False, False, backend
    opchecked(torch.ops.sdw.unrolled_bc.default, *(x.clone().requires_grad_() for x in data), *options, keep)
    note = torch.zeros(1, dtype=torch.uint8)
    wanted = [keep, True, not keep, True]
    opchecked(torch.ops.sdw.unrolled_bc_backward.default, data[-1], note, *data, *options, wanted)


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_of_the_losses(problem, keep):
    observations, actions, params, weights = problem
    note = torch.zeros(1, dtype=torch.uint8)
    pred = torch.zeros_like(actions, requires_grad=True)
    opchecked(torch.ops.sdw.weighted_bc_loss.default, pred, actions, weights, "cpu", keep)
    factor = torch.ones((), requires_grad=True)
    opchecked(torch.ops.sdw.weighted_bc_loss_backward.default, factor, note, pred, actions, weights, "cpu", [True])
    flat = flatten(params, 1)
    data = observations[None], actions[None], weights[None], layer_widths(params), "softmax", False, "cpu"
    opchecked(torch.ops.sdw.behavior_matching.default, flat.clone().requires_grad_(), *data, keep)
    opchecked(torch.ops.sdw.behavior_matching_backward.default, torch.ones(1), note, flat, *data, [True])


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_of_many_rows_on_a_gpu(problem, keep, monkeypatch):
    observations, actions, params, weights = problem
    module = importlib.import_module("sdw_fast.ops.behavior_matching")  # the package has the function by that name
    monkeypatch.setattr(module, "ROWS_FOR_PRODUCTS", 1)  # by PyTorch's products, which the CPU has, too
    flat = flatten(params, 1)
    data = observations[None], actions[None], weights[None], layer_widths(params), "tanh", False, "cuda"
    opchecked(torch.ops.sdw.behavior_matching.default, flat.clone().requires_grad_(), *data, keep)
    note = torch.zeros(1, dtype=torch.uint8)
    opchecked(torch.ops.sdw.behavior_matching_backward.default, torch.ones(1), note, flat, *data, [True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_knn(dtype):
    points = torch.arange(12, dtype=dtype).reshape(6, 2)
    opchecked(torch.ops.sdw.knn.default, points, None, 2, "auto")
    opchecked(torch.ops.sdw.knn.default, points[:3], points, 2, "torch")


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck_in_float64(problem, head):
    observations, actions, params, weights = (
        [y.double() for y in x] if isinstance(x, list) else x.double() for x in problem
    )
    leaves = [x.clone().requires_grad_() for x in (torch.tensor(0.1).double(), observations, actions, *params)]

    def unrolled(lr, s, a, *theta):
        return tuple(unrolled_bc(s, a, theta, lr=lr, head=head, backend="torch", **STEPS))

    def matched(*theta):
        return behavior_matching(theta, observations, actions, weights, head=head, backend="torch")

    def error(pred):
        return weighted_bc_loss(pred, actions, weights, backend="torch")

    assert torch.autograd.gradcheck(unrolled, leaves, check_batched_grad=True)
    assert torch.autograd.gradcheck(matched, leaves[3:], check_batched_grad=True)
    assert torch.autograd.gradcheck(error, (actions + 0.3).requires_grad_(), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(error, (actions + 0.3).requires_grad_())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_compiles_without_a_graph_break(problem, backend, monkeypatch):
    observations, actions, params, weights = problem
    rate = torch.tensor(0.1, requires_grad=True)
    found = []
    noted = _registration._noted
    monkeypatch.setattr(_registration, "_noted", lambda *x: found.append(noted(*x)) or found[-1])

    def step(s, a):
        distances = knn(s, k=2)[0]
        trained = unrolled_bc(s, a, params, lr=rate, backend=backend, **STEPS)
        loss = behavior_matching(trained, observations, actions, weights, backend=backend)
        loss = loss + weighted_bc_loss(s[:, :3], actions, weights, backend=backend)
        return loss * distances.mean(), s - 0.1 * trained[0].sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        s, a = observations.clone().requires_grad_(), actions.clone().requires_grad_()
        loss, moved = function(s, a)
        results.append([loss, moved, *torch.autograd.grad(loss + moved.sum(), [s, a, rate])])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert None not in found  # what the forward pass left was there, in the compiled function, too


def test_one_compiled_function_takes_any_number_of_rows(problem):
    function = torch.compile(outer_loss("cpu", problem), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 7, 9):
        data = random_problem((4, 6, 3), rows, seed=rows, dtype=torch.float32)[:2]
        assert torch.equal(function(*data), outer_loss("cpu", problem)(*data))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_func_grad_is_autograd(problem, backend):
    loss = outer_loss(backend, problem)
    s, a = (x.clone().requires_grad_() for x in problem[:2])
    expected = torch.autograd.grad(loss(s, a), [s, a])
    for gradient, value in zip(grad(loss, argnums=(0, 1))(*problem[:2]), expected, strict=True):
        assert torch.equal(gradient, value)


@grad_of_vmap
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_vmap_is_a_loop(problem, backend):
    loss = outer_loss(backend, problem)
    s, a, params, weights = problem
    many = stacked(params)
    each = list(zip(*many, strict=True))
    in_dims = (None, None, *(0 for _ in many))
    torch.testing.assert_close(vmap(loss, in_dims)(s, a, *many), torch.stack([loss(s, a, *p) for p in each]))
    gradients = torch.stack([grad(loss)(s, a, *p) for p in each])
    torch.testing.assert_close(vmap(grad(loss), in_dims)(s, a, *many), gradients)
    torch.testing.assert_close(grad(lambda s: vmap(loss, in_dims)(s, a, *many).sum())(s), gradients.sum(0))
    preds = torch.stack([a, -a])
    error = vmap(lambda pred: weighted_bc_loss(pred, a, weights, backend=backend))(preds)
    torch.testing.assert_close(error[1], weighted_bc_loss(-a, a, weights, backend=backend))

    def trained(s):
        return unrolled_bc(s, a, params, lr=0.1, backend=backend, **STEPS)[3]

    torch.testing.assert_close(jacrev(trained)(s), torch.autograd.functional.jacobian(trained, s))


def test_forward_mode_is_refused_never_dropped(problem):
    loss = outer_loss("cpu", problem)
    with pytest.raises(NotImplementedError, match=r"sdw::unrolled_bc has no forward-mode derivative"):
        jvp(lambda s: loss(s, problem[1]), (problem[0],), (problem[0],))
