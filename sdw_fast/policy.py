"""The policy that behavior cloning trains: a deterministic tanh MLP on raw observations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sdw_fast import ops

if TYPE_CHECKING:
    from sdw_fast.synthetic import SyntheticDataset

# How a policy is cloned on a set that does not say it. `DistillConfig` has the same defaults under the same names.
CLONING: dict[str, Any] = {
    "hidden": (256, 256, 256),
    "gain": 1.0,
    "inner_steps": 100,
    "inner_lr": 0.1,
    "inner_momentum": 0.9,
}


def orthogonal_parameters(
    sizes: Sequence[int], *, gain: float, generator: torch.Generator | Sequence[torch.Generator]
) -> list[Tensor]:
    """Draws the parameters of an MLP: orthogonal weights times `gain`, zero biases (the papers' initialization).

    Args:
        sizes: Widths from input to output, e.g. (11, 256, 256, 256, 3); at least two.
        gain: Factor on every weight matrix, √2 in the papers.
        generator: Source of the draw; its device is the parameters' device. A sequence of R generators gives each
            parameter a leading dimension R, and row r of it what generator r alone would give (to rounding).

    Returns:
        [W1, b1, W2, b2, …] in nn.Linear layout, W (out, in) or (R, out, in), float32.
    """
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    device = generators[0].device
    shapes = [(max(pair), min(pair)) for pair in itertools.pairwise(sizes)]  # standing: rows ≥ columns
    draws = [[torch.randn(shape, generator=g, device=device) for shape in shapes] for g in generators]
    parameters = []
    for (fan_in, fan_out), *normal in zip(itertools.pairwise(sizes), *draws, strict=True):
        q = _orthonormal_columns(normal[0] if isinstance(generator, torch.Generator) else torch.stack(normal))
        weight = q if fan_out >= fan_in else q.mT
        parameters += [(gain * weight).contiguous(), torch.zeros(*q.shape[:-2], fan_out, device=device)]
    return parameters


def _orthonormal_columns(normal: Tensor) -> Tensor:
    """The Q of the QR decomposition whose R has a positive diagonal, of (…, m, n) normal numbers, m ≥ n.

    It is uniform over such matrices (Mezzadri 2007). On a GPU a Householder QR is a long chain of tiny kernels, matrix
    by matrix; Cholesky factors find the same Q in a few batched ones.
    """
    if normal.device.type != "cpu":
        return _cholesky_qr(normal)
    reflectors, tau = torch.geqrf(normal)  # QR in LAPACK's two halves: torch.linalg.qr takes twice as long
    q = torch.linalg.householder_product(reflectors, tau)
    return q * reflectors.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def _cholesky_qr(normal: Tensor) -> Tensor:
    """Q = X R⁻¹ with RᵀR = XᵀX, in float64, for forming XᵀX squares the condition number.

    That is about n for a square normal matrix, but may be anything: a ridge far below what matters keeps the first
    factorization from failing, and a second one makes exact what the ridge bent (shifted Cholesky QR, Fukaya et al.
    2020). Nothing is asked back from the device.
    """
    x = normal.double()
    for _ in range(2):
        gram = x.mT @ x
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal += 1e-14 * diagonal.sum(-1, keepdim=True)
        upper, _ = torch.linalg.cholesky_ex(gram, upper=True)  # cholesky would wait to see whether it succeeded
        x = torch.linalg.solve_triangular(upper, x, upper=True, left=False)
    return x.to(normal.dtype)


class MLPPolicy(nn.Module):
    """A deterministic policy: a = center + half · tanh(MLP((s − mean) / scale)), with ReLU between layers.

    Takes raw observations (B, D) or (D,), float32, in the environment's units; returns actions (B, A) or (A,) in the
    environment's units, inside the action bounds.

    Args:
        params: [W1, b1, W2, b2, …] in nn.Linear layout.
        mean, scale: Normalization of the observations, (D,).
        action_low, action_high: Action bounds, (A,).
    """

    mean: Tensor
    scale: Tensor
    action_center: Tensor
    action_half: Tensor

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        mean: np.ndarray,
        scale: np.ndarray,
        action_low: np.ndarray,
        action_high: np.ndarray,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for weight, bias in zip(params[0::2], params[1::2], strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
            linear.weight.data.copy_(weight.detach())
            linear.bias.data.copy_(bias.detach())
            layers += [linear, nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1], nn.Tanh())
        device = params[0].device
        low, high = (torch.as_tensor(bound, dtype=torch.float32, device=device) for bound in (action_low, action_high))
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32, device=device))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32, device=device))
        self.register_buffer("action_center", (high + low) / 2)
        self.register_buffer("action_half", (high - low) / 2)

    def forward(self, observations: Tensor) -> Tensor:
        return self.action_center + self.action_half * self.net((observations - self.mean) / self.scale)


def behavior_clone(
    synthetic: SyntheticDataset,
    *,
    steps: int | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    hidden: Sequence[int] | None = None,
    gain: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> MLPPolicy:
    """Trains a fresh policy on a synthetic set by full-batch gradient descent, as the distillation's inner loop did.

    L_BC(θ) = 1/(N·A) Σ_i ‖π_θ(s_i) − a_i‖², `steps` steps of SGD with momentum. What is not given is taken from the
    configuration the set was distilled with, and what that lacks from `DistillConfig`'s defaults.

    Args:
        synthetic: The synthetic set (or real pairs in the same shape).
        steps: Inner steps, `inner_steps` of the configuration.
        lr: Step size, `inner_lr` of the configuration.
        momentum: `inner_momentum` of the configuration; 0 where that has an inner_lr alone.
        hidden: Hidden widths.
        gain: Gain of the orthogonal initialization.
        seed: Seed of the initialization.
        device: Where to train.

    Returns:
        The policy, an nn.Module from raw observations to actions in the environment's units.

    Raises:
        FloatingPointError: training diverged (a parameter is not finite).
    """
    own = synthetic.config
    # A set distilled before there was momentum does not say that it was without.
    settings = CLONING | ({"inner_momentum": 0.0} if "inner_lr" in own else {}) | own
    widths = settings["hidden"] if hidden is None else hidden
    generator = torch.Generator(device).manual_seed(seed)
    sizes = (synthetic.observations.shape[1], *widths, synthetic.actions.shape[1])
    initial = orthogonal_parameters(sizes, gain=settings["gain"] if gain is None else gain, generator=generator)
    with torch.no_grad():
        params = ops.unrolled_bc(
            torch.as_tensor(synthetic.normalized_observations, device=device),
            torch.as_tensor(synthetic.normalized_actions, device=device),
            initial,
            steps=settings["inner_steps"] if steps is None else steps,
            lr=settings["inner_lr"] if lr is None else lr,
            momentum=settings["inner_momentum"] if momentum is None else momentum,
        )
    if not all(torch.isfinite(p).all() for p in params):
        raise FloatingPointError(
            "behavior cloning diverged: a parameter is not finite; lower lr (or inner_lr of the distillation)"
        )
    return MLPPolicy(
        params,
        mean=synthetic.normalizer.mean,
        scale=synthetic.normalizer.scale,
        action_low=synthetic.action_low,
        action_high=synthetic.action_high,
    )
