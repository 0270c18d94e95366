"""The nine tasks of the suite: their datasets and their teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sdw_fast as sdw
from benchmarks.table import ROOT

ENVS = ("halfcheetah", "hopper", "walker2d")
QUALITIES = ("mixture", "medium", "medium-expert")
TASKS = [f"{env}/{quality}" for env in ENVS for quality in QUALITIES]
TRANSITIONS = 100_000  # of each dataset
# Arguments of sdw.train_teacher.
TEACHERS: dict[str, dict[str, Any]] = {
    "halfcheetah/mixture": {"algorithm": "iql", "steps": 20_000, "expectile": 0.8, "temperature": 6.0},
    "halfcheetah/medium": {"algorithm": "iql", "steps": 20_000, "expectile": 0.8, "temperature": 6.0},
    "halfcheetah/medium-expert": {"algorithm": "iql", "steps": 20_000, "expectile": 0.7, "temperature": 1.0},
    "hopper/mixture": {"algorithm": "iql", "steps": 20_000, "expectile": 0.8, "temperature": 3.0},
    "hopper/medium": {"algorithm": "iql", "steps": 10_000, "expectile": 0.8, "temperature": 6.0},
    "hopper/medium-expert": {"algorithm": "iql", "steps": 20_000, "expectile": 0.7, "temperature": 3.0},
    "walker2d/mixture": {"algorithm": "iql", "steps": 10_000, "expectile": 0.7, "temperature": 3.0},
    "walker2d/medium": {"algorithm": "iql", "steps": 10_000, "expectile": 0.7, "temperature": 1.0},
    "walker2d/medium-expert": {"algorithm": "iql", "steps": 20_000, "expectile": 0.7, "temperature": 1.0},
}


def dataset(task: str) -> sdw.TransitionDataset:
    """The dataset of a task, collected if it is not there."""
    sdw.collect(task, steps=TRANSITIONS, seed=0, progress=False)
    return sdw.load_dataset(task)


def teacher_path(task: str) -> Path:
    """Where the teacher of a task lies: hopper/medium's in the package, for the demo uses it."""
    folder = ROOT / ("sdw_fast/assets" if task == "hopper/medium" else "benchmarks/teachers")
    return folder / f"{task.replace('/', '-')}{'-teacher' * (task == 'hopper/medium')}.safetensors"


def teacher(task: str) -> sdw.Teacher:
    return sdw.Teacher.load(teacher_path(task))
