"""`import sdw_fast` needs numpy and torch only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ABSENT = ["click", "faiss", "gymnasium", "h5py", "matplotlib", "minari", "mujoco", "pandas", "rich", "safetensors"]
ABSENT += ["scipy", "sklearn", "tensorboard", "tensordict", "torchrl", "tqdm", "typer", "zuko"]

WITHOUT_THE_OTHERS = f"""
import sys

sys.modules.update(dict.fromkeys({ABSENT}))  # None: as if not installed

import numpy as np
import torch
import sdw_fast as sdw

# The way from arrays to a policy needs no more.
states = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
data = sdw.load_dataset(
    {{"observations": states[:-1], "next_observations": states[1:], "actions": np.tanh(states[:-1, :1]),
      "rewards": np.zeros(59), "terminations": np.zeros(59, bool)}}
)
problem = sdw.outer_problem(data, None, sdw.DistillConfig(objective="dbc"))
policy = sdw.behavior_clone(sdw.real_pairs(data, 4), hidden=(8,), inner_steps=2)
assert policy(torch.from_numpy(states)).shape == (60, 1)
for name in sdw.__all__:
    getattr(sdw, name)
print("done", sdw.show_config("dicts")["faiss"])
"""


def test_import_needs_numpy_and_torch_only() -> None:
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_OTHERS], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == "done None", result.stderr
