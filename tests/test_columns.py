"""Columns: action bounds, from the source or the environment, and what is told of them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import three_episodes

from sdw_fast.readers import load_dataset


@pytest.mark.filterwarnings("error:.*takes actions from")
@pytest.mark.parametrize(("env_id", "bound"), [("Pendulum-v1", 2.0), ("InvertedPendulum-v5", 3.0)])
def test_bounds_are_those_of_the_named_environment(env_id: str, bound: float) -> None:
    pytest.importorskip("mujoco")
    source = {**three_episodes(), "env_id": env_id}
    assert [b.tolist() for b in load_dataset(source).action_bounds] == [[-bound], [bound]]
    load_dataset({**source, "action_low": -bound, "action_high": bound})  # no warning
    with pytest.warns(UserWarning, match=f"{env_id} takes actions from .* where the data or the policy say .*-5"):
        told = load_dataset({**source, "action_low": -5, "action_high": 5})
    assert [b.tolist() for b in told.action_bounds] == [[-bound], [bound]]


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


@pytest.mark.parametrize("env_id", ["Hopper-v5", b"Hopper-v5", np.array("Hopper-v5"), np.array(b"Hopper-v5"), None])
def test_the_environments_id_is_text_of_any_kind(env_id: object) -> None:
    data = load_dataset({**three_episodes(), "env_id": env_id})
    assert data.env_id == (None if env_id is None else "Hopper-v5")


def test_an_hdf5_file_may_name_its_environment(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "named.hdf5", "w") as file:
        for name, value in {**three_episodes(), "env_id": "Hopper-v5"}.items():
            file[name] = value
    assert load_dataset(tmp_path / "named.hdf5").env_id == "Hopper-v5"


def test_an_id_that_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="env_id must be a Gymnasium id such as 'Hopper-v5', got 5"):
        load_dataset({**three_episodes(), "env_id": 5})
