"""State densities and the weights made of them: log-densities, density weights, effective sample size.

Everything here works on whatever coordinates it is given, and distances mean something only where the coordinates have
one scale: pass normalized states. `log_density`, which takes a `TransitionDataset`, normalizes by itself.

Tensors are worked on where they lie. Log-densities come back as the states went in: a NumPy array for an array, a
tensor on the same device for a tensor.
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdw_fast.arrays import real_numbers
from sdw_fast.config import checked_seed
from sdw_fast.data import TransitionDataset
from sdw_fast.files import computed_once
from sdw_fast.neighbors import (
    Reduce,
    States,
    dataset_neighbor_distances,
    floored_radius,
    here,
    intrinsic_dimension,
    like,
    neighbor_distances,
    states_of,
    varying_columns,
)
from sdw_fast.progress import progress_bar


def knn_log_density(
    observations: States,
    k: int = 10,
    *,
    dimension: str | float = "ambient",
    references: int | States | None = None,
    seed: int = 0,
    backend: str = "auto",
    progress: bool = False,
) -> States:
    """k-nearest-neighbor log-density of every state, leave-one-out.

        log d(s) = log k − log n − log V_m − m · log r_k(s)        (Loftsgaarden & Quesenberry, 1965)

    with r_k(s) the distance to the k-th neighbor, n the number of states searched (M − 1: the state itself is left
    out by its index, a duplicate of it is not), m the dimension and V_m the volume of the unit ball in m dimensions.
    A distance of zero (a state with k or more duplicates) counts as half the smallest positive r_k, so that such
    states are the densest, by a finite amount.

    Args:
        observations: (M, D) array or tensor of any real numbers up to float64, normalized.
        k: neighbors; more is smoother. 1 ≤ k < M.
        dimension: m. "ambient": the number of columns that vary. "intrinsic": estimated from the same neighbors by
            `estimate_dimension` (k ≥ 2). Or a positive number. It scales the spread of the log-densities and leaves
            their order alone; weights chosen by effective sample size do not depend on it.
        references: the states among which neighbors are searched. None: the observations. A number R: a random subset
            of the observations, without replacement, each member of it still left out of its own neighborhood.
            An (R, D) array or tensor, as the observations are: other states; nothing is left out.
        seed: of the random subset.
        backend: of `sdw_fast.ops.knn`.
        progress: show a bar.

    Returns:
        (M,) float64 natural logarithms, of the kind and device of `observations`.

    Raises:
        ValueError: wrong shape, masked, NaN or infinite values, integers from 2^53 on, k out of range, or every state
            has k duplicates.
        TypeError: the observations are not real numbers, or a tensor that is not dense.
    """
    states = states_of(observations, "observations")
    distances, searched = neighbor_distances(states, k, references, seed=seed, backend=backend, progress=progress)
    return like(log_density_at(distances, searched, varying_columns(states), dimension), observations)


def flow_log_density(
    observations: States,
    *,
    transforms: int = 5,
    hidden: tuple[int, ...] = (128, 128),
    batch_size: int = 512,
    learning_rate: float = 3e-3,
    max_epochs: int = 100,
    patience: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> States:
    """Log-density of every state under a masked autoregressive flow (Papamakarios et al., 2017) fitted to the states.

    Adam with gradients clipped to norm 1, on minibatches of nine tenths of the states; the parameters of the epoch
    with the highest mean log-density on the held-out tenth are kept, and training ends when it has not risen for
    `patience` epochs. Columns are standardized (the log-densities are those of the given coordinates all the same);
    constant ones are left out, as they are no dimension.

    Args:
        observations: (M, D) array or tensor, normalized; a tensor is worked on where it lies.
        transforms: autoregressive layers, each in the reverse order of the one before.
        hidden: widths of the network of each layer.
        batch_size: states a step.
        learning_rate: Adam's.
        max_epochs: at most so many passes over the states.
        patience: epochs without improvement to end after.
        seed: of the initialization, the split and the order; same seed, same machine, same log-densities.
        progress: show a bar.

    Returns:
        (M,) float64 natural logarithms, of the kind and device of `observations`.

    Raises:
        ImportError: zuko is not installed.
        ValueError: wrong shape, fewer than 10 states, NaN or infinite values, no column varies, or training diverged.
    """
    try:
        import zuko
    except ImportError as error:
        raise ImportError('flow_log_density needs zuko: pip install "sdw_fast[flow]"') from error
    x, log_volume = _standardized(states_of(observations, "observations"))
    if len(x) < 10:
        raise ValueError(f"a flow needs at least 10 states (one in ten is held out), got {len(x)}")
    seed = checked_seed("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # zuko initializes from PyTorch's global generator
        torch.manual_seed(seed)
        flow = zuko.flows.MAF(x.shape[1], transforms=transforms, hidden_features=hidden).to(x.device)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    _fit_flow(
        flow, x[order[len(x) // 10 :]], x[order[: len(x) // 10]], batch_size, learning_rate, max_epochs, patience,
        generator, progress,
    )  # fmt: skip
    return like(_flow_log_prob(flow, x).double() - log_volume, observations)


def log_density(data: TransitionDataset, method: str = "knn", *, progress: bool = False, **options: Any) -> np.ndarray:
    """Log-density of every state of a dataset, on normalized states, with the costly part computed once.

    It is kept in a folder `.sdw_cache` in the folder of `data.path`, with one file for each content hash and choice of
    options. A file that does not fit is computed again; a folder that cannot be written is no error; for a dataset
    without a path nothing is kept.

    Args:
        data: the dataset, of M transitions.
        method: "knn" or "flow".
        progress: show a bar.
        **options: those of `knn_log_density` (`references` as a number only) or `flow_log_density`.

    Returns:
        (M,) float64 array of natural logarithms.

    Raises:
        ValueError: unknown method, or as the method's own function.
    """
    if method == "knn":
        dimension = options.pop("dimension", "ambient")
        distances, searched = dataset_neighbor_distances(data, options.pop("k", 10), progress=progress, **options)
        extremes = np.stack([data.observations.min(axis=0), data.observations.max(axis=0)])
        columns = varying_columns(torch.from_numpy(data.units.states.normalize(extremes)))
        return log_density_at(distances, searched, columns, dimension).numpy()
    if method != "flow":
        raise ValueError(f"method must be 'knn' or 'flow', got {method!r}")

    call = inspect.signature(flow_log_density).bind_partial(progress=progress, **options)

    def compute() -> dict[str, Any]:
        return {"logd": flow_log_density(data.normalized_observations(), **call.arguments)}

    given = call.arguments.copy()
    call.apply_defaults()  # into the key: a default that changes must not find what the old one computed
    chosen = sorted((name, value) for name, value in call.arguments.items() if name not in ("observations", "progress"))
    call.arguments = given
    return computed_once(data.path, f"flow {data.content_hash} {chosen}", compute, {"logd": (len(data),)})["logd"]


@dataclass(frozen=True)
class DensityWeights:
    """Density weights with what one should know before using them.

    Attributes:
        weights: (M,) float32, positive, mean 1.
        tau: the exponent τ, given or found.
        effective_sample_size: Kish's, as a fraction of M.
        largest: the largest weight; the mean is 1.
        rarest_share: share of the total weight that the rarest 1% of the states carry.
        clipped: number of states whose weight was lowered to the quantile.
    """

    weights: np.ndarray
    tau: float
    effective_sample_size: float
    largest: float
    rarest_share: float
    clipped: int

    def to_dict(self) -> dict[str, float | int]:
        """The report without the weights; plain numbers, JSON-serializable."""
        report = asdict(self)
        del report["weights"]
        return report


def density_weights(
    logd: States, *, tau: float | None = None, ess: float | None = None, clip: float = 0.99
) -> DensityWeights:
    """Weights that fall with the density, w(s) ∝ d(s)^(−τ), tamed and reported.

        w = exp(−τ · (log d − median)), clipped from above at its quantile `clip`, scaled to mean 1.

    As w falls with log d, the clip equals a floor under log d at its quantile 1 − clip, whatever τ. On the floored
    values the effective sample size is exp(2K(τ) − K(2τ)) with K the cumulant function of −log d, which is convex:
    it never rises with τ, and `ess` determines τ by bisection.

    Args:
        logd: (M,) log-densities.
        tau: exponent τ ≥ 0; 0 gives equal weights. Exactly one of tau and ess is given.
        ess: the effective sample size wanted, a fraction of M in (0, 1].
        clip: quantile in (0, 1]; 1 clips nothing.

    Raises:
        ValueError: both or none of tau and ess, one out of range, an ess that no τ reaches, NaN or infinite values.
    """
    values = _array("logd", logd)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"logd must have shape (M,) with M >= 1, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"logd has {np.count_nonzero(~np.isfinite(values))} NaN or infinite values")
    if (tau is None) == (ess is None):
        raise ValueError(f"give exactly one of tau and ess, got tau={tau} and ess={ess}")
    if not 0 < clip <= 1:
        raise ValueError(f"clip is a quantile and must lie in (0, 1], got {clip}")

    floor = np.quantile(values, 1 - clip)
    rarity = floor - np.maximum(values, floor)  # (M,) ≤ 0, highest where rarest: no exponential of it overflows
    if tau is None:
        assert ess is not None
        tau = _tau_for(ess, rarity, clip)
    elif not (tau >= 0 and math.isfinite(tau)):
        raise ValueError(f"tau must be a finite number >= 0, got {tau}")

    weights = np.exp(tau * rarity)
    weights /= weights.mean()
    rarest = np.argsort(values, kind="stable")[: math.ceil(values.size / 100)]
    return DensityWeights(
        weights=weights.astype(np.float32),
        tau=float(tau),
        effective_sample_size=effective_sample_size(weights),
        largest=float(weights.max()),
        rarest_share=float(weights[rarest].sum() / weights.sum()),
        clipped=int(np.count_nonzero(values < floor)),
    )


def effective_sample_size(weights: States) -> float:
    """Kish's effective sample size as a fraction of the number of weights: (Σw)² / (M Σw²), in [1/M, 1].

    Args:
        weights: (M,) nonnegative weights of any scale.

    Raises:
        ValueError: no weights, all zero, negative, NaN or infinite ones.
    """
    w = _array("weights", weights)
    if w.ndim != 1 or w.size == 0:
        raise ValueError(f"weights must have shape (M,) with M >= 1, got {w.shape}")
    if not (np.isfinite(w).all() and (w >= 0).all() and w.any()):
        raise ValueError("weights must be finite, nonnegative and not all zero")
    w /= w.max()
    return float(w.sum() ** 2 / (w.size * np.square(w).sum()))


def _tau_for(ess: float, rarity: np.ndarray, clip: float) -> float:
    """The τ whose weights exp(τ · rarity) have this effective sample size, to a relative 1e-9 of τ."""
    if not 0 < ess <= 1:
        raise ValueError(f"ess is a fraction of the states and must lie in (0, 1], got {ess}")
    if ess == 1:
        return 0.0
    smallest = np.count_nonzero(rarity == 0) / rarity.size  # τ → ∞ leaves the states at the floor, equally weighted
    if ess <= smallest:
        raise ValueError(
            f"no tau reaches ess={ess}: with clip={clip} the effective sample size stays above {smallest:.4g}; "
            "ask for more, or raise clip"
        )

    def reached(tau: float) -> float:
        return effective_sample_size(np.exp(tau * rarity))

    low, high = 0.0, 1.0
    while reached(high) > ess:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) > ess else (low, middle)
    return high


def _standardized(states: Tensor) -> tuple[Tensor, float]:
    """The varying columns with mean 0 and deviation 1, float32, and log |∂s/∂x| of that change of variables."""
    x = states.double()
    if len(x) < 2:
        raise ValueError("one state has no density: give at least 2")
    x = x[:, (x != x[0]).any(dim=0)]
    if x.shape[1] == 0:
        raise ValueError("all states are equal, so they have no density")
    deviation = x.std(dim=0)
    return ((x - x.mean(dim=0)) / deviation).float(), float(deviation.log().sum())


def _fit_flow(
    flow: Any,
    training: Tensor,
    held_out: Tensor,
    batch_size: int,
    learning_rate: float,
    max_epochs: int,
    patience: int,
    generator: torch.Generator,
    progress: bool,
) -> None:
    """Fits in place by maximum likelihood and leaves the parameters of the best epoch."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate)
    best, best_epoch, best_state = -math.inf, -1, None
    with progress_bar(range(max_epochs), desc="flow", unit="epoch", show=progress) as bar:
        for epoch in bar:
            for rows in torch.randperm(len(training), generator=generator).split(batch_size):
                loss = -flow().log_prob(training[rows.to(training.device)]).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
                optimizer.step()
            reached = float(_flow_log_prob(flow, held_out).mean())
            bar.set_postfix(held_out=f"{reached:.3f}", best=f"{max(best, reached):.3f}")
            if reached > best:
                best, best_epoch, best_state = reached, epoch, copy.deepcopy(flow.state_dict())
            elif epoch - best_epoch >= patience:
                break
    if best_state is None:
        raise ValueError("the flow's training diverged: no epoch had a finite log-density; lower learning_rate")
    flow.load_state_dict(best_state)


