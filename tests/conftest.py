"""Small datasets and teachers that every test module may use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator.fixtures import cuda_on_cpu, emulated, kernel  # noqa: F401

import sdw_fast as sdw

# The tensors here are tiny: PyTorch's second thread costs more than it does. The kernels keep their own setting.
torch.set_num_threads(1)


@pytest.fixture
def small_data() -> sdw.TransitionDataset:
    """400 transitions of hopper's shape (11 observations, 3 actions) in 20 episodes; actions follow the states."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(400, 11)).astype(np.float32) * np.linspace(0.1, 5, 11, dtype=np.float32)
    actions = np.tanh(observations[:, :3] + 0.1 * rng.normal(size=(400, 3))).astype(np.float32)
    truncations = np.zeros(400, dtype=bool)
    truncations[19::20] = True
    return sdw.load_dataset(
        {
            "observations": observations,
            "next_observations": np.roll(observations, -1, axis=0),
            "actions": actions,
            "rewards": rng.normal(size=400).astype(np.float32),
            "terminations": np.zeros(400, dtype=bool),
            "truncations": truncations,
        }
    )


@pytest.fixture
def small_teacher() -> sdw.Teacher:
    """A teacher from two callables: it acts on the first three observations and values states by the first one."""
    return sdw.Teacher(
        actor=lambda states: torch.tanh(states[:, :3]),
        critic=lambda states, actions: 100 + 10 * states[:, 0] + actions.sum(dim=1),
    )
