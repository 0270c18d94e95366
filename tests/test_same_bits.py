"""The number of threads changes how long a distillation takes, and no bit of what it gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sdw_fast as sdw
from sdw_fast.networks import orthogonal_parameters

SETTINGS = {"size": 64, "hidden": (256, 256), "inner_steps": 10, "batch_size": 256, "steps": 3}


@pytest.fixture(params=[2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads(), sdw.get_num_threads()
    yield request.param
    torch.set_num_threads(before[0])
    sdw.set_num_threads(before[1])


def use(number: int) -> None:
    torch.set_num_threads(number)
    sdw.set_num_threads(number)


@pytest.mark.parametrize("width", [11, 64, 130, 256])
def test_initial_parameters(threads: int, width: int) -> None:
    drawn = []
    for number in (1, threads):
        use(number)
        drawn.append(orthogonal_parameters([width] * 3, gain=1.0, generators=[torch.Generator().manual_seed(0)]))
        assert torch.get_num_threads() == number
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))


@pytest.mark.parametrize("inner_width", [64, None])
def test_distilled_sets_and_policies_cloned_on_them(threads: int, inner_width: int | None, small_data, small_teacher):
    """Along an unroll the last bit of one number grows until returns differ by tens of points."""
    sets, policies = [], []
    for number in (1, threads):
        use(number)
        sets.append(sdw.distill(small_data, small_teacher, inner_width=inner_width, seed=0, progress=False, **SETTINGS))
        policies.append(sdw.behavior_clone(sets[-1], seed=0, ensemble=2))
    assert sets[0] == sets[1]
    parameters = zip(*(policy.parameters() for policy in policies), strict=True)
    assert all(torch.equal(one, other) for one, other in parameters)
