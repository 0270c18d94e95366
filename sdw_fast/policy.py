"""The policy that behavior cloning trains: a deterministic MLP between an environment's units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdw_fast import ops
from sdw_fast.config import DistillConfig
from sdw_fast.networks import MLP, orthogonal_parameters
from sdw_fast.units import Discrete, Units

if TYPE_CHECKING:
    from sdw_fast.synthetic import SyntheticDataset


class MLPPolicy(nn.Module):
    """A deterministic policy: tanh(MLP(s)) on normalized states, with ReLU between layers.

    Takes observations (B, D) or (D,), float32, in the environment's units; returns actions (B, A) or (A,) in the
    environment's units, inside the action bounds. Of an environment with discrete actions MLP(s) are the logits of
    their probabilities, and it returns the numbers of the most probable, (B,) or () int64.

    Args:
        params: [W1, b1, W2, b2, …] in nn.Linear layout; copied.
        units: The environment's, with known action bounds.

    Raises:
        ValueError: the action bounds are not known.
    """

    def __init__(self, params: Sequence[Tensor], units: Units) -> None:
        super().__init__()
        self.net = MLP.of(params, tanh=units.head == "tanh")
        self.units = units
        self._actions = units.require_actions()

    def forward(self, observations: Tensor) -> Tensor:
        if isinstance(self._actions, Discrete):
            return self._actions.chosen(self.logits(observations))
        return self._actions.denormalize(self.net(self.units.states.normalize(observations)))

    def logits(self, observations: Tensor) -> Tensor:
        """The logits (…, n) of n discrete actions: their softmax is the policy's probabilities.

        Raises:
            ValueError: the actions are not discrete.
        """
        if not isinstance(self._actions, Discrete):
            raise ValueError("logits are those of discrete actions, and this policy's actions are not: call it instead")
        return self.net(self.units.states.normalize(observations))


def behavior_clone(
    synthetic: SyntheticDataset,
    *,
    hidden: Sequence[int] | None = None,
    gain: float | None = None,
    inner_steps: int | None = None,
    inner_lr: float | None = None,
    inner_momentum: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> MLPPolicy:
    """Trains a fresh policy on a synthetic set by full-batch gradient descent, as the distillation's inner loop did.

    L_BC(θ) = 1/(N·A) Σ_i ‖π_θ(s_i) − a_i‖², of discrete actions −1/N Σ_i Σ_j a_ij log π_θ(j | s_i), `inner_steps` steps
    of SGD with momentum. What is not given is taken from
    the configuration that the set was distilled with, and what that lacks from `DistillConfig`'s defaults.

    Args:
        synthetic: The synthetic set (or real pairs in the same shape).
        hidden: Hidden widths.
        gain: Gain of the orthogonal initialization.
        inner_steps: Steps.
        inner_lr: Step size.
        inner_momentum: Momentum.
        seed: Seed of the initialization.
        device: Where to train.

    Returns:
        The policy, an nn.Module from observations to actions in the environment's units.

    Raises:
        FloatingPointError: training diverged (a parameter is not finite).
    """
    given = {
        "hidden": hidden,
        "gain": gain,
        "inner_steps": inner_steps,
        "inner_lr": inner_lr,
        "inner_momentum": inner_momentum,
    }
    own = {name: synthetic.config[name] for name in given if name in synthetic.config}
    settings = DistillConfig.from_dict(own | {name: value for name, value in given.items() if value is not None})
    states, actions = (torch.as_tensor(x, device=device) for x in synthetic.normalized())
    generator = torch.Generator(device).manual_seed(seed)
    sizes = (states.shape[1], *settings.hidden, actions.shape[1])
    initial = orthogonal_parameters(sizes, gain=settings.gain, generators=[generator])
    with torch.no_grad():
        params = ops.unrolled_bc(
            states,
            actions,
            [parameter[0] for parameter in initial],
            steps=settings.inner_steps,
            lr=settings.inner_lr,
            momentum=settings.inner_momentum,
            head=synthetic.units.head,
        )
    if not all(torch.isfinite(p).all() for p in params):
        raise FloatingPointError(
            "behavior cloning diverged: a parameter is not finite; lower inner_lr, also of the distillation"
        )
    return MLPPolicy(params, synthetic.units)
