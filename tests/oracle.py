"""What the ops are compared with: plain autograd through the unrolled training of random problems, and brute force."""

import itertools
import math

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdw_fast.ops import unrolled_bc


def random_problem(widths, rows, seed, dtype=torch.float64, gain=1.4, head="tanh"):
    """observations, actions and params of an MLP with these widths, [D, hidden…, A]; softmax: rows add up to 1.5."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    observations = normal(rows, widths[0])
    actions = normal(rows, widths[-1])
    actions = 1.5 * torch.softmax(actions, 1) if head == "softmax" else torch.tanh(actions)
    params = []
    for fan_in, fan_out in itertools.pairwise(widths):
        params += [normal(fan_out, fan_in) * gain / math.sqrt(fan_in), 0.1 * normal(fan_out)]
    return observations, actions, params


def policy(params, observations: Tensor, head="tanh") -> Tensor:
    """The output of the policy; of softmax the logarithms of the probabilities."""
    h = observations
    for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
        h = torch.relu(torch.nn.functional.linear(h, weight, bias))
    z = torch.nn.functional.linear(h, params[-2], params[-1])
    return {"tanh": torch.tanh, "identity": lambda x: x, "softmax": lambda x: x.log_softmax(1)}[head](z)


def weighted_loss(params, observations, targets, weights, head="tanh"):
    output = policy(params, observations, head)
    if head == "softmax":
        return -(weights * (targets * output).sum(1)).sum() / len(targets)
    return (weights * (output - targets).square().sum(1)).sum() / targets.numel()


def autograd_unroll(observations, actions, params, steps, lr, momentum, window, head="tanh"):
    """The oracle: plain differentiation through the unrolled training. Returns θ_T and θ_{T-K}."""
    theta = start = list(params)
    velocity = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        if step == steps - window and step > 0:
            theta = start = [p.detach().requires_grad_() for p in theta]
            velocity = [u.detach() for u in velocity]
        loss = weighted_loss(theta, observations, actions, torch.ones_like(actions[:, 0]), head)
        gradients = torch.autograd.grad(loss, theta, create_graph=True)
        velocity = [momentum * u + lr * g for u, g in zip(velocity, gradients, strict=True)]
        theta = [p - u for p, u in zip(theta, velocity, strict=True)]
    return theta, start


def leaves(observations, actions, params, lr):
    return (
        observations.clone().requires_grad_(),
        actions.clone().requires_grad_(),
        [p.clone().requires_grad_() for p in params],
        torch.tensor(lr, dtype=observations.dtype, requires_grad=True),
    )


def hypergradient(unroll, observations, actions, params, lr, seed=1):
    """θ_T and the gradients (observations, actions, lr, params…) of a random linear outer loss of θ_T."""
    s, a, theta, alpha = leaves(observations, actions, params, lr)
    out, start = unroll(s, a, theta, alpha)
    generator = torch.Generator().manual_seed(seed)
    covectors = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in out]
    outer = sum((p * v).sum() for p, v in zip(out, covectors, strict=True))
    return [p.detach() for p in out], torch.autograd.grad(outer, [s, a, alpha, *(start or theta)])


def unroll(backend, steps, **options):
    return lambda s, a, theta, lr: (unrolled_bc(s, a, theta, steps=steps, lr=lr, backend=backend, **options), None)


def placed(kernel, observations, actions, params):
    return observations.to(kernel.device), actions.to(kernel.device), [p.to(kernel.device) for p in params]


def equal(one, other):
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(one, other, strict=True))


def relative_error(actual, expected) -> float:
    difference = math.sqrt(
        sum(((x.double().cpu() - y.double().cpu()) ** 2).sum().item() for x, y in zip(actual, expected, strict=True))
    )
    return difference / math.sqrt(sum((y.double() ** 2).sum().item() for y in expected))


def assert_agree(actual, expected, tolerance):
    """Compares (θ_T, gradients): every group to its own norm."""
    (theta, gradients), (theta_expected, gradients_expected) = actual, expected
    assert relative_error(theta, theta_expected) < tolerance
    for i in range(3):
        assert relative_error(gradients[i : i + 1], gradients_expected[i : i + 1]) < tolerance, i
    assert relative_error(gradients[3:], gradients_expected[3:]) < tolerance


def to_tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa, to nearest, in the dtype that it is in."""
    return ((x.float().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


class Tf32Products(TorchDispatchMode):
    """Matrix products of operands rounded to tf32, whatever the dtype they are in.

    The kernel's own trajectory includes which units its rounding switches off: near a kink, the exact product switches
    others, and the two adjoints differ by that, not by an error.
    """

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.PRODUCTS:
            args = (*args[:-2], *(to_tf32(operand) for operand in args[-2:]))
        return func(*args, **(kwargs or {}))


def brute_force(queries: np.ndarray, references: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances and indices: all differences in float64; a stable sort breaks ties by index."""
    points = queries if references is None else references
    x, y = queries.astype(np.float64), points.astype(np.float64)
    squared = np.zeros((len(x), len(y)))
    for d in range(x.shape[1]):
        squared += (x[:, None, d] - y[None, :, d]) ** 2
    if references is None:
        np.fill_diagonal(squared, np.inf)
    index = np.argsort(squared, 1, kind="stable")[:, :k]
    return np.take_along_axis(squared, index, 1), index


def surface(rows: int, dimension: int, seed: int) -> np.ndarray:
    """Points near a curved surface of dimension 3, as the states of a robot are."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((rows, 3)) @ rng.standard_normal((3, dimension))
    return (np.sin(latent) + 0.3 * latent + 0.02 * rng.standard_normal((rows, dimension))).astype(np.float32)
