"""Step sizes that the inner loop bears: measured before the first outer step, and lowered where training turns rough.

Gradient descent with momentum μ is stable along a direction of curvature c up to the step size 2 (1 + μ) / c (heavy
ball, Polyak 1964). Curvature grows while a policy is cloned, up to that edge, so that θ_0 alone says little.

Before the first step: α is multiplied by 0.7 until cloning on the starting pairs, from four θ_0, has at θ_0 and at θ_T
a largest curvature of at most 0.6 of the edge's.

After every 25 outer steps: if more than a tenth of them were rough, α is multiplied by 0.7. A step is rough if its
loss or hypergradient is not finite, if its adjoint grew more than tenfold on its way back through the unroll, or if
cloning ended with a larger loss on the set than it began with. (On the locomotion tasks the adjoint shrinks.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdw_fast import ops
from sdw_fast.inner import InnerLoop

LOWER = 0.7  # what α is multiplied by
SHARE = 0.6  # of the stability bound that is used
LEAST = 0.01  # of the configured α: a run that wants less has another fault
WINDOW, ROUGH_SHARE, ROUGH_GROWTH = 25, 0.1, 10.0
INITIALIZATIONS, ITERATIONS = 4, 10  # θ_0 looked at, and steps of the power iteration


def largest_curvature(
    observations: Tensor, actions: Tensor, params: Sequence[Tensor], *, head: str = "tanh", iterations: int = ITERATIONS
) -> Tensor:
    """The largest curvature of behavior cloning's loss, |eigenvalue| of ∇²L_BC(θ), by power iteration.

    The adjoint of one plain step at α = 1 takes v to v − ∇²L_BC(θ) v: a product with the Hessian costs a step and its
    adjoint.

    Args:
        observations: (R, N, D), normalized.
        actions: (R, N, A), normalized.
        params: θ of R policies, each with a leading dimension R.
        head: Of the policies.
        iterations: Of the power iteration, from a fixed direction; ten come within a few percent, from below.

    Returns:
        (R,); NaN where θ is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(param.shape[1:], generator=generator).to(param).expand_as(param) for param in params]
    observations, actions = observations.detach(), actions.detach()
    theta = [param.detach().requires_grad_() for param in params]
    stepped = ops.unrolled_bc(observations, actions, theta, steps=1, lr=1.0, head=head, precision="ieee")
    norms = _norms(vector)
    for _ in range(iterations):
        unit = [part / norms.reshape(-1, *[1] * (part.ndim - 1)) for part in vector]
        adjoint = torch.autograd.grad(stepped, theta, unit, retain_graph=True)
        vector = [part - moved for part, moved in zip(unit, adjoint, strict=True)]
        norms = _norms(vector)
    return norms


def bearable_lr(loop: InnerLoop, observations: Tensor, actions: Tensor, seeds: Sequence[int]) -> list[float]:
    """The step size of each set before the first outer step, at most the configured one; see above.

    Args:
        loop: What is unrolled.
        observations, actions: The sets to start from, (R, N, D) and (R, N, A), normalized.
        seeds: Of the sets; they draw the initializations looked at.

    Raises:
        ValueError: no step size down to a hundredth of the configured one is borne.
    """
    config = loop.config
    bound = SHARE * 2 * (1 + config.inner_momentum)  # of α times curvature
    generators = [torch.Generator(observations.device).manual_seed(seed) for seed in seeds]
    initials = loop.initials(generators, INITIALIZATIONS)
    rates = torch.full((len(seeds),), config.inner_lr, dtype=torch.float64)

    def largest(policies: Sequence[Sequence[Tensor]]) -> Tensor:
        return (
            torch.stack([largest_curvature(observations, actions, p, head=loop.head) for p in policies])
            .amax(0)
            .double()
            .cpu()
        )

    start = largest(initials)
    while True:
        with torch.no_grad():
            ends = [loop.unroll(observations, actions, p, rates.to(observations)) for p in initials]
        borne = rates * torch.maximum(start, largest(ends)) <= bound  # NaN is not
        if borne.all():
            return rates.tolist()
        rates = torch.where(borne, rates, rates * LOWER)
        if rates.min() < LEAST * config.inner_lr:
            raise ValueError(
                f"behavior cloning on the starting pairs is unstable at inner_lr={config.inner_lr} and down to a "
                "hundredth of it: lower gain, or look for extreme states or actions in the dataset"
            )


def rough(losses: Tensor, norms: Tensor, growths: Tensor, inner_losses: tuple[Tensor, Tensor]) -> Tensor:
    """Whether a step was rough, (R,): by its loss, the norm of its hypergradient, the growth of its adjoint, and the
    loss of cloning at θ_0 and θ_T."""
    before, after = inner_losses
    return ~(losses.isfinite() & norms.isfinite() & (growths <= ROUGH_GROWTH) & (after <= before))


class Watch:
    """The step sizes of the inner loops of R sets, lowered where outer steps turn rough; see above.

    Args:
        rates: α of each set at the start.
        least: The smallest α.
        device: Of the tensors.
        batched: Whether warnings name the run.

    Attributes:
        rates: α of each set as it stands.
        tensor: The same as the op takes it, (R,).
        record: Whether each step since the last decision was rough, (R,) each.
    """

    def __init__(self, rates: Sequence[float], least: float, device: torch.device, *, batched: bool) -> None:
        self._least, self._device, self._batched = least, device, batched
        self.tensor = torch.empty(len(rates), device=device)
        self.load(rates, [])

    def load(self, rates: Sequence[float], record: Iterable[Tensor]) -> None:
        """Puts it where another one stood."""
        self.rates = [float(rate) for rate in rates]
        self.tensor.copy_(torch.tensor(self.rates))  # in place: a CUDA graph reads it there
        self.record = [row.to(self._device) for row in record]

    def state(self) -> dict[str, Any]:
        """What `load` takes: copies of plain values and a tensor (steps, R)."""
        none = torch.zeros(0, len(self.rates), dtype=torch.bool)
        record = torch.stack(self.record).cpu() if self.record else none
        return {"inner_lr": list(self.rates), "rough": record}

    def see(self, rough: Tensor, step: int) -> None:
        """Takes whether a step was rough, (R,); decides after every 25.

        Raises:
            FloatingPointError: α would fall below the least.

        Warns:
            UserWarning: the α of a set was lowered.
        """
        self.record.append(rough)
        if len(self.record) < WINDOW:
            return
        shares = torch.stack(self.record).float().mean(0).tolist()
        rates = [rate * LOWER if share > ROUGH_SHARE else rate for rate, share in zip(self.rates, shares, strict=True)]
        if min(rates) < self._least:
            raise FloatingPointError(
                f"inner training is unstable up to step {step}, although inner_lr is now {min(self.rates):.2g}: "
                "lower gain, lr or inner_steps, or set window (see docs: conditioning)"
            )
        tell_of(self.rates, rates, f"inner training was unstable in the steps up to {step}", batched=self._batched)
        self.load(rates, [])


def tell_of(before: Sequence[float], after: Sequence[float], why: str, *, batched: bool) -> None:
    """Warns of step sizes that were lowered, in a line each."""
    for run, (old, new) in enumerate(zip(before, after, strict=True)):
        if new < old:
            name = f" of run {run}" if batched else ""
            warnings.warn(f"inner_lr{name} was lowered from {old:.3g} to {new:.3g}: {why}", stacklevel=4)


def _norms(parts: Sequence[Tensor]) -> Tensor:
    """The norm of all parts together for each of R problems, (R,)."""
    return torch.stack([torch.linalg.vector_norm(part.flatten(1), dim=1) for part in parts]).norm(dim=0)
