"""Columns: action bounds, from the source or the environment, and what is told of them."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import three_episodes

from sdw_fast.readers import load_dataset


@pytest.mark.parametrize(("env_id", "bound"), [("Pendulum-v1", 2.0), ("InvertedPendulum-v5", 3.0)])
def test_bounds_are_those_of_the_named_environment(env_id: str, bound: float) -> None:
    pytest.importorskip("mujoco")
    source = {**three_episodes(), "env_id": env_id}
    assert [b.tolist() for b in load_dataset(source).action_bounds] == [[-bound], [bound]]
    told = load_dataset({**source, "action_low": -5, "action_high": 5})
    assert [b.tolist() for b in told.action_bounds] == [[-5], [5]]  # what the source says comes first


def test_an_environment_that_cannot_be_made_is_said() -> None:
    with pytest.warns(UserWarning, match="the environment 'Nowhere-v3' cannot be made here"):
        data = load_dataset({**three_episodes(), "env_id": "Nowhere-v3"})
    assert data.action_bounds[1].tolist() == [1]


def test_actions_beyond_known_bounds_are_told() -> None:
    source = {**three_episodes(), "action_low": -1, "action_high": 1}
    with pytest.warns(UserWarning, match="the actions reach from .* beyond the bounds"):
        data = load_dataset({**source, "actions": source["actions"] * 50})
    assert np.abs(data.actions).max() > 1  # kept as they are
    rounding = source["actions"] / np.abs(source["actions"]).max() * (1 + 1e-6)
    load_dataset({**source, "actions": rounding})


# --- files that lead elsewhere, or say more than they hold -----------------------------------------------------------
