"""The CUDA kernels of unrolled_bc against the float64 twin: run by the emulator, and on a GPU where there is one."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdw_fast.ops import unrolled_bc

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from oracle import assert_agree, hypergradient, leaves, random_problem, relative_error

# widths, rows, steps, window: 1 to 4 layers, odd widths, one row to three tiles of rows and a bit; the last is wide
# enough for every way in which columns are dealt out to warps, and for several blocks of weight tiles in a layer.
CASES = [
    ((1, 1), 1, 1, None),
    ((3, 2), 5, 5, None),
    ((17, 40, 6), 33, 3, 2),
    ((11, 31, 7, 3), 17, 5, None),
    ((5, 8, 19, 8, 2), 50, 4, None),
    ((40, 300, 100), 20, 2, 1),
]


def unroll(backend, steps, **options):
    return lambda s, a, theta, lr: (unrolled_bc(s, a, theta, steps=steps, lr=lr, backend=backend, **options), None)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("tape", ["full", "recompute"])
@pytest.mark.parametrize(("widths", "rows", "steps", "window"), CASES)
def test_ieee_agrees_with_float64(cuda_on_cpu, widths, rows, steps, window, tape, momentum):
    observations, actions, params = random_problem(widths, rows, seed=rows, dtype=torch.float32, gain=1.0)
    options = {"momentum": momentum, "window": window}
    actual = hypergradient(
        unroll("cuda", steps, tape=tape, precision="ieee", **options), observations, actions, params, 0.1
    )
    double = [tensor.double() for tensor in (observations, actions, *params)]
    exactly = unroll("torch", steps, **options)
    expected = hypergradient(exactly, double[0], double[1], double[2:], float(torch.tensor(0.1)))
    assert_agree(actual, expected, 1e-5)


class Tf32Products(TorchDispatchMode):
    """Matrix products of operands rounded to tf32 (10 bits of mantissa, to nearest), whatever the dtype they are in.

    The kernel's own trajectory includes which units its rounding switches off: near a kink, the exact product switches
    others, and the two adjoints differ by that, not by an error.
    """

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.PRODUCTS:
            args = (*args[:-2], *(self.rounded(operand) for operand in args[-2:]))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        bits = x.float().contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


def along_trajectory(widths, rows, steps, device, precision, rounding=nullcontext):
    """The kernel's gradients (observations, actions, lr, params), and those of the float64 twin along its own θ_t."""
    observations, actions, params = random_problem(widths, rows, seed=0, dtype=torch.float32, gain=1.0)
    observations, actions, *params = (tensor.to(device) for tensor in (observations, actions, *params))
    options = {"precision": precision, "backend": "cuda"}
    theta = [params]
    for t in range(1, steps + 1):
        theta.append(unrolled_bc(observations, actions, params, steps=t, lr=0.1, **options))
    generator = torch.Generator().manual_seed(1)
    covectors = [torch.randn(p.shape, generator=generator).to(device) for p in params]
    adjoint = [v.double() for v in covectors]
    sums = [0.0, 0.0, 0.0]
    for start in reversed(theta[:-1]):
        s, a, leaf, lr = leaves(observations.double(), actions.double(), [p.double() for p in start], 0.1)
        with rounding():
            out = unrolled_bc(s, a, leaf, steps=1, lr=lr, backend="torch")
            d_s, d_a, d_lr, *adjoint = torch.autograd.grad(out, [s, a, lr, *leaf], adjoint)
        sums = [total + d for total, d in zip(sums, (d_s, d_a, d_lr), strict=True)]
    s, a, leaf, lr = leaves(observations, actions, params, 0.1)
    out = unrolled_bc(s, a, leaf, steps=steps, lr=lr, **options)
    return torch.autograd.grad(out, [s, a, lr, *leaf], covectors), [*sums, *adjoint]


def assert_groups_agree(actual, expected, tolerance):
    for i in range(3):
        assert relative_error(actual[i : i + 1], expected[i : i + 1]) < tolerance, i
    assert relative_error(actual[3:], expected[3:]) < tolerance


