"""The policy that behavior cloning trains: the mean action of one or several tanh MLPs, between an environment's units.

A policy is an ordinary `nn.Module`: it is pickled, compiled, exported and scripted as any other.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdw_fast import ops
from sdw_fast.cards import Card, Shown, short_hash
from sdw_fast.config import DistillConfig, checked_seed
from sdw_fast.files import description_in, read_safetensors, reading, to_json, write_safetensors
from sdw_fast.networks import MeanMLP, initialization, orthogonal_parameters, refuse_non_finite
from sdw_fast.units import Discrete, Units

if TYPE_CHECKING:
    from sdw_fast.synthetic import SyntheticDataset

FORMAT = "sdw_fast.policy/1"
_OF_FIXED = ("fixed_initialization", "inner_width")  # settings of a set that tell what its one policy starts from


class MLPPolicy(Shown, nn.Module):
    """A deterministic policy: tanh(MLP(s)) on normalized states, with ReLU between layers; or the mean of E of them.

    Takes observations (…, D), float32, in the environment's units; returns actions (…, A) in the environment's units,
    inside the action bounds. Where actions are discrete MLP(s) are the logits of probabilities; it returns the numbers
    (…,) int64 of the most probable actions, by the mean of the members' probabilities. All members of an ensemble are
    computed in one batched product a layer.

    Args:
        params: [W1, b1, W2, b2, …] in nn.Linear layout, W (out, in) and b (out,), or those of E members with a leading
            dimension, W (E, out, in) and b (E, out); copied.
        units: The environment's, with known action bounds.
        provenance: Where the policy came from, any JSON-serializable dict; kept in the saved file.

    Attributes:
        net: The networks, from normalized states (…, D) to normalized actions (…, A), or to the logarithms of
            probabilities.
        units: The environment's. The module computes with the buffers made of them, which travel in its `state_dict`.
        members: E, 1 for a single policy.

    Raises:
        ValueError: the action bounds are not known.
    """

    __constants__ = ("discrete",)  # decides for torch.jit.script which buffers there are

    if TYPE_CHECKING:  # torch.jit.script would look up the names of their types
        state_offset: Tensor
        state_scale: Tensor
        action_offset: Tensor
        action_scale: Tensor

    def __init__(self, params: Sequence[Tensor], units: Units, *, provenance: dict[str, Any] | None = None) -> None:
        super().__init__()
        actions = units.require_actions()
        self.discrete = isinstance(actions, Discrete)
        self.first = actions.start if isinstance(actions, Discrete) else 0
        maps = {"state": units.states} if isinstance(actions, Discrete) else {"state": units.states, "action": actions}
        batched = params[0].ndim == 3
        self.net = MeanMLP([p if batched else p.unsqueeze(0) for p in params], units.head)
        for name, affine in maps.items():
            for part in ("offset", "scale"):
                constant = torch.as_tensor(getattr(affine, part), dtype=torch.float32, device=params[0].device)
                self.register_buffer(f"{name}_{part}", constant)
        self.units = units
        self.members = self.net.members
        self.provenance = dict(provenance or {})

    def forward(self, observations: Tensor) -> Tensor:
        outputs = self.net((observations - self.state_offset) / self.state_scale)
        if self.discrete:
            return outputs.argmax(-1) + self.first
        return outputs * self.action_scale + self.action_offset

    def logits(self, observations: Tensor) -> Tensor:
        """The logarithms (…, n) of the probabilities of n discrete actions.

        Raises:
            ValueError: the actions are not discrete.
        """
        if not self.discrete:
            raise ValueError("logits are those of discrete actions, and this policy's actions are not: call it instead")
        return self.net((observations - self.state_offset) / self.state_scale)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the policy as `.safetensors`, whole or not at all: `state_dict()` in float32, and what it is.

        Tensors: net.layers.{0, 2, …}.weight (E, out, in) and .bias (E, out), state_offset, state_scale, and, unless
        actions are discrete, action_offset, action_scale. Units, sizes and provenance are in the metadata.
        docs/howto/deploy.md runs a policy from such a file with NumPy alone.

        Returns:
            The path written.
        """
        description = {
            "format": FORMAT,
            "sizes": self.net.sizes,
            "members": self.members,
            "activations": {"hidden": "relu", "output": self.units.head, "members": "mean"},
            "units": self.units.to_dict(),
            "provenance": self.provenance,
        }
        tensors = {name: x.detach().to("cpu", torch.float32).contiguous() for name, x in self.state_dict().items()}
        write_safetensors(path, tensors, {"policy": to_json(description)})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MLPPolicy:
        """Reads a policy that `save` wrote; nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or holds something other than a policy with finite weights.
        """
        path = Path(path)
        with reading(path, "policy file"):
            tensors, metadata = read_safetensors(path)
            description = description_in(metadata, "policy", "MLPPolicy.save", FORMAT)
            layers = range(0, 2 * len(description["sizes"]) - 2, 2)
            params = [tensors[f"net.layers.{i}.{kind}"] for i in layers for kind in ("weight", "bias")]
            policy = cls(params, Units.from_dict(description["units"]), provenance=description["provenance"])
            policy.load_state_dict(tensors)
            if policy.net.sizes != description["sizes"] or policy.members != description["members"]:
                raise ValueError(f"its networks are not of the sizes {description['sizes']} that it says")
            refuse_non_finite({"policy": policy})
        return policy

    def card(self) -> Card:
        """What the policy is, for people."""
        return Card(
            "MLPPolicy",
            {
                "environment": self.units.env_id,
                "layers": " → ".join(map(str, self.net.sizes)),
                "members": self.members,
                "parameters": sum(p.numel() for p in self.parameters()),
                "hash": short_hash(*(x.detach().cpu().numpy() for x in self.state_dict().values())),
            },
        )


