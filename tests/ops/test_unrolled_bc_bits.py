"""unrolled_bc gives the same bits however its work is shared out: threads, blocks, clusters, tapes, other problems."""

from types import SimpleNamespace

import pytest
import torch
from oracle import equal, hypergradient, placed, random_problem, unroll

from sdw_fast import get_num_threads, set_num_threads
from sdw_fast.ops import unrolled_bc


def bits(backend, widths, rows, steps, **options):
    problem = random_problem(widths, rows, seed=2, dtype=torch.float32)
    theta, gradients = hypergradient(unroll(backend, steps, **options), *problem, 0.1)
    return [*theta, *gradients]


@pytest.mark.parametrize("hidden", [(70, 64), (160, 200)])
def test_compiled_gives_the_same_bits_for_every_thread_count_and_tape(hidden):
    before = get_num_threads()
    try:
        results = []
        for threads, tape in [(1, "full"), (1, "full"), (2, "full"), (3, "recompute"), (7, "recompute")]:
            set_num_threads(threads)
            results.append(bits("cpu", (17, *hidden, 6), 140, 25, tape=tape))
    finally:
        set_num_threads(before)
    assert all(equal(results[0], result) for result in results)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_emulated_gives_the_same_bits_for_every_order_of_threads_number_of_blocks_and_tape(cuda_on_cpu, precision):
    # Nine blocks are enough for the fine tiles of weight gradients.
    results = []
    for seed, blocks, tape in [(1, 4, "full"), (2, 4, "full"), (3, 1, "full"), (4, 9, "recompute"), (5, 3, "full")]:
        cuda_on_cpu.set_seed(seed)
        cuda_on_cpu.set_multiprocessors(blocks)
        results.append(bits("cuda", (17, 70, 40, 6), 130, 3, precision=precision, tape=tape))
    assert all(equal(results[0], result) for result in results)


def stacked(kernel, widths, rows, problems):
    each = [placed(kernel, *random_problem(widths, rows, seed, torch.float32)) for seed in range(problems)]
    s, a, *params = (torch.stack(tensors) for tensors in zip(*((s, a, *p) for s, a, p in each), strict=True))
    return s, a, params


def test_compiled_problems_give_the_same_bits_for_every_thread_count():
    # Five: with two and three threads some are left over, and share the threads. Two million multiplications a thread.
    s, a, theta = stacked(SimpleNamespace(device="cpu"), (17, 48, 48, 6), 64, 5)
    s.requires_grad_()
    before = get_num_threads()
    try:
        results = []
        for threads, tape in [(1, "full"), (2, "full"), (3, "recompute"), (8, "full")]:
            set_num_threads(threads)
            trained = unrolled_bc(s, a, theta, steps=10, lr=0.1, momentum=0.5, tape=tape, backend="cpu")
            gradient = torch.autograd.grad(sum(p.square().sum() for p in trained), s)
            without_tape = unrolled_bc(s.detach(), a, theta, steps=10, lr=0.1, momentum=0.5, backend="cpu")
            results.append([*trained, *gradient])
            assert equal(trained, without_tape)
    finally:
        set_num_threads(before)
    assert all(equal(results[0], result) for result in results)


@pytest.mark.parametrize(
    ("widths", "problems", "blocks"),
    [
        ((17, 256, 6), 1, (2, 4, 8, 16)),  # two tiles of rows a problem, in clusters of 1, 2, 4 and 8
        ((17, 256, 6), 2, (3, 8, 16)),
        ((5, 130, 20, 40, 16, 2), 1, (2, 4, 8)),  # products without columns for every block of a cluster
    ],
)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_emulated_clusters_that_split_columns_give_the_same_bits(cuda_on_cpu, precision, widths, problems, blocks):
    data = stacked(SimpleNamespace(device="cpu"), widths, 32, problems)
    results = []
    # In the end once more without room for the strips of shared memory that blocks pass each other rows in.
    for multiprocessors, shared_limit in [*((count, 227 * 1024) for count in blocks), (blocks[-1], 90 * 1024)]:
        cuda_on_cpu.set_multiprocessors(multiprocessors)
        cuda_on_cpu.set_shared_limit(shared_limit)
        theta, gradients = hypergradient(unroll("cuda", 2, precision=precision), *data, 0.1)
        results.append([*theta, *gradients])
    assert all(equal(results[0], result) for result in results)


