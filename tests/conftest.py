"""Small datasets and teachers that every test module may use."""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulator.fixtures import cuda_on_cpu, emulated, kernel  # noqa: F401

import sdw_fast as sdw
from sdw_fast.units import Affine, Units, d4rl_returns

# The tensors here are tiny: PyTorch's second thread costs more than it does. The kernels keep theirs.
sdw.set_num_threads(torch.get_num_threads())
torch.set_num_threads(1)


# Of a test with a kernel that may wait for ever, which no exception ends: the process ends, saying where it was.
SECONDS = float(os.environ.get("SDW_TEST_SECONDS", "0"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that run on a GPU: `-m gpu`."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if any(isinstance(value, str) and value == "cuda" for value in params.values()):
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if SECONDS:
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
    yield
    if SECONDS:
        faulthandler.cancel_dump_traceback_later()


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


@pytest.fixture
def studied(
    small_data: sdw.TransitionDataset, small_teacher: sdw.Teacher, monkeypatch: pytest.MonkeyPatch
) -> sdw.TransitionDataset:
    """`small_data` in Hopper-v5, which is every task of the studies here, with `small_teacher`."""
    pytest.importorskip("mujoco")
    from benchmarks.studies import tasks

    units = dataclasses.replace(small_data.units, env_id="Hopper-v5", returns=d4rl_returns("Hopper-v5"))
    data = dataclasses.replace(small_data, units=units)
    monkeypatch.setattr(tasks, "dataset", lambda task: data)
    monkeypatch.setattr(tasks, "teacher", lambda task: small_teacher)
    return data


# Bounds of three actions, none of them ±1 or symmetric.
LOW, HIGH = np.array([-2, 0.1, -3], np.float32), np.array([1, 0.7, 5], np.float32)


@pytest.fixture
def bounded_data(small_data: sdw.TransitionDataset) -> sdw.TransitionDataset:
    """`small_data` with its actions stretched to LOW and HIGH, under the name of Hopper, whose bounds are others."""
    actions = Affine.between(LOW, HIGH)
    units = Units(small_data.units.states, actions, d4rl_returns("Hopper-v5"), "Hopper-v5")
    return dataclasses.replace(small_data, actions=actions.denormalize(small_data.actions), units=units)


@pytest.fixture(scope="session")
def toy_env() -> Iterator[str]:
    """The id of an environment of hopper's shape whose episodes take no time."""
    import gymnasium as gym  # not at the top: the kernels' tests run where there is none

    class Toy(gym.Env):
        """Two steps of hopper's shape, which pay the seed and the actions."""

        observation_space = gym.spaces.Box(-np.inf, np.inf, (11,), np.float64)
        action_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            self.seed, self.steps = seed or 0, 0
            return np.full(11, 0.1), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            self.steps += 1
            return np.full(11, 0.2), self.seed + float(action.sum()), False, self.steps == 2, {}

    gym.register("Toy-v0", Toy, disable_env_checker=True)
    yield "Toy-v0"
    gym.registry.pop("Toy-v0")


@pytest.fixture(scope="session")
def dataset(toy_env: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 transitions of the toy environment in a file, whose actions follow the states."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(401, 11)).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(
        path,
        observations=observations[:-1],
        next_observations=observations[1:],
        actions=np.tanh(observations[:-1, :3]),
        rewards=rng.normal(size=400),
        terminations=np.zeros(400, bool),
        truncations=np.arange(400) % 20 == 19,
        env_id=toy_env,
    )
    return path


# Three episodes of a two-number state: [0 1 2] terminated, [10 11] truncated, [20 21] cut by the end of the data.
STATES = np.array([0, 1, 2, 10, 11, 20, 21], np.float32)
NEXT = np.array([1, 2, 3, 11, 12, 21, 22], np.float32)


def three_episodes(**changes: Any) -> dict[str, Any]:
    """The three episodes under Gymnasium's names; a change of None leaves an array out."""
    values: dict[str, Any] = {
        "observations": np.stack([STATES, -STATES], axis=1),
        "actions": STATES[:, None] / 100,
        "rewards": np.array([1, 2, 3, 10, 20, 100, 200], np.float32),
        "terminations": np.array([0, 0, 1, 0, 0, 0, 0], bool),
        "truncations": np.array([0, 0, 0, 0, 1, 0, 0], bool),
        "next_observations": np.stack([NEXT, -NEXT], axis=1),
    }
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def assert_is_the_three_episodes(data: sdw.TransitionDataset) -> None:
    expected = three_episodes()
    for name in ("observations", "actions", "rewards", "terminations"):
        np.testing.assert_array_equal(getattr(data, name), expected[name], err_msg=name)
    np.testing.assert_array_equal(data.next_observations(), expected["next_observations"])
    np.testing.assert_array_equal(data.truncations, [0, 0, 0, 0, 1, 0, 1])  # the end of the data ends an episode
    for array in (data.observations, data.actions, data.rewards, data.next_observations()):
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
    assert data.terminations.dtype == data.truncations.dtype == np.bool_
    np.testing.assert_array_equal(data.episode_ends, [2, 4, 6])
    np.testing.assert_array_equal(data.episode_returns, [6, 30, 300])
