"""The networks: a ReLU multilayer perceptron, twin critics, SAC's Gaussian actor, the orthogonal draw of parameters.

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

from sdw_fast.ops._backend import one_thread

_LOG_STD_BOUNDS = (-20.0, 2.0)


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


class GaussianPolicy(nn.Module):
    """A SAC actor: a ReLU MLP from raw observations to the mean and log-std of a Gaussian squashed by tanh.

    `forward` gives the mean action, so that it can be evaluated as it is; `sample` draws actions.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        """Makes the layers between the given widths: (D, hidden, ..., 2A)."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))

    def forward(self, observations: Tensor) -> Tensor:
        """Mean actions (B, A), in −1 to 1, of observations (B, D)."""
        mean, _ = self.moments(observations)
        return torch.tanh(mean)

    def sample(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Draws actions (B, A), in −1 to 1, for observations (B, D)."""
        mean, std = self.moments(observations)
        return torch.tanh(mean + std * torch.randn(mean.shape, generator=generator))

    def moments(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, A), before tanh, for observations (B, D)."""
        x = observations
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.relu(layer(x))
        mean, log_std = last(x).chunk(2, dim=-1)
        return mean, log_std.clamp(*_LOG_STD_BOUNDS).exp()


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
    normal = [torch.stack([torch.randn(shape, generator=g, device=device) for g in generators]) for shape in shapes]
    parameters = []
    for (fan_in, fan_out), q in zip(itertools.pairwise(sizes), _orthonormal_columns(normal), strict=True):
        weight = torch.empty(len(generators), fan_out, fan_in, device=device)
        torch.mul(q if fan_out >= fan_in else q.mT, gain, out=weight)
        parameters += [weight, torch.zeros(len(generators), fan_out, device=device)]
    return parameters


def initialization(sizes: Sequence[int], *, gain: float, seed: int) -> list[Tensor]:
    """The parameters of one MLP that a seed stands for, with a leading dimension of 1: drawn on the CPU, for other
    devices draw other numbers from the same seed. Otherwise as `orthogonal_parameters`."""
    return orthogonal_parameters(sizes, gain=gain, generators=[torch.Generator().manual_seed(seed)])


def _orthonormal_columns(layers: Sequence[Tensor]) -> list[Tensor]:
    """The Q of the QR decompositions whose R has a positive diagonal, of normal numbers (R, m, n) a layer, m ≥ n.

    It is uniform over such matrices (Mezzadri 2007). On a GPU a Householder QR is a long chain of tiny kernels, matrix
    by matrix; Cholesky factors find the same Q in a few batched ones.
    """
    if layers[0].device.type != "cpu":
        return batched_cholesky_qr(layers)
    found = []
    with one_thread():  # LAPACK's last bits depend on the number of threads, and more are no faster at such widths
        for normal in layers:
            reflectors, tau = torch.geqrf(normal)  # QR in LAPACK's two halves: torch.linalg.qr takes twice as long
            q = torch.linalg.householder_product(reflectors, tau)
            found.append(q * reflectors.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))
    return found


def batched_cholesky_qr(layers: Sequence[Tensor]) -> list[Tensor]:
    """`cholesky_qr` in float64 of layers (R, m, n), those of about one width n as one batch.

    What takes the time is the number of launches. Zeros fill a batch up: such columns stay zero, and the others become
    what they would be alone.
    """
    groups: dict[int, list[int]] = {}
    for number, normal in enumerate(layers):
        groups.setdefault(math.ceil(normal.shape[-1] / 32), []).append(number)
    found = list(layers)
    for numbers in groups.values():
        shape = [max(sizes) for sizes in zip(*(layers[number].shape for number in numbers), strict=True)]
        batch = torch.zeros(len(numbers), *shape, dtype=torch.float64, device=layers[0].device)
        for part, number in zip(batch, numbers, strict=True):
            _corner(part, layers[number]).copy_(layers[number])
        for q, number in zip(cholesky_qr(batch), numbers, strict=True):
            found[number] = _corner(q, layers[number])
    return found


def _corner(padded: Tensor, like: Tensor) -> Tensor:
    return padded[..., : like.shape[-2], : like.shape[-1]]


def cholesky_qr(normal: Tensor) -> Tensor:
    """Q = X R⁻¹ with RᵀR = XᵀX, in float64, for forming XᵀX squares the condition number.

    That is about n for a square matrix of standard normal numbers, but may be anything: a ridge far below what matters
    keeps the first factorization from failing, and a second one makes exact what the ridge bent (shifted Cholesky QR,
    Fukaya et al. 2020). Nothing is asked back from the device.
    """
    x = normal.double()
    rows, columns = x.shape[-2:]
    for trace in (rows * columns, columns):  # of XᵀX as expected, and of QᵀQ
        gram = x.mT @ x
        gram.diagonal(dim1=-2, dim2=-1).add_(1e-14 * trace)
        upper, _ = torch.linalg.cholesky_ex(gram, upper=True)  # cholesky would wait to see whether it succeeded
        x = torch.linalg.solve_triangular(upper, x, upper=True, left=False)
    return x.to(normal.dtype)
