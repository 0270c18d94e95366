"""unrolled_bc on CUDA over random shapes: rows about the edges of tiles, layers of any width, every option."""

import random

import pytest
import torch
from oracle import assert_agree, hypergradient, placed, random_problem, unroll


@pytest.mark.parametrize("kernel", ["emulated", "cuda"], indirect=True)
@pytest.mark.parametrize("seed", range(24))
def test_random_shapes_agree_with_float64(kernel, seed):
    draw = random.Random(seed)
    widest = draw.choice([6, 20, 40, 70])
    widths = tuple(draw.randint(2, widest) for _ in range(draw.randint(2, 5)))
    rows = draw.choice([1, 7, 9, 15, 16, 17, 31, 32, 33, 40, 47, 48, 49, 64, 70])
    steps = draw.randint(1, 3)
    head, momentum = draw.choice(["tanh", "identity", "softmax"]), draw.choice([0.0, 0.8])
    options = {"momentum": momentum, "window": draw.choice([None, draw.randint(1, steps)]), "head": head}
    problem = random_problem(widths, rows, seed, dtype=torch.float32, gain=1.0, head=head)
    lr = 0.1 * (1 - momentum)
    compiled = unroll(kernel.backend, steps, tape=draw.choice(["full", "recompute"]), precision="ieee", **options)
    actual = hypergradient(compiled, *placed(kernel, *problem), lr)
    observations, actions, params = problem
    double = observations.double(), actions.double(), [p.double() for p in params]
    expected = hypergradient(unroll("torch", steps, **options), *double, float(torch.tensor(lr)))
    assert_agree(actual, expected, 1e-4)
