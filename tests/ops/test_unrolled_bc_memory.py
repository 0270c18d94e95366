"""The memory that is named before a run is what the run takes."""

import pytest
import torch
from oracle import random_problem

from sdw_fast.ops import unrolled_bc, unrolled_bc_memory

WIDTHS = [4, 1024, 1024, 1024, 4]


@pytest.mark.parametrize("problems", [1, 2])
def test_it_is_what_the_refusal_of_a_tape_names(problems):
    lead = (problems,) * (problems > 1)
    data = torch.zeros(*lead, 4096, 4), torch.zeros(*lead, 4096, 4, requires_grad=True)
    params = [p.expand(*lead, *p.shape) for p in random_problem(tuple(WIDTHS), 1, 0, torch.float32)[2]]
    needed = {
        tape: unrolled_bc_memory(4096, WIDTHS, steps=20_000, tape=tape, problems=problems) / 2**30
        for tape in ("full", "recompute")
    }
    sentence = (
        f'needs {needed["full"]:.2f} GiB and .* tape="recompute" needs {needed["recompute"]:.2f} GiB, and a smaller '
        r"window or fewer rows need less \(ops.unrolled_bc_memory says how much\)"
    )
    with pytest.raises(MemoryError, match=sentence):
        unrolled_bc(*data, params, steps=20_000, lr=0.1, backend="cpu")


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="window must be between 1 and steps = 5, or None, got 6"):
        unrolled_bc_memory(10, [2, 3], steps=5, window=6)
    with pytest.raises(ValueError, match="no kernels for device 'tpu'"):
        unrolled_bc_memory(10, [2, 3], steps=5, device="tpu")
