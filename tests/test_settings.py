"""Every setting of a distillation reaches what it sets. Their values and refusals: test_config.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import sdw_fast as sdw
from sdw_fast.config import PRESETS
from sdw_fast.run import new_distiller

TINY = {"size": 12, "hidden": (16, 16), "inner_steps": 5, "batch_size": 64, "steps": 8}

# Another value of every setting that changes the set.
OTHER: dict[str, Any] = {
    "objective": "pbc",
    "value_weights": "paper",
    "density": False,
    "density_method": "flow",
    "k": 30,
    "tau": 0.1,
    "ess": 0.9,
    "clip": 0.8,
    "state_noise": 0.5,
    "beta": 0.04,
    "size": 13,
    "init": "kmeans++",
    "hidden": (16, 8),
    "inner_width": 8,
    "gain": 1.3,
    "fixed_initialization": 3,
    "inner_steps": 6,
    "inner_lr": 0.2,
    "inner_momentum": 0.5,
    "adapt_inner_lr": False,
    "window": 2,
    "steps": 9,
    "batch_size": 65,
    "initializations": 2,
    "optimizer": "sgd",
    "lr": 0.02,
    "schedule": "constant",
    "momentum": 0.5,
    "average": 0.5,
    "clip_norm": 1e-3,
    "select": "last",
    "seed": 1,
}
NEEDED = {"beta": {"value_weights": "paper"}, "adapt_inner_lr": {"inner_lr": 3.0}}  # else they change nothing
NO_CHANGE = {"tape": "recompute", "precision": "ieee"}  # precision is of a GPU's products
OF_THE_RUN = {"eval_every", "eval_clones", "eval_episodes", "checkpoint_every"}  # see test_run.py


def test_every_setting_is_tested() -> None:
    assert OTHER.keys() | NO_CHANGE | OF_THE_RUN == {field.name for field in dataclasses.fields(sdw.DistillConfig)}


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_reaches_the_set(small_data, small_teacher, name: str) -> None:
    if name == "density_method":
        pytest.importorskip("zuko")
    base = {**TINY, "clip_norm": 0.5, **NEEDED.get(name, {})}  # some hypergradients are longer, some are shorter
    other = {**base, name: OTHER[name]}
    first, second = (sdw.distill(small_data, small_teacher, **s, progress=False) for s in (base, other))
    assert first != second
    changed = {key for key in first.config if first.config[key] != second.config[key]} - {"selected"}
    more = {"steps": {"iteration"}, "adapt_inner_lr": {"inner_lr"}}.get(name, set())
    assert changed == {name} | more


@pytest.mark.parametrize("name", NO_CHANGE)
def test_what_saves_memory_or_is_for_a_gpu_changes_no_bit(small_data, small_teacher, name: str) -> None:
    first, second = (
        sdw.distill(small_data, small_teacher, **TINY, **setting, progress=False)
        for setting in ({}, {name: NO_CHANGE[name]})
    )
    assert first == second


def test_the_tape_setting_reaches_the_kernel(small_data, small_teacher) -> None:
    """Neither tape fits any machine: only the full one's refusal advises the other."""
    huge = {**TINY, "hidden": (300_000,), "inner_width": None, "inner_steps": 60_000, "size": 400, "objective": "dbc"}
    huge["adapt_inner_lr"] = False  # which would unroll it
    for tape, advised in (("full", True), ("recompute", False)):
        distiller = new_distiller(small_data, None, sdw.DistillConfig(**huge, tape=tape))
        with pytest.raises(MemoryError, match="tape of 60000 steps") as refusal:
            distiller.step()
        assert ("recompute" in str(refusal.value)) == advised


def test_top_q_starts_among_the_pairs_of_highest_value(small_data, small_teacher) -> None:
    config = sdw.DistillConfig(**TINY, init="top-q")
    start = new_distiller(small_data, small_teacher, config).synthetic
    values = small_teacher.values(small_data.observations, small_data.actions)
    assert small_teacher.values(start.observations, start.actions).min() >= np.sort(values)[-40] * (1 - 1e-5)


def test_a_preset_reaches_the_set(small_data, small_teacher) -> None:
    for name in PRESETS:
        result = sdw.distill(small_data, small_teacher, preset=name, **TINY, progress=False)
        settings = sdw.DistillConfig.preset(name, **TINY).to_dict()
        assert {key: result.config[key] for key in settings} == settings
    with pytest.raises(ValueError, match="preset must be one of"):
        sdw.distill(small_data, small_teacher, preset="papers", **TINY, progress=False)
