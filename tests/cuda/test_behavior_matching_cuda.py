"""The CUDA kernel of behavior_matching against the float64 twin: emulated, and on a GPU where there is one.

Rounding to tf32 (a relative 2⁻¹¹) can put a ReLU on the other side of its kink, where the derivative jumps; the cases
here keep their hidden units away from it. How far the result lies from the exact one depends on the case; how far it
lies from a twin that rounds the same operands does not.
"""

import itertools
import math

import pytest
import torch

from sdw_fast.ops import behavior_matching
from sdw_fast.ops.mlp import mlp_activations

SHAPES = [
    ((1, 1), 1),
    ((3, 2), 33),
    ((11, 31, 7, 3), 1),
    ((17, 33, 6), 65),
    ((5, 40, 40, 40, 40, 2), 40),
    ((376, 31, 40), 31),
    ((6, 300, 5), 35),  # more than one pass of columns, and an inner length that ends in a part of a piece
    ((17, 64, 64, 64, 6), 96),
]


def random_case(widths, rows, seed, device="cpu"):
    """params, states, targets, weights; each hidden unit's bias is moved until no state lies near its kink."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    params = []
    for fan_in, fan_out in itertools.pairwise(widths):
        params += [normal(fan_out, fan_in) * 1.4 / math.sqrt(fan_in), 0.1 * normal(fan_out)]
    states, targets, weights = normal(rows, widths[0]), torch.tanh(normal(rows, widths[-1])), normal(rows).exp()
    for layer in range(1, len(widths) - 1):
        h = mlp_activations([p.double() for p in params], states.double())[layer - 1]
        z = h @ params[2 * layer - 2].double().T + params[2 * layer - 1].double()  # (rows, units)
        ordered = torch.cat([z.min(0).values[None] - 1, z.sort(dim=0).values, z.max(0).values[None] + 1])
        gap, at = ordered.diff(dim=0).max(dim=0)
        below = ordered.gather(0, at[None])[0]
        params[2 * layer - 1] -= (below + gap / 2).float()
    return [p.to(device).requires_grad_() for p in params], *(x.to(device) for x in (states, targets, weights))


def relative_error(actual, expected):
    difference = sum((x.double() - y).square().sum() for x, y in zip(actual, expected, strict=True)).sqrt()
    return float(difference / sum(y.square().sum() for y in expected).sqrt())


def to_tf32(x):
    return ((x.float().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def rounded_twin(params, states, targets, weights):
    """Loss and gradients in float64, but for the operands of the products, which are rounded to tf32."""
    params = [p.detach().double() for p in params]
    h = [states.double()]
    for layer in range(0, len(params), 2):
        z = to_tf32(h[-1]) @ to_tf32(params[layer]).T + params[layer + 1]
        h.append(z.relu() if layer < len(params) - 2 else z.tanh())
    error = h[-1] - targets
    weighted = weights[:, None].double() * error / error.numel()
    delta = 2 * weighted * (1 - h[-1].square())
    gradients = []
    for layer in range(len(params) // 2 - 1, -1, -1):
        gradients[:0] = [to_tf32(delta).T @ to_tf32(h[layer]), delta.sum(0)]
        delta = (to_tf32(delta) @ to_tf32(params[2 * layer])) * (h[layer] > 0)
    return (weighted * error).sum(), gradients


def check(params, states, targets, weights, precision):
    loss = behavior_matching(params, states, targets, weights, precision=precision, backend="cuda")
    assert loss.shape == ()
    gradients = torch.autograd.grad(3 * loss, params)
    assert [g.shape for g in gradients] == [p.shape for p in params]
    double = [p.detach().double().requires_grad_() for p in params]
    exact = behavior_matching(double, *(x.double() for x in (states, targets, weights)), backend="torch")
    expected = exact.detach(), torch.autograd.grad(exact, double)
    tolerances = {
        "ieee": [(expected, 1e-5)],
        "tf32": [(expected, 1e-2), (rounded_twin(params, states, targets, weights), 1e-3)],
    }
    for (value, slopes), tolerance in tolerances[precision]:
        assert relative_error([loss.detach()], [value]) < tolerance
        assert relative_error([g / 3 for g in gradients], slopes) < tolerance


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(("widths", "rows"), SHAPES)
def test_agrees_with_float64(cuda_on_cpu, widths, rows, precision):
    cuda_on_cpu.set_seed(rows)
    check(*random_case(widths, rows, seed=rows), precision)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_block_adds_up_its_tiles(cuda_on_cpu, precision):
    # 129 tiles of 32 rows for 128 blocks: the first block has two of them, the last tile one row.
    check(*random_case((2, 3, 1), 128 * 32 + 1, seed=0), precision)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_activations_beyond_shared_memory(cuda_on_cpu, precision):
    widths = (4, 900, 500, 2)
    assert cuda_on_cpu.behavior_matching_cuda_workspace(33, widths, False) > 2 * 32 * 4 * sum(widths)
    assert cuda_on_cpu.behavior_matching_cuda_workspace(33, (4, 256, 256, 256, 2), False) < 1000
    check(*random_case(widths, 33, seed=0), precision)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_activations_that_leave_little_shared_memory(cuda_on_cpu, precision):
    check(*random_case((4, 600, 600, 2), 35, seed=1), precision)


def test_by_hand(cuda_on_cpu):
    # π(s) = tanh(0) = 0 against y = (1, 2), weights 1 and 3, states 1 and 2: loss (1·1 + 3·4)/2 = 6.5;
    # ∂/∂w = Σ w 2(0 − y) s / 2 = −1 − 12 = −13, ∂/∂b = −1 − 6 = −7.
    params = [torch.zeros(1, 1, requires_grad=True), torch.zeros(1, requires_grad=True)]
    states, targets, weights = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 3.0])
    loss = behavior_matching(params, states, targets, weights, backend="cuda")
    loss.backward()
    assert loss.item() == 6.5
    assert params[0].grad.item() == -13
    assert params[1].grad.item() == -7


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_row_of_weight_zero_counts_for_nothing(cuda_on_cpu, precision):
    params, states, targets, weights = random_case((5, 9, 2), 50, seed=3)
    weights[::2] = 0
    without = behavior_matching(params, states, targets, weights, precision=precision, backend="cuda")
    targets[::2] = torch.nan
    loss = behavior_matching(params, states, targets, weights, precision=precision, backend="cuda")
    assert torch.equal(loss, without)
    for one, other in zip(torch.autograd.grad(loss, params), torch.autograd.grad(without, params), strict=True):
        assert torch.equal(one, other)


def test_large_weights_and_saturated_outputs(cuda_on_cpu):
    params, states, targets, weights = random_case((5, 20, 3), 40, seed=4)
    weights[::3] *= 1e6
    with torch.no_grad():
        params[-2][0] *= 100  # one output at ±1, where tanh has no slope
    check(params, states, targets, weights, "ieee")


def test_nan_is_not_hidden(cuda_on_cpu):
    params, states, targets, weights = random_case((5, 9, 2), 50, seed=3)
    with torch.no_grad():
        params[0][0, 0] = torch.nan
    assert behavior_matching(params, states, targets, weights, backend="cuda").isnan()


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_order_of_threads_and_blocks_does_not_matter(cuda_on_cpu, precision):
    params, states, targets, weights = random_case((7, 50, 34, 3), 100, seed=5)
    results = []
    for seed in range(1, 6):
        cuda_on_cpu.set_seed(seed)
        loss = behavior_matching(params, states, targets, weights, precision=precision, backend="cuda")
        results.append([loss.detach(), *torch.autograd.grad(loss, params)])
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


def test_loss_alone_and_a_graph_kept(cuda_on_cpu):
    params, states, targets, weights = random_case((3, 8, 2), 40, seed=0)
    loss = behavior_matching(params, states, targets, weights, backend="cuda")
    with torch.no_grad():
        assert torch.equal(behavior_matching(params, states, targets, weights, backend="cuda"), loss)
    first = torch.autograd.grad(2 * loss, params, retain_graph=True)
    second = torch.autograd.grad(2 * loss, params)
    assert all(torch.equal(x, y) and x is not y for x, y in zip(first, second, strict=True))


def test_bad_arguments_are_refused(cuda_on_cpu):
    params, states, targets, weights = random_case((3, *[2] * 33, 2), 4, seed=0)
    with pytest.raises(RuntimeError, match="at most 32 layers"):
        behavior_matching(params, states, targets, weights, backend="cuda")
    with pytest.raises(ValueError, match="precision must be 'tf32' or 'ieee', got 'bf16'"):
        behavior_matching(params, states, targets, weights, precision="bf16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(
    ("widths", "rows"),
    [*SHAPES, ((4, 600, 600, 2), 33), ((4, 900, 500, 2), 33), ((2, 3, 1), 4097), ((17, 256, 256, 256, 6), 300)],
)
def test_on_the_gpu(widths, rows, precision):
    check(*random_case(widths, rows, seed=rows, device="cuda"), precision)