def behavior_clone(
    synthetic: SyntheticDataset,
    *,
    ensemble: int = 1,
    hidden: Sequence[int] | None = None,
    gain: float | None = None,
    inner_steps: int | None = None,
    inner_lr: float | None = None,
    inner_momentum: float | None = None,
    seed: int | None = None,
    device: str | torch.device = "cpu",
) -> MLPPolicy:
    """Trains a fresh policy on a synthetic set by full-batch gradient descent, as the distillation's inner loop did.

    L_BC(θ) = 1/(N·A) Σ_i ‖π_θ(s_i) − a_i‖², of discrete actions −1/N Σ_i Σ_j a_ij log π_θ(j | s_i), `inner_steps` steps
    of SGD with momentum. What is not given is taken from the configuration that the set was distilled with, and what
    that lacks from `DistillConfig`'s defaults.

    A set that was distilled for one initialization (`DistillConfig.fixed_initialization`) gives one policy, of the
    width that was unrolled: cloned from any other it is worth nothing.

    Args:
        synthetic: The synthetic set (or real pairs in the same shape).
        ensemble: E: train E policies side by side, from the seeds seed, seed + 1, …, and return their mean action as
            one policy. It returns more than its members, and varies less (docs/results.md).
        hidden: Hidden widths.
        gain: Gain of the orthogonal initialization.
        inner_steps: Steps.
        inner_lr: Step size.
        inner_momentum: Momentum.
        seed: Seed of the initialization; default: that of the one initialization that the set was distilled for, or 0.
        device: Where to train.

    Returns:
        The policy, an nn.Module from observations to actions in the environment's units.

    Raises:
        ValueError: ensemble is below 1, a setting is out of range, or the set was distilled for one initialization and
            ensemble, hidden, gain or seed would change it.
        FloatingPointError: training diverged (a parameter is not finite).
    """
    if ensemble < 1:
        raise ValueError(f"ensemble must be at least 1 policy, got {ensemble}")
    given = {
        "hidden": hidden,
        "gain": gain,
        "inner_steps": inner_steps,
        "inner_lr": inner_lr,
        "inner_momentum": inner_momentum,
    }
    known = DistillConfig.from_dict({n: synthetic.config[n] for n in (*given, *_OF_FIXED) if n in synthetic.config})
    fixed = known.fixed_initialization
    if fixed is not None:
        known = dataclasses.replace(known, hidden=known.unrolled_hidden)
        _refuse_other_start(known, ensemble=ensemble, hidden=hidden, gain=gain, seed=seed)
    settings = DistillConfig.from_dict({**known.to_dict(), **{n: v for n, v in given.items() if v is not None}})
    seed = checked_seed("seed", (fixed or 0) if seed is None else seed)
    states, actions = (torch.as_tensor(x, device=device) for x in synthetic.normalized())
    sizes = (states.shape[1], *settings.hidden, actions.shape[1])
    if fixed is None:
        generators = [torch.Generator(device).manual_seed(seed + member) for member in range(ensemble)]
        initial = orthogonal_parameters(sizes, gain=settings.gain, generators=generators)
    else:
        initial = [parameter.to(device) for parameter in initialization(sizes, gain=settings.gain, seed=fixed)]
    with torch.no_grad():
        params = ops.unrolled_bc(
            states.repeat(ensemble, 1, 1),
            actions.repeat(ensemble, 1, 1),
            initial,
            steps=settings.inner_steps,
            lr=settings.inner_lr,
            momentum=settings.inner_momentum,
            head=synthetic.units.head,
        )
    if not all(torch.isfinite(p).all() for p in params):
        raise FloatingPointError(
            "behavior cloning diverged: a parameter is not finite; lower inner_lr, also of the distillation"
        )
    trained = {"dataset": synthetic.dataset_name, "seed": seed, "settings": {n: settings.to_dict()[n] for n in given}}
    return MLPPolicy(params, synthetic.units, provenance=trained)


def _refuse_other_start(known: DistillConfig, **given: Any) -> None:
    """Raises ValueError where what is given would start from another θ_0 than the one that a set was distilled for."""
    start = {"ensemble": 1, "hidden": known.hidden, "gain": known.gain, "seed": known.fixed_initialization}
    asked = {**given, "hidden": given["hidden"] and tuple(given["hidden"])}
    changed = [name for name, value in asked.items() if value is not None and value != start[name]]
    if changed:
        raise ValueError(
            f"the set was distilled for one initialization, that of seed {known.fixed_initialization}, hidden widths "
            f"{known.hidden} and gain {known.gain}, and is worth nothing from others: leave {', '.join(changed)} out"
        )