@pytest.mark.parametrize(
    ("precision", "steps", "rounding", "tolerance"),
    [("ieee", 4, nullcontext, 1e-5), ("tf32", 4, Tf32Products, 1e-4), ("tf32", 1, nullcontext, 2e-3)],
)
def test_adjoint_is_right_along_its_own_trajectory(cuda_on_cpu, precision, steps, rounding, tolerance):
    # The last case has no unit near a kink.
    assert_groups_agree(*along_trajectory((17, 48, 48, 6), 40, steps, "cpu", precision, rounding), tolerance)


def test_tf32_rounds_and_ieee_does_not(cuda_on_cpu):
    observations, actions, params = random_problem((17, 40, 6), 33, seed=0, dtype=torch.float32)
    double = [tensor.double() for tensor in (observations, actions, *params)]
    exact = unrolled_bc(double[0], double[1], double[2:], steps=1, lr=0.1, backend="torch")
    changes = [(after - before.double()) for after, before in zip(exact, params, strict=True)]
    for precision, least, most in [("ieee", 0, 1e-5), ("tf32", 1e-4, 2e-3)]:
        result = unrolled_bc(observations, actions, params, steps=1, lr=0.1, precision=precision, backend="cuda")
        actual = [after.double() - before.double() for after, before in zip(result, params, strict=True)]
        assert least <= relative_error(actual, changes) < most


def bits(seed=0, steps=3, **options):
    problem = random_problem((17, 70, 40, 6), 130, seed=seed, dtype=torch.float32)
    theta, gradients = hypergradient(unroll("cuda", steps, **options), *problem, 0.1)
    return [*theta, *gradients]


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_same_bits_for_every_order_of_threads_number_of_blocks_and_tape(cuda_on_cpu, precision):
    # Nine blocks are enough for the fine tiles of weight gradients.
    first = bits(precision=precision)
    for seed, blocks, tape in [(2, 4, "full"), (3, 1, "full"), (4, 9, "recompute"), (5, 3, "full")]:
        cuda_on_cpu.set_seed(seed)
        cuda_on_cpu.set_multiprocessors(blocks)
        assert all(torch.equal(x, y) for x, y in zip(first, bits(precision=precision, tape=tape), strict=True))


@pytest.mark.parametrize(
    ("problems", "blocks"),
    [(1, (2, 4, 8)), (2, (3, 8, 16))],  # two tiles of rows a problem, in clusters of 1, 2 and 4
)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_clusters_that_split_columns_give_the_same_bits(cuda_on_cpu, precision, problems, blocks):
    each = [random_problem((17, 256, 6), 32, seed=seed, dtype=torch.float32) for seed in range(problems)]
    s, a, *params = (torch.stack(tensors) for tensors in zip(*((s, a, *p) for s, a, p in each), strict=True))
    results = []
    for multiprocessors in blocks:
        cuda_on_cpu.set_multiprocessors(multiprocessors)
        theta, gradients = hypergradient(unroll("cuda", 2, precision=precision), s, a, params, 0.1)
        results.append([*theta, *gradients])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], result, strict=True))


@pytest.mark.parametrize(
    ("widths", "rows", "problems", "resident", "groups", "members", "parts", "tile"),
    [
        ((17, 256, 256, 256, 6), 256, 1, 132, 1, 64, 4, 16),
        ((17, 256, 256, 256, 6), 256, 2, 132, 2, 64, 4, 16),
        ((17, 256, 256, 256, 6), 256, 4, 132, 4, 32, 2, 32),
        ((17, 256, 256, 256, 6), 256, 8, 132, 8, 16, 1, 32),
        ((17, 256, 256, 256, 6), 256, 20, 132, 8, 16, 1, 32),
        ((17, 64, 64, 6), 256, 1, 132, 1, 16, 1, 16),
        ((17, 256, 6), 5000, 2, 132, 1, 132, 1, 16),
        ((17, 256, 6), 1, 300, 132, 132, 1, 1, 32),
    ],
)
def test_groups_fill_the_device(emulated, widths, rows, problems, resident, groups, members, parts, tile):
    options = {"rows": rows, "widths": widths, "steps": 1, "window": 1, "momentum": 0.0}
    problem = emulated.UnrolledBCCudaProblem(problems=problems, keep_tape=True, recompute=False, ieee=False, **options)
    plan = emulated.unrolled_bc_schedule(problem, resident)
    names = ("groups", "members", "parts_of_a_team", "tile")
    assert tuple(plan[name] for name in names) == (groups, members, parts, tile)