def first_and_last(kernel, widths, rows, problems, steps, **options):
    """θ_T and the gradients of a linear loss, of the first and the last of so many problems in one launch."""
    s, a, theta = stacked(kernel, widths, rows, problems)
    for tensor in (s, a, *theta):
        tensor.requires_grad_()
    lr = torch.full((problems,), 0.05, device=kernel.device, requires_grad=True)
    out = unrolled_bc(s, a, theta, steps=steps, lr=lr, backend=kernel.backend, **options)
    covectors = [torch.ones_like(p).cumsum(-1) for p in out]
    gradients = torch.autograd.grad(out, [s, a, lr, *theta], covectors, retain_graph=True)
    again = torch.autograd.grad(out, [s, a, lr, *theta], covectors)
    assert equal(gradients, again)
    return [[x[r].detach() for x in (*out, *gradients)] for r in (0, -1)]


@pytest.mark.parametrize(
    ("kernel", "widths", "rows", "numbers"),
    [
        (
            "emulated",
            (5, 128, 2),
            33,
            (1, 2),
        ),  # four blocks: a problem's three tiles on three, then one after the other
        # On 132 multiprocessors: clusters of 4, of 2 (four problems), of 1, and more problems than groups of blocks.
        ("cuda", (17, 256, 256, 6), 256, (1, 4, 8, 20)),
        ("cuda", (17, 128, 6), 250, (1, 4, 9)),  # clusters of 2 at most
        ("cuda", (11, 70, 40, 3), 130, (1, 16)),
    ],
    indirect=["kernel"],
)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_problem_gets_the_same_bits_among_any_number_of_others(kernel, widths, rows, numbers, precision):
    steps, options = (3, {"window": 2}) if kernel.device == "cpu" else (12, {"window": 9})
    options |= {"momentum": 0.8, "precision": precision}
    alone, _ = first_and_last(kernel, widths, rows, 1, steps, **options)
    for problems in numbers:
        for tape in ("full", "recompute"):
            first, last = first_and_last(kernel, widths, rows, problems, steps, tape=tape, **options)
            assert equal(first, alone)
            assert all(x.isfinite().all() for x in last)
    # The last one of many, by itself: it is the one that waits for a group of blocks.
    seed = numbers[-1] - 1
    s, a, theta = placed(kernel, *random_problem(widths, rows, seed, torch.float32))
    trained = unrolled_bc(s, a, theta, steps=steps, lr=0.05, backend=kernel.backend, **options)
    assert equal(trained, last[: len(trained)])


def test_problems_side_by_side_are_those_apart(kernel, request):
    if kernel == ("cuda", "cpu"):
        request.getfixturevalue("cuda_on_cpu").set_multiprocessors(5)  # two groups of two blocks for three problems
    problems = [placed(kernel, *random_problem((5, 20, 2), 20, seed=r, dtype=torch.float32)) for r in range(3)]
    rates = [0.1, 0.05, 0.2]
    run = unroll(kernel.backend, 3, momentum=0.5)
    apart = [hypergradient(run, *problem, lr) for problem, lr in zip(problems, rates, strict=True)]
    s, a, *theta = (
        torch.stack(tensors).requires_grad_() for tensors in zip(*((s, a, *p) for s, a, p in problems), strict=True)
    )
    lr = torch.tensor(rates, device=kernel.device, requires_grad=True)
    out, _ = run(s, a, theta, lr)
    generators = [torch.Generator().manual_seed(1) for _ in problems]
    covectors = [
        torch.stack([torch.randn(p.shape[1:], generator=g, dtype=torch.float64) for g in generators]).to(p) for p in out
    ]
    gradients = torch.autograd.grad(out, [s, a, lr, *theta], covectors)
    for i, (expected, expected_gradients) in enumerate(apart):
        assert equal([x[i] for x in out], expected)
        assert equal([x[i] for x in gradients], expected_gradients)