@torch.no_grad()
def _flow_log_prob(flow: Any, x: Tensor) -> Tensor:
    return torch.cat([flow().log_prob(block) for block in x.split(1 << 14)])


def log_density_at(
    distances: Tensor, searched: Tensor | int, columns: int, dimension: str | float, total: Reduce = here
) -> Tensor:
    """Log-densities (M,) from (M, k) neighbor distances found among `searched` states in `columns` varying columns.

    `total` makes the sum or the minimum over the states here one over the states of all ranks.
    """
    k = distances.shape[1]
    radius = floored_radius(distances, total)
    if dimension == "ambient":
        m = float(columns)
    elif dimension == "intrinsic":
        m = intrinsic_dimension(distances, total)
    elif not isinstance(dimension, str) and dimension > 0 and math.isfinite(dimension):
        m = float(dimension)
    else:
        raise ValueError(f"dimension must be 'ambient', 'intrinsic' or a positive number, got {dimension!r}")
    log_searched = torch.as_tensor(searched, dtype=torch.float64, device=distances.device).log()
    return math.log(k) - log_searched - log_unit_ball(m) - m * radius.log()


def log_unit_ball(m: float) -> float:
    """log V_m, the volume of the unit ball in m dimensions (m need not be whole)."""
    return m / 2 * math.log(math.pi) - math.lgamma(m / 2 + 1)


def _array(name: str, values: States) -> np.ndarray:
    numbers = real_numbers(name, values)
    return np.array(numbers.double().cpu().numpy() if isinstance(numbers, Tensor) else numbers, np.float64)
