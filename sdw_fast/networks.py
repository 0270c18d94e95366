"""The networks: a ReLU multilayer perceptron, twin critics made of two, and the orthogonal draw of its parameters.

A user's own networks are asked here too: in evaluation mode, where their weights lie. PyTorch's global random state is
touched by one thing only, `MLP(sizes)`, which draws its parameters from it as every module of PyTorch does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class MLP(nn.Sequential):
    """A ReLU network of linear layers; `sizes` holds the widths from input to output, `tanh` squashes the output."""

    def __init__(self, sizes: Sequence[int], *, tanh: bool) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        layers[-1:] = [nn.Tanh()] if tanh else []
        super().__init__(*layers)
        self.sizes = list(sizes)

    @classmethod
    def of(cls, params: Sequence[Tensor], *, tanh: bool) -> MLP:
        """The network with copies of these parameters, [W1, b1, W2, b2, …] in nn.Linear layout."""
        sizes = [params[0].shape[1], *(bias.shape[0] for bias in params[1::2])]
        names = [f"{2 * layer}.{kind}" for layer in range(len(sizes) - 1) for kind in ("weight", "bias")]
        return cls.from_state(sizes, dict(zip(names, (p.detach().clone() for p in params), strict=True)), tanh=tanh)

    @classmethod
    def from_state(cls, sizes: Sequence[int], state: Mapping[str, Tensor], *, tanh: bool) -> MLP:
        """The network that takes over the tensors of a state dict; no initialization is drawn.

        Raises:
            RuntimeError: the state dict is not of such a network.
        """
        with torch.device("meta"):
            network = cls(sizes, tanh=tanh)
        network.load_state_dict(state, assign=True)
        return network


class Linear(nn.Module):
    """Linear layers of E networks side by side: inputs (E, B, in) to outputs (E, B, out)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """Takes copies of the weights (E, out, in) and the biases (E, out)."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))


class MeanMLP(nn.Module):
    """The mean output of E ReLU networks of one shape, all computed in batched products.

    With head "tanh" outputs are those of tanh; with "softmax" probabilities, of whose mean it returns the logarithm.
    """

    def __init__(self, params: Sequence[Tensor], head: str) -> None:
        """Takes copies of [W1, b1, W2, b2, …], W (E, out, in), b (E, out)."""
        super().__init__()
        self.layers = nn.Sequential()
        for weight, bias in zip(params[::2], params[1::2], strict=True):
            self.layers.extend([Linear(weight, bias), nn.ReLU()])
        self.layers[-1] = nn.Tanh() if head == "tanh" else nn.LogSoftmax(dim=-1)
        self.logarithms = head == "softmax"
        self.sizes = [params[0].shape[2], *(bias.shape[1] for bias in params[1::2])]
        self.members = params[0].shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, D) to (…, A)."""
        h = x.reshape(-1, self.sizes[0]).expand(self.members, -1, -1)
        outputs = self.layers(h)
        mean = outputs.logsumexp(0) - math.log(self.members) if self.logarithms else outputs.mean(0)
        return mean.reshape(list(x.shape[:-1]) + self.sizes[-1:])


class MinCritic(nn.Module):
    """Q(s, a) = min_j Q_j(s, a), the pessimistic reading of twin critics (TD3, Fujimoto et al. 2018)."""

    def __init__(self, networks: Sequence[MLP]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Maps (B, D) normalized states and (B, A) actions to (B,) values."""
        inputs = torch.cat([states, actions], dim=-1)
        return torch.cat([network(inputs) for network in self.networks], dim=-1).amin(dim=-1)


@contextmanager
def evaluating(*functions: Callable[..., Any] | None) -> Iterator[None]:
    """Puts those that are modules, or methods of one, in evaluation mode, and every part of them back as it was.

    A network with dropout or batch norm answers differently in training mode, and changes its running statistics.
    """
    roots = [module for module in map(_module, functions) if module is not None]
    modes = {part: part.training for root in roots for part in root.modules()}
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def ask(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Calls a function of tensors, which a module, or a method of one, gets where its weights lie."""
    module = _module(function)
    weights = None if module is None else next(module.parameters(), None)
    return function(*(x if weights is None else x.to(weights.device) for x in inputs))


def _module(function: Callable[..., Any] | None) -> nn.Module | None:
    owner = getattr(function, "__self__", function)
    return owner if isinstance(owner, nn.Module) else None


def below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of a state dict under `name.`, with that prefix taken off."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def refuse_non_finite(networks: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where a network, named by its key, has weights that are NaN or infinite."""
    bad = [name for name, network in networks.items() if not all(p.isfinite().all() for p in network.parameters())]
    if bad:
        raise ValueError(f"weights of {', '.join(bad)} are NaN or infinite")


def orthogonal_parameters(sizes: Sequence[int], *, gain: float, generators: Sequence[torch.Generator]) -> list[Tensor]:
    """Draws the parameters of R MLPs: orthogonal weights times `gain`, zero biases (the papers' initialization).

    Args:
        sizes: Widths from input to output, e.g. (11, 256, 256, 256, 3); at least two.
        gain: Factor on every weight matrix, √2 in the papers.
        generators: R sources of the draws, on the parameters' device. Row r holds what generator r alone would give.

    Returns:
        [W1, b1, W2, b2, …] in nn.Linear layout with a leading dimension, W (R, out, in), b (R, out), float32.
    """
    device = generators[0].device
    shapes = [(max(pair), min(pair)) for pair in itertools.pairwise(sizes)]  # standing: rows ≥ columns
    draws = [[torch.randn(shape, generator=g, device=device) for shape in shapes] for g in generators]
    parameters = []
    for (fan_in, fan_out), *normal in zip(itertools.pairwise(sizes), *draws, strict=True):
        q = _orthonormal_columns(torch.stack(normal))
        weight = q if fan_out >= fan_in else q.mT
        parameters += [(gain * weight).contiguous(), torch.zeros(len(generators), fan_out, device=device)]
    return parameters


def _orthonormal_columns(normal: Tensor) -> Tensor:
    """The Q of the QR decomposition whose R has a positive diagonal, of (…, m, n) normal numbers, m ≥ n.

    It is uniform over such matrices (Mezzadri 2007). On a GPU a Householder QR is a long chain of tiny kernels, matrix
    by matrix; Cholesky factors find the same Q in a few batched ones.
    """
    if normal.device.type != "cpu":
        return cholesky_qr(normal)
    reflectors, tau = torch.geqrf(normal)  # QR in LAPACK's two halves: torch.linalg.qr takes twice as long
    q = torch.linalg.householder_product(reflectors, tau)
    return q * reflectors.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def cholesky_qr(normal: Tensor) -> Tensor:
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