@pytest.mark.parametrize("backend", ["cuda", "cpu", "torch"])
def test_problems_side_by_side_are_those_apart(request, backend):
    if backend == "cuda":
        request.getfixturevalue("cuda_on_cpu").set_multiprocessors(5)  # two groups of two blocks for three problems
    problems = [random_problem((5, 20, 2), 20, seed=seed, dtype=torch.float32) for seed in range(3)]
    rates = [0.1, 0.05, 0.2]
    apart = [hypergradient(unroll(backend, 3), *problem, lr) for problem, lr in zip(problems, rates, strict=True)]
    s, a, *theta = (
        torch.stack(tensors).requires_grad_() for tensors in zip(*((s, a, *p) for s, a, p in problems), strict=True)
    )
    lr = torch.tensor(rates, requires_grad=True)
    out = unrolled_bc(s, a, theta, steps=3, lr=lr, backend=backend)
    generators = [torch.Generator().manual_seed(1) for _ in problems]
    covectors = [
        torch.stack([torch.randn(p.shape[1:], generator=g, dtype=torch.float64) for g in generators]).float()
        for p in out
    ]
    gradients = torch.autograd.grad(out, [s, a, lr, *theta], covectors)
    for i, (expected, expected_gradients) in enumerate(apart):
        assert all(torch.equal(x[i], y) for x, y in zip(out, expected, strict=True))
        assert all(torch.equal(x[i], y) for x, y in zip(gradients, expected_gradients, strict=True))


def test_one_rate_for_all_problems_gets_the_sum_of_their_gradients(cuda_on_cpu):
    problem = random_problem((3, 4, 2), 6, seed=0, dtype=torch.float32)
    s, a, *theta = (torch.stack([tensor, 2 * tensor]) for tensor in (problem[0], problem[1] / 2, *problem[2]))

    def gradient(lr):
        out = unrolled_bc(s, a, theta, steps=2, lr=lr, backend="cuda")
        return torch.autograd.grad(sum(p.sum() for p in out), lr)[0]

    each = gradient(torch.full((2,), 0.1, requires_grad=True))
    assert gradient(torch.tensor(0.1, requires_grad=True)).item() == pytest.approx(each.sum().item())


@pytest.mark.parametrize("tape", ["full", "recompute"])
def test_graph_kept_gives_the_same_gradient_twice(cuda_on_cpu, tape):
    observations, actions, params = random_problem((3, 5, 2), 4, seed=0, dtype=torch.float32)
    observations.requires_grad_()
    outer = unrolled_bc(observations, actions, params, steps=5, lr=0.1, tape=tape, backend="cuda")[0].sum()
    first = torch.autograd.grad(outer, observations, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(outer, observations)[0])


def test_only_what_is_asked_for_gets_a_gradient(cuda_on_cpu):
    observations, actions, params = random_problem((3, 5, 2), 4, seed=0, dtype=torch.float32)
    actions.requires_grad_()
    params[0].requires_grad_()
    out = unrolled_bc(observations, actions, params, steps=3, lr=0.1, precision="ieee", backend="cuda")
    sum(p.sum() for p in out).backward()
    expected = [actions.grad, params[0].grad]
    actions.grad = params[0].grad = None
    sum(p.sum() for p in unrolled_bc(observations, actions, params, steps=3, lr=0.1, backend="cpu")).backward()
    assert relative_error(expected, [actions.grad, params[0].grad]) < 1e-5
    assert observations.grad is None
    assert params[1].grad is None
    still = unrolled_bc(observations, actions.detach(), [p.detach() for p in params], steps=3, lr=0.1, backend="cuda")
    assert not still[0].requires_grad


def test_too_deep_a_network_is_refused(cuda_on_cpu):
    observations, actions, params = random_problem((2,) * 34, 4, seed=0, dtype=torch.float32)
    with pytest.raises(ValueError, match=r'at most 32 layers; use backend="torch"'):
        unrolled_bc(observations, actions, params, steps=1, lr=0.1, backend="cuda")


