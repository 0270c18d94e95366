"""What every peer computes, in plain PyTorch and JAX: the papers' policy, its two losses, and inputs to feed them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import Unavailable


@dataclass(frozen=True)
class Problem:
    """One outer step: the papers' shapes (HalfCheetah's 17 states and 6 actions) unless told otherwise."""

    size: int = 256  # N, rows of the synthetic set
    state: int = 17
    action: int = 6
    hidden: tuple[int, ...] = (256, 256, 256)
    steps: int = 100  # T, inner steps
    batch: int = 2_560  # M, states of the outer loss
    lr: float = 0.1
    dtype: torch.dtype = torch.float32
    seed: int = 0
    device: str = "cpu"

    def normal(self, *shape: int, stream: int = 0) -> Tensor:
        """Standard normal numbers; each `stream` of the seed is its own sequence.

        The same on every device up to a few million; more are drawn where they are wanted.
        """
        if self.device != "cpu" and math.prod(shape) > 1 << 22:
            generator = torch.Generator(self.device).manual_seed(self.seed * 10 + stream)
            return torch.randn(*shape, generator=generator, dtype=self.dtype, device=self.device)
        generator = torch.Generator().manual_seed(self.seed * 10 + stream)
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of every layer."""
        return list(pairwise([self.state, *self.hidden, self.action]))

    @cached_property
    def params(self) -> list[Tensor]:
        """[W1, b1, W2, b2, …], W (out, in): orthogonal with gain √2, zero biases."""
        generator = torch.Generator().manual_seed(self.seed)
        params = []
        for fan_in, fan_out in self.layers:
            weight = torch.nn.init.orthogonal_(torch.empty(fan_out, fan_in), 2**0.5, generator=generator)
            params += [weight.to(self.device, self.dtype), torch.zeros(fan_out, dtype=self.dtype, device=self.device)]
        return params

    @cached_property
    def synthetic(self) -> tuple[Tensor, Tensor]:
        """Observations (N, D) and actions (N, A) of the synthetic set."""
        return self.normal(self.size, self.state, stream=1), self.normal(self.size, self.action, stream=2).tanh()

    @cached_property
    def outer(self) -> tuple[Tensor, Tensor, Tensor]:
        """States (M, D), targets (M, A), weights (M,) with mean near 1."""
        states, targets = self.normal(self.batch, self.state, stream=3), self.normal(self.batch, self.action, stream=4)
        return states, targets.tanh_(), torch.exp(0.5 * self.normal(self.batch, stream=5) - 0.125)


def mlp(params: Sequence[Tensor], x: Tensor) -> Tensor:
    """tanh(MLP(x)) with ReLU between the layers."""
    *hidden, (weight, bias) = zip(params[::2], params[1::2], strict=True)
    for w, b in hidden:
        x = F.relu(F.linear(x, w, b))
    return torch.tanh(F.linear(x, weight, bias))


def bc_loss(params: Sequence[Tensor], observations: Tensor, actions: Tensor) -> Tensor:
    """Σ ‖π(s_i) − a_i‖² / (N·A): the inner loss."""
    return F.mse_loss(mlp(params, observations), actions)


def weighted_loss(pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Σ w_i ‖pred_i − target_i‖² / (M·A): the outer loss on predictions."""
    return (weights[:, None] * (pred - target).square()).mean()


def jax_functions() -> tuple[Any, Any, Any]:
    """The same three functions (mlp, bc_loss, weighted_loss) for JAX; ImportError without it."""
    import jax
    import jax.numpy as jnp

    def jax_mlp(params: Any, x: Any) -> Any:
        for i in range(0, len(params) - 2, 2):
            x = jax.nn.relu(x @ params[i].T + params[i + 1])
        return jnp.tanh(x @ params[-2].T + params[-1])

    def jax_bc_loss(params: Any, observations: Any, actions: Any) -> Any:
        return jnp.mean((jax_mlp(params, observations) - actions) ** 2)

    def jax_weighted_loss(pred: Any, target: Any, weights: Any) -> Any:
        return jnp.mean(weights[:, None] * (pred - target) ** 2)

    return jax_mlp, jax_bc_loss, jax_weighted_loss


def to_jax(tensors: Sequence[Tensor]) -> list[Any]:
    """Copies tensors into arrays on JAX's first device, which must be of the tensors' kind (else Unavailable)."""
    import jax

    device = jax.devices()[0]
    wanted = "gpu" if tensors[0].is_cuda else "cpu"
    if device.platform != wanted:
        raise Unavailable(f"this JAX computes on the {device.platform}, not on the {wanted}")
    return [jax.device_put(tensor.cpu().numpy(), device) for tensor in tensors]


def arrays(result: Any) -> list[np.ndarray]:
    """Flattens what a contender returned (tensors or JAX arrays, nested) into float64 NumPy arrays, for comparison."""
    if isinstance(result, (list, tuple)):
        return [array for item in result for array in arrays(item)]
    if isinstance(result, Tensor):
        result = result.detach().cpu().numpy()
    return [np.asarray(result, dtype=np.float64)]


Product = tuple[Tensor, Tensor, Tensor]


def product(problem: Problem, m: int, k: int, n: int, left: str = "n", right: str = "n") -> Product:
    """Operands (m, k), (k, n), each plain ("n") or a transposed view ("t"), and the buffer of their product."""
    a = problem.normal(m, k) if left == "n" else problem.normal(k, m).t()
    b = problem.normal(k, n) if right == "n" else problem.normal(n, k).t()
    return a, b, a.new_empty(m, n)


def gradient_products(problem: Problem, rows: int) -> list[Product]:
    """The products of one forward and backward pass for the parameters' gradient."""
    forward = [product(problem, rows, i, o) for i, o in problem.layers]
    backward = [product(problem, rows, o, i, right="t") for i, o in problem.layers[1:]]
    return forward + backward + [product(problem, i, rows, o, left="t") for i, o in problem.layers]


def multiply(products: Sequence[Product]) -> Callable[[], None]:
    """Returns the call that computes all products with torch.mm."""

    def run() -> None:
        for a, b, out in products:
            torch.mm(a, b, out=out)

    return run


def cuda_graph(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Returns the replay of a call captured as a CUDA graph; its results lie in the same tensors every time."""
    if not device.startswith("cuda"):
        raise Unavailable("CUDA graphs need a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries make their workspaces before the capture
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def compiles(run: Callable[[], Any]) -> Callable[[], Any]:
    """Returns run after a first call; whatever torch.compile refuses makes the contender unavailable."""
    try:
        run()
    except Exception as error:  # the compiler's errors share no base class with a narrower meaning
        raise Unavailable(f"torch.compile: {type(error).__name__}: {error}") from error
    return run
