"""Settings: the defaults that the documents state, the presets, and every value that is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
import pytest

from sdw_fast.config import PRESETS, DistillConfig, TeacherConfig

DEFAULTS = {
    "objective": "sdw",
    "value_weights": "shifted",
    "beta": None,
    "density": None,
    "density_method": "knn",
    "k": 10,
    "tau": None,
    "ess": 0.5,
    "clip": 0.99,
    "state_noise": 0.0,
    "size": 256,
    "init": "random",
    "hidden": (256, 256, 256),
    "inner_width": 64,
    "gain": 1.0,
    "fixed_initialization": None,
    "inner_steps": 100,
    "inner_lr": 0.1,
    "inner_momentum": 0.9,
    "adapt_inner_lr": True,
    "window": None,
    "tape": "full",
    "precision": "tf32",
    "steps": 5_000,
    "batch_size": 2_560,
    "initializations": None,
    "optimizer": "adam",
    "lr": 0.03,
    "schedule": "cosine",
    "momentum": 0.9,
    "average": 0.9,
    "clip_norm": 0.02,
    "select": None,
    "seed": 0,
    "eval_every": 0,
    "eval_clones": 5,
    "eval_episodes": 10,
    "checkpoint_every": 100,
}
TEACHER_DEFAULTS = {
    "algorithm": "td3bc",
    "steps": 100_000,
    "alpha": 2.5,
    "expectile": 0.7,
    "temperature": 3.0,
    "seed": 0,
}


@pytest.mark.parametrize(("config", "defaults"), [(DistillConfig, DEFAULTS), (TeacherConfig, TEACHER_DEFAULTS)])
def test_defaults(config: type, defaults: dict[str, Any]) -> None:
    assert dataclasses.asdict(config()) == defaults


# --- presets ---------------------------------------------------------------------------------------------------------

PUBLISHED = {"inner_width": 128, "k": 100, "clip": 0.9, "ess": 0.95, "value_weights": "paper", "select": "last"}
PAPER = {
    "value_weights": "paper",
    "inner_width": None,
    "gain": math.sqrt(2),
    "inner_momentum": 0.0,
    "adapt_inner_lr": False,
    "steps": 50_000,
    "optimizer": "sgd",
    "lr": 0.1,
    "schedule": "constant",
    "average": 0.0,
    "clip_norm": 2.0,
}


@pytest.mark.parametrize(("name", "changes"), [("default", {}), ("published", PUBLISHED), ("paper", PAPER)])
def test_presets(name: str, changes: dict[str, Any]) -> None:
    assert dataclasses.asdict(DistillConfig.preset(name)) == {**DEFAULTS, **changes}
    replaced = DistillConfig.preset(name, k=7, inner_width=32, seed=3)
    assert dataclasses.asdict(replaced) == {**DEFAULTS, **changes, "k": 7, "inner_width": 32, "seed": 3}


def test_the_paper_s_settings_that_are_ours_too() -> None:
    config = DistillConfig.preset("paper")
    assert (config.size, config.hidden, config.batch_size) == (256, (256, 256, 256), 2_560)
    assert (config.inner_steps, config.inner_lr, config.momentum) == (100, 0.1, 0.9)


def test_presets_are_three_and_others_are_refused() -> None:
    assert set(PRESETS) == {"default", "published", "paper"}
    with pytest.raises(ValueError, match=r"preset must be one of \['default', 'published', 'paper'\], got 'best'"):
        DistillConfig.preset("best")
    with pytest.raises(ValueError, match=r"unknown settings \['wdith'\]; the settings are \['adapt_inner_lr'"):
        DistillConfig.preset("paper", wdith=3)


# --- plain values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PRESETS))
def test_settings_come_back_through_json(name: str) -> None:
    config = DistillConfig.preset(name, tau=0.1 + 0.2, hidden=[32, 16], density=True)
    back = DistillConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert back.hidden == (32, 16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 3  # type: ignore[misc]


# --- refusals --------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("config", "name", "value", "message"),
    [
        *[
            (DistillConfig, name, "best", rf"{name} must be one of \[.*{allowed}.*\], got 'best'")
            for name, allowed in [
                ("objective", "av-pbc"),
                ("value_weights", "paper"),
                ("density_method", "flow"),
                ("init", "top-q"),
                ("optimizer", "sgd"),
                ("schedule", "constant"),
                ("tape", "recompute"),
                ("precision", "ieee"),
            ]
        ],
        *[
            (DistillConfig, name, 0, f"{name} must be at least 1, got 0")
            for name in ("size", "inner_steps", "steps", "batch_size", "checkpoint_every", "k")
        ],
        *[
            (DistillConfig, name, value, f"{name} must be positive and finite, got {value}")
            for name in ("lr", "inner_lr", "clip_norm", "gain", "beta")
            for value in (0.0, -1.0, NAN, INF)
        ],
        *[
            (DistillConfig, name, value, rf"{name} must be in \[0, 1\), got {value}")
            for name in ("momentum", "inner_momentum", "average")
            for value in (-0.1, 1.0, NAN)
        ],
        *[
            (DistillConfig, name, value, rf"{name} must be in \(0, 1\], got {value}")
            for name in ("ess", "clip")
            for value in (0.0, 1.1, NAN)
        ],
        *[
            (DistillConfig, "tau", value, f"tau must be 0 or more and finite.*got {value}")
            for value in (-0.1, NAN, INF)
        ],
        *[
            (DistillConfig, "state_noise", value, f"state_noise must be 0 .* or more and finite, got {value}")
            for value in (-0.1, NAN, INF)
        ],
        (
            DistillConfig,
            "select",
            "best",
            r"select must be one of \['held-out', 'return', 'last'\] or None, got 'best'",
        ),
        (DistillConfig, "select", "return", "select='return' chooses by evaluations.*set eval_every"),
        (DistillConfig, "beta", 0.02, "beta=0.02 is the scale of value_weights='paper' and means nothing without it"),
        (DistillConfig, "eval_clones", 0, "eval_clones must be at least 1, got 0"),
        (DistillConfig, "eval_every", -1, "eval_every must be 0 .* or more, got -1"),
        (DistillConfig, "eval_episodes", 4, "eval_episodes=4 must be at least eval_clones=5"),
        (DistillConfig, "window", 0, "window must be between 1 and inner_steps=100, got 0"),
        (DistillConfig, "window", 101, "window must be between 1 and inner_steps=100, got 101"),
        (DistillConfig, "hidden", (32, 0), r"hidden widths must be at least 1, got \(32, 0\)"),
        (DistillConfig, "inner_width", 0, "inner_width must be at least 1, or None"),
        (TeacherConfig, "algorithm", "sac", r"algorithm must be one of \['td3bc', 'iql'\], got 'sac'"),
        (TeacherConfig, "steps", 0, "steps must be at least 1"),
        *[
            (TeacherConfig, n, v, f"{n} must be positive")
            for n in ("alpha", "temperature")
            for v in (0.0, -1.0, NAN, INF)
        ],
        *[(TeacherConfig, "expectile", v, r"expectile must be in \[0.5, 1\)") for v in (0.4, 1.0, NAN)],
    ],
)
def test_bad_settings_are_refused(config: type, name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.0, "inner_momentum": 0.0, "average": 0.0},
        {"tau": 0.0},
        {"ess": 1.0, "clip": 1.0},
        {"window": 100},
        {"window": 1},
        {"eval_clones": 10},
        {"inner_width": None},
    ],
)
def test_settings_at_their_limits_are_taken(settings: dict[str, Any]) -> None:
    assert DistillConfig(**settings).to_dict() == {**DistillConfig().to_dict(), **settings}
    assert TeacherConfig(expectile=0.5).expectile == 0.5


def test_numbers_of_numpy_become_plain_ones() -> None:
    given = {"steps": np.int64(7), "lr": np.float32(0.5), "hidden": np.array([8, 16]), "seed": np.uint8(3), "clip": 1}
    config = DistillConfig(**given, adapt_inner_lr=np.bool_(False), density=np.bool_(True))
    assert json.loads(json.dumps(config.to_dict())) == DistillConfig(
        steps=7, lr=0.5, hidden=(8, 16), seed=3, clip=1.0, adapt_inner_lr=False, density=True
    ).to_dict() | {"hidden": [8, 16]}
    assert {type(getattr(config, name)) for name in ("steps", "seed")} == {int}
    assert {type(getattr(config, name)) for name in ("lr", "clip")} == {float}
    json.dumps(dataclasses.asdict(TeacherConfig(steps=np.int32(5), alpha=np.float16(1), seed=np.int64(2))))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 2.0, "steps must be an integer, got 2.0"),
        ("k", "3", "k must be an integer, got '3'"),
        ("size", None, "size must be an integer, got None"),
        ("hidden", 256, "hidden must be integers, got 256"),
        ("hidden", "256,256", "hidden must be integers"),
        ("hidden", (256, 1.5), "hidden must be an integer, got 1.5"),
        ("lr", "0.1", "lr must be a float, got '0.1'"),
        ("tau", np.array([0.1]), "tau must be a float"),
        ("adapt_inner_lr", 1, "adapt_inner_lr must be a bool, got 1"),
        ("objective", 3, "objective must be a str, got 3"),
        ("seed", 1.5, "seed must be an integer, got 1.5"),
    ],
)
def test_another_kind_of_value_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        DistillConfig(**{name: value})


@pytest.mark.parametrize("kind", [DistillConfig, TeacherConfig])
@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_seeds_out_of_range_are_refused(kind: type, seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed must be between 0 and 2\*\*63 - 1, got {seed}"):
        kind(seed=seed)
    assert kind(seed=2**63 - 1).seed == 2**63 - 1