def test_tiles_hold_a_warps_operand_in_one_line_after_another(emulated):
    places = sorted(emulated.tiled(row, column, 48) for row in range(24) for column in range(48))
    assert places == list(range(24 * 48))
    for lane in range(32):
        assert emulated.tiled(8 + lane // 4, 16 + lane % 4 * 4, 48) == (3 + 1) * 128 + 4 * lane


def test_columns_are_dealt_out_in_one_round_where_they_can_be(emulated):
    assert [emulated.tiles_a_warp(tiles, 8) for tiles in (2, 8, 10, 16, 18, 32, 34, 128)] == [1, 1, 2, 2, 4, 4, 4, 4]


@pytest.mark.parametrize("resident", [1, 5, 132])
@pytest.mark.parametrize(
    ("widths", "rows", "problems"),
    [((1, 1), 1, 1), ((17, 256, 256, 256, 6), 256, 8), ((376, 100, 33, 300, 17), 1000, 3), ((5, 7, 3), 50, 40)],
)
def test_every_tile_has_one_owner_and_every_number_its_place(emulated, widths, rows, problems, resident):
    options = {"rows": rows, "widths": widths, "steps": 9, "window": 7, "momentum": 0.9}
    problem = emulated.UnrolledBCCudaProblem(problems=problems, keep_tape=True, recompute=True, ieee=False, **options)
    plan = emulated.unrolled_bc_schedule(problem, resident)
    assert sorted(plan["rows"]) == list(range(-(-rows // 16)))
    assert plan["groups"] * plan["members"] <= resident
    padded_rows = 16 * len(plan["rows"])
    theta_end = pass_end = flat_end = 0
    for i, layer in enumerate(plan["layers"]):
        height, width = layer["out_padded"], layer["in_padded"]
        owned = [(row, column) for l, row, column in plan["weights"] if l == i and row < height and column < width]
        tile = plan["tile"]
        assert sorted(owned) == [(row, column) for row in range(0, height, tile) for column in range(0, width, tile)]
        assert widths[i] <= width < widths[i] + 16
        assert widths[i + 1] <= height < widths[i + 1] + 16
        assert (layer["flat"], layer["weights"], layer["h"]) == (flat_end, theta_end, pass_end)
        assert layer["biases"] == theta_end + 2 * height * width
        assert layer["delta"] == pass_end + 2 * padded_rows * height
        flat_end += widths[i + 1] * (widths[i] + 1)
        theta_end = -(-(layer["biases"] + height) // 32) * 32
        pass_end = layer["delta"] + 2 * padded_rows * height
    assert (plan["flat"], plan["theta"], plan["pass"]) == (flat_end, theta_end, pass_end)
    inputs, outputs = plan["layers"][0]["in_padded"], plan["layers"][-1]["out_padded"]
    assert (plan["length"], plan["segments"]) == (3, 3)
    sizes = [2 * inputs, outputs, 4 * theta_end, 3 * pass_end, theta_end, 6 * theta_end]
    sizes += [theta_end, theta_end, pass_end]
    sizes = [size * padded_rows if i < 2 else size for i, size in enumerate(sizes)]
    sizes += [padded_rows * width for width in (inputs, outputs, outputs)]
    assert plan["parts"][0] == 0
    for begin, end, size in zip(plan["parts"][:-1], plan["parts"][1:], sizes, strict=True):
        assert end - begin == -(-size // 32) * 32
    assert problem.workspace == 4 * problems * (plan["parts"][-1] + 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("precision", "rounding", "tolerance"), [("ieee", nullcontext, 1e-5), ("tf32", Tf32Products, 2e-3)]
)
@pytest.mark.parametrize("widths", [(17, 256, 256, 256, 6), (11, 100, 31, 3)])
def test_gpu_adjoint_is_right_along_its_own_trajectory(widths, precision, rounding, tolerance):
    assert_groups_agree(*along_trajectory(widths, 256, 10, "cuda", precision, rounding), tolerance)
