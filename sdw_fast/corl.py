"""CORL checkpoints (TD3+BC, IQL, CQL, Cal-QL) → networks. Nothing but tensors and plain containers is unpickled."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdw_fast.files import read_torch, reading
from sdw_fast.networks import MLP, MinCritic, below, refuse_non_finite
from sdw_fast.units import SCALE_FLOOR, Affine, Units

# CORL's one-number module, under the name that its training scripts pickle it with. The stand-in only receives the
# pickled attributes; nothing of it is used, because a multiplier of the log-std does not move the mean action.
_CORL_SCALAR = type("Scalar", (), {"__module__": "__main__"})


def parts_of_corl(path: str | os.PathLike[str], mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Teacher's arguments from a checkpoint; see `sdw_fast.teacher.Teacher.from_corl`."""
    path = Path(path)
    with reading(path, "CORL checkpoint", hint=" Only tensors and plain containers are ever unpickled"):
        with torch.serialization.safe_globals([_CORL_SCALAR, set]):  # a module holds a set; allowed from PyTorch 2.6 on
            checkpoint = read_torch(path)
        if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("actor"), Mapping):
            held = sorted(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
            raise ValueError(f"it has no state dict 'actor' (it holds {held})")
        actor, critics = _networks(checkpoint)
        refuse_non_finite({"the actor": actor, **{f"critic {i}": c for i, c in enumerate(critics, start=1)}})
    return {
        "actor": actor,
        "critic": MinCritic(critics) if critics else None,
        "units": Units(states=_state_map(mean, std, actor.sizes[0], path.name)),
        "provenance": {"source": "CORL checkpoint", "file": path.name},
    }


def _state_map(mean: Sequence[float], std: Sequence[float], width: int, name: str) -> Affine:
    """CORL's normalization of (width,) states, (s − mean) / (std + 1e-3), for the checkpoint of that name.

    Raises ValueError for other arrays.
    """
    center, spread = np.asarray(mean, dtype=np.float32), np.asarray(std, dtype=np.float32)
    if center.shape != (width,) or spread.shape != (width,):
        raise ValueError(
            f"{name} holds an actor of {width} state dimensions; mean and std must be ({width},) arrays, got "
            f"{center.shape} and {spread.shape}"
        )
    if not (np.isfinite(center).all() and np.isfinite(spread).all() and (spread >= 0).all()):
        raise ValueError("mean and std of the states must be finite, and std not negative")
    return Affine(center, spread + np.float32(SCALE_FLOOR))


def _networks(checkpoint: Mapping[str, Any]) -> tuple[MLP, list[MLP]]:
    """Actor and critics of a CORL checkpoint; a Gaussian actor becomes the network of its mean."""
    actor_state = checkpoint["actor"]
    if any(key.startswith("base_network.") for key in actor_state):  # CQL, Cal-QL: outputs (mean, log-std)
        layers = _linear_layers(below(actor_state, "base_network"))
        weight, bias = layers[-1]
        layers[-1] = weight[: len(weight) // 2], bias[: len(bias) // 2]
    elif any(key.startswith("net.") for key in actor_state):  # TD3+BC; IQL, whose log-std is a parameter beside the net
        layers = _linear_layers(below(actor_state, "net"))
    else:
        raise ValueError(
            "unknown actor layout: expected base_network.* (CQL, Cal-QL) or net.* (TD3+BC, IQL), got "
            f"{sorted(actor_state)}. Wrap such a network yourself: Teacher(actor=..., critic=...)"
        )
    actor = _mlp_of(layers, tanh=True)
    states = [checkpoint[key] for key in ("critic1", "critic_1", "critic2", "critic_2") if key in checkpoint]
    if "qf" in checkpoint:  # IQL keeps both critics in one module
        states = [below(checkpoint["qf"], name) for name in ("q1", "q2")]
    critics = [_mlp_of(_linear_layers(state), tanh=False) for state in states]
    inputs = actor.sizes[0] + actor.sizes[-1]
    for critic in critics:
        if critic.sizes[0] != inputs or critic.sizes[-1] != 1:
            raise ValueError(f"a critic maps {critic.sizes[0]} to {critic.sizes[-1]}, the actor asks for {inputs} to 1")
    return actor, critics


def _linear_layers(state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of the linear layers in a state dict, which keeps the order of the modules."""
    unknown = [key for key in state if not key.endswith((".weight", ".bias")) or state[key].ndim > 2]
    layers = [(state[key], state[f"{key.removesuffix('.weight')}.bias"]) for key in state if key.endswith(".weight")]
    if unknown or not layers or any(weight.ndim != 2 for weight, _ in layers):
        raise ValueError(f"expected linear layers only (ReLU between them), got {list(state)}")
    return layers


def _mlp_of(layers: Sequence[tuple[Tensor, Tensor]], *, tanh: bool) -> MLP:
    return MLP.of([tensor.float() for layer in layers for tensor in layer], tanh=tanh).requires_grad_(False)
