"""The inner loop as a distillation unrolls it: a narrow policy, T steps of behavior cloning, R sets side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sdw_fast import ops
from sdw_fast.config import DistillConfig
from sdw_fast.networks import initialization, orthogonal_parameters

SMOOTHING = 0.1  # share of equal probabilities that the start of discrete actions is mixed with


@dataclass(frozen=True)
class InnerLoop:
    """Behavior cloning with the settings of a distillation.

    Attributes:
        config: hidden, inner_width, fixed_initialization, gain, inner_steps, inner_momentum, window, tape and precision
            are read.
        states, actions: D and A, the policy's inputs and outputs.
        head: Of the policy, see `sdw_fast.ops.unrolled_bc`.
    """

    config: DistillConfig
    states: int
    actions: int
    head: str

    def free(self, targets: np.ndarray) -> np.ndarray:
        """What is optimized for targets: the logits of probabilities, mixed with equal ones to be finite."""
        if self.head != "softmax":
            return targets
        return np.log((1 - SMOOTHING) * targets + SMOOTHING / targets.shape[-1])

    def targets(self, free: Tensor) -> Tensor:
        """The targets of cloning, from what is optimized."""
        return torch.softmax(free, -1) if self.head == "softmax" else free

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Widths of the policy, from input to output."""
        return self.states, *self.config.unrolled_hidden, self.actions

    @cached_property
    def fixed(self) -> list[Tensor] | None:
        """The one θ_0 that sets are distilled for, with a leading dimension of 1; None where there are many."""
        seed = self.config.fixed_initialization
        return None if seed is None else initialization(self.sizes, gain=self.config.gain, seed=seed)

    @cached_property
    def _placed(self) -> dict[torch.device, list[Tensor]]:
        """The fixed θ_0 by device: once there it is not sent again."""
        return {}

    def initial(self, generators: Sequence[torch.Generator]) -> list[Tensor]:
        """Draws θ_0 for each of R sets, on its generator's device; a fixed one is copied and nothing is drawn."""
        if self.fixed is None:
            return orthogonal_parameters(self.sizes, gain=self.config.gain, generators=generators)
        device = generators[0].device
        if device not in self._placed:
            self._placed[device] = [parameter.to(device) for parameter in self.fixed]
        return [parameter.expand(len(generators), *parameter.shape[1:]).clone() for parameter in self._placed[device]]

    def initials(self, generators: Sequence[torch.Generator], count: int) -> list[list[Tensor]]:
        """The θ_0 of `count` policies of each set, to measure by; one where it is fixed."""
        return [self.initial(generators) for _ in range(count if self.fixed is None else 1)]

    def unroll(self, observations: Tensor, actions: Tensor, initial: Sequence[Tensor], lr: Tensor) -> list[Tensor]:
        """θ_T of cloning on the sets (R, N, D) and (R, N, A) from θ_0, with a step size for each, (R,)."""
        config = self.config
        return ops.unrolled_bc(
            observations,
            actions,
            initial,
            steps=config.inner_steps,
            lr=lr,
            momentum=config.inner_momentum,
            window=config.window,
            head=self.head,
            tape=config.tape,
            precision=config.precision,
        )

    def match(self, params: Sequence[Tensor], states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """The weighted matching loss H of each policy on its batch, (R,)."""
        return ops.behavior_matching(params, states, targets, weights, head=self.head, precision=self.config.precision)

    def loss(self, params: Sequence[Tensor], observations: Tensor, actions: Tensor) -> Tensor:
        """L_BC of each policy on its set, (R,), without a graph."""
        with torch.no_grad():
            return self.match(params, observations, actions, observations.new_ones(observations.shape[:2]))
