"""State densities and what is made of them: log-densities, density weights, effective sample size, diversity.

Everything here works on whatever coordinates it is given, and distances mean something only where the coordinates have
one scale: pass normalized states. The functions that take a `TransitionDataset` normalize by themselves.

Tensors are worked on where they lie. Log-densities come back as the states went in: a NumPy array for an array, a
tensor on the same device for a tensor.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sdw_fast import ops
from sdw_fast.data import TransitionDataset

States = np.ndarray | torch.Tensor


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
        observations: (M, D) array or tensor, normalized.
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
        ValueError: wrong shape, NaN or infinite values, k out of range, or every state has k duplicates.
        TypeError: the observations are not real numbers.
    """
    states = _as_states(observations, "observations")
    distances, searched = _neighbor_distances(states, k, references, seed, backend, progress)
    return _like(_log_density_of_distances(distances, searched, _varying_columns(states), dimension), observations)


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
    x, log_volume = _standardized(_as_states(observations, "observations"))
    x = x.float()
    if len(x) < 10:
        raise ValueError(f"a flow needs at least 10 states (one in ten is held out), got {len(x)}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # zuko initializes from PyTorch's global generator
        torch.manual_seed(seed)
        flow = zuko.flows.MAF(x.shape[1], transforms=transforms, hidden_features=hidden).to(x.device)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    _fit_flow(
        flow, x[order[len(x) // 10 :]], x[order[: len(x) // 10]], batch_size, learning_rate, max_epochs, patience,
        generator, progress,
    )  # fmt: skip
    return _like(_flow_log_prob(flow, x).double() - log_volume, observations)


def kde_log_density(observations: States, *, bandwidth: str | float = "scott", progress: bool = False) -> States:
    """Log-density of every state under a Gaussian kernel density estimate, leave-one-out, for comparison at small M.

        d(s_i) = 1/(M − 1) · Σ_{j≠i} Π_c N(s_ic; s_jc, (h σ_c)²)

    with σ_c the standard deviation of column c. Work and time are M² D; memory is bounded by blocks.

    Args:
        observations: (M, D) array or tensor, normalized; a tensor is worked on where it lies. Constant columns are
            left out.
        bandwidth: h in standard deviations. "scott": M^(−1/(D+4)); "silverman": (M (D+2)/4)^(−1/(D+4)); or a number.
        progress: show a bar.

    Returns:
        (M,) float64 natural logarithms, of the kind and device of `observations`.

    Raises:
        ValueError: wrong shape, one state, NaN or infinite values, no column varies, or a bandwidth not understood.
    """
    x, log_volume = _standardized(_as_states(observations, "observations"))
    count, columns = x.shape
    if bandwidth == "scott":
        h = count ** (-1 / (columns + 4))
    elif bandwidth == "silverman":
        h = (count * (columns + 2) / 4) ** (-1 / (columns + 4))
    elif not isinstance(bandwidth, str) and bandwidth > 0 and math.isfinite(bandwidth):
        h = float(bandwidth)
    else:
        raise ValueError(f"bandwidth must be 'scott', 'silverman' or a positive number, got {bandwidth!r}")
    x = x / h
    log_kernels = torch.empty(count, dtype=torch.float64, device=x.device)
    rows = max(1, (1 << 23) // count)  # a block of distances takes 64 MB
    for start in tqdm(range(0, count, rows), desc="kernel density", disable=not progress):
        block = x[start : start + rows]
        exponent = torch.cdist(block, x).square_().mul_(-0.5)  # (B, M)
        own = torch.arange(len(block), device=x.device)
        exponent[own, start + own] = -torch.inf
        log_kernels[start : start + rows] = torch.logsumexp(exponent, dim=1)
    normalization = math.log(count - 1) + columns * (math.log(h) + math.log(2 * math.pi) / 2) + log_volume
    return _like(log_kernels - normalization, observations)


def log_density(data: TransitionDataset, method: str = "knn", *, progress: bool = False, **options: Any) -> np.ndarray:
    """Log-density of every state of a dataset, on normalized states, with the costly part cached beside the dataset.

    The cache is a folder `.sdw_cache` in the folder of `data.path`, with one file for each content hash and choice of
    options. A file that does not fit is computed again; a folder that cannot be written is no error; a dataset
    without a path is not cached.

    Args:
        data: the dataset, of M transitions.
        method: "knn", "flow" or "kde".
        progress: show a bar.
        **options: those of `knn_log_density` (`references` as a number only), `flow_log_density` or `kde_log_density`.

    Returns:
        (M,) float64 array of natural logarithms.

    Raises:
        ValueError: unknown method, or as the method's own function.
    """
    if method == "knn":
        dimension = options.pop("dimension", "ambient")
        distances, searched = _cached_neighbor_distances(data, progress=progress, **options)
        columns = _varying_columns(data.normalized_observations)
        return _log_density_of_distances(distances, searched, columns, dimension).numpy()
    estimators: dict[str, Callable[..., Any]] = {"flow": flow_log_density, "kde": kde_log_density}
    if method not in estimators:
        raise ValueError(f"method must be one of {['knn', *estimators]}, got {method!r}")

    states = data.normalized_observations
    call = inspect.signature(estimators[method]).bind(states, progress=progress, **options)

    def compute() -> dict[str, np.ndarray]:
        return {"logd": estimators[method](*call.args, **call.kwargs)}

    call.apply_defaults()  # into the key: a default that changes must not find what the old one computed
    chosen = sorted((name, value) for name, value in call.arguments.items() if name not in ("observations", "progress"))
    return _cached(data, f"{method} {chosen}", compute, {"logd": (len(data),)})["logd"]


def estimate_dimension(observations: States, k: int = 20, *, backend: str = "auto", progress: bool = False) -> float:
    """Intrinsic dimension of a cloud of states: maximum likelihood of Levina & Bickel (2004), averaged over the states
    as MacKay & Ghahramani (2005) correct it (the mean of the inverses, inverted):

        1/m = 1/(M (k − 1)) · Σ_i Σ_{j<k} log( r_k(s_i) / r_j(s_i) )

    States with a duplicate among their neighbors are left out of the mean. With many dimensions and few states the
    estimate is low, as neighborhoods are not small any more: 14.5 of 17 for 8,000 Gaussian states.

    Args:
        observations: (M, D) array or tensor, normalized.
        k: neighbors, at least 2 and below M. Fewer see finer structure, and noise.
        backend: of `sdw_fast.ops.knn`.
        progress: show a bar.

    Raises:
        ValueError: as `knn_log_density`, k below 2, or no state without duplicates.
    """
    states = _as_states(observations, "observations")
    distances, _ = _neighbor_distances(states, k, None, 0, backend, progress)
    return _dimension_of_distances(distances)


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
    values = _to_numpy(logd).astype(np.float64)
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
    w = _to_numpy(weights).astype(np.float64)
    if w.ndim != 1 or w.size == 0:
        raise ValueError(f"weights must have shape (M,) with M >= 1, got {w.shape}")
    if not (np.isfinite(w).all() and (w >= 0).all() and w.any()):
        raise ValueError("weights must be finite, nonnegative and not all zero")
    w /= w.max()
    return float(w.sum() ** 2 / (w.size * np.square(w).sum()))


@dataclass(frozen=True)
class Diversity:
    """How widely a dataset's states spread.

    Attributes:
        states: M.
        dimension: number of columns that vary, D.
        intrinsic_dimension: as `estimate_dimension` gives it, with the same k.
        participation_ratio: (Σλ)² / Σλ² of the covariance's eigenvalues λ: how many principal axes share the variance,
            between 1 and D.
        neighbor_distance: mean distance of a state to its k nearest others.
        entropy: differential entropy in nats, by Kozachenko & Leonenko (1987):
            ψ(M) − ψ(k) + log V_D + D · mean log r_k.
    """

    states: int
    dimension: int
    intrinsic_dimension: float
    participation_ratio: float
    neighbor_distance: float
    entropy: float

    def to_dict(self) -> dict[str, float | int]:
        """Plain numbers, JSON-serializable."""
        return asdict(self)


def diversity(source: TransitionDataset | States, k: int = 10, *, progress: bool = False) -> Diversity:
    """Measures how widely states spread.

    Figures of two datasets compare only in the same coordinates: give both in one normalization, and for entropy and
    neighbor distance the same number of states.

    Args:
        source: a dataset, whose normalized states are measured and whose neighbors are cached as in `log_density`; or
            (M, D) normalized states.
        k: neighbors, at least 2 and below M.
        progress: show a bar.

    Raises:
        ValueError: as `knn_log_density`.
    """
    states: States
    if isinstance(source, TransitionDataset):
        states = source.normalized_observations
        distances, _ = _cached_neighbor_distances(source, k, progress=progress)
    else:
        states = _as_states(source, "observations")
        distances, _ = _neighbor_distances(states, k, None, 0, "auto", progress)
    count, columns = len(states), _varying_columns(states)
    radius = _floored(distances[:, -1].double())
    digamma = torch.digamma(torch.tensor([count, k], dtype=torch.float64))
    log_volume = _log_unit_ball(columns) + columns * float(radius.log().mean())
    return Diversity(
        states=count,
        dimension=columns,
        intrinsic_dimension=_dimension_of_distances(distances),
        participation_ratio=_participation_ratio(states),
        neighbor_distance=float(distances.mean(dtype=torch.float64)),
        entropy=float(digamma[0] - digamma[1]) + log_volume,
    )


def coverage(of: TransitionDataset | States, by: TransitionDataset | States, k: int = 10) -> float:
    """Fraction of the states of one dataset that have a state of the other in their neighborhood.

        1/M · #{ i : min_j ‖x_i − y_j‖ ≤ r_k(x_i) }     (Naeem et al., 2020, "coverage")

    with x the M states `of`, r_k(x_i) the distance of x_i to its k-th neighbor among the other x, and y the N states
    `by`. If both come from one distribution it is 1 − Π_{l<k} (M − 1 − l) / (M + N − 1 − l) on average: 1 − 2^(−k) for
    datasets of one size.

    Args:
        of: the dataset to be covered, or (M, D) states.
        by: the dataset that covers, or (N, D) states. Two datasets are both normalized by the normalizer of the first;
            two arrays are taken as they are.
        k: neighbors that make a neighborhood, 1 ≤ k < M.

    Raises:
        TypeError: one dataset and one array.
        ValueError: as `knn_log_density`.
    """
    covered: States
    covering: States
    if isinstance(of, TransitionDataset) and isinstance(by, TransitionDataset):
        covered, covering = of.normalized_observations, of.normalizer.normalize(by.observations)
        distances, _ = _cached_neighbor_distances(of, k)
    elif isinstance(of, TransitionDataset) or isinstance(by, TransitionDataset):
        raise TypeError("coverage compares two datasets or two arrays, got one of each")
    else:
        covered, covering = _as_states(of, "of"), _as_states(by, "by")
        distances, _ = _neighbor_distances(covered, k, None, 0, "auto", False)
    nearest, _ = _neighbor_distances(covered, 1, covering, 0, "auto", False)
    return float((nearest[:, 0] <= distances[:, -1]).double().mean())


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


def _standardized(states: States) -> tuple[torch.Tensor, float]:
    """The varying columns with mean 0 and deviation 1, float64, and log |∂s/∂x| of that change of variables."""
    x = torch.as_tensor(states).double()
    if len(x) < 2:
        raise ValueError("one state has no density: give at least 2")
    x = x[:, (x != x[0]).any(dim=0)]
    if x.shape[1] == 0:
        raise ValueError("all states are equal, so they have no density")
    deviation = x.std(dim=0)
    return (x - x.mean(dim=0)) / deviation, float(deviation.log().sum())


def _fit_flow(
    flow: Any,
    training: torch.Tensor,
    held_out: torch.Tensor,
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
    with tqdm(range(max_epochs), desc="flow", unit="epoch", disable=not progress) as bar:
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
def _flow_log_prob(flow: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([flow().log_prob(block) for block in x.split(1 << 14)])


def _participation_ratio(states: States) -> float:
    """(tr C)² / tr C² of the covariance C of the columns."""
    covariance = torch.atleast_2d(torch.as_tensor(states).double().T.cov())
    return float(covariance.trace() ** 2 / covariance.square().sum())


def _log_density_of_distances(
    distances: torch.Tensor, searched: torch.Tensor | int, columns: int, dimension: str | float
) -> torch.Tensor:
    """Log-densities from (M, k) neighbor distances found among `searched` states in `columns` varying columns."""
    k = distances.shape[1]
    radius = _floored(distances[:, -1].double())
    if dimension == "ambient":
        m = float(columns)
    elif dimension == "intrinsic":
        m = _dimension_of_distances(distances)
    elif not isinstance(dimension, str) and dimension > 0 and math.isfinite(dimension):
        m = float(dimension)
    else:
        raise ValueError(f"dimension must be 'ambient', 'intrinsic' or a positive number, got {dimension!r}")
    log_searched = torch.as_tensor(searched, dtype=torch.float64, device=distances.device).log()
    return math.log(k) - log_searched - _log_unit_ball(m) - m * radius.log()


def _floored(radius: torch.Tensor) -> torch.Tensor:
    """Distances with half the smallest positive one in place of zeros."""
    positive = radius[radius > 0]
    if positive.numel() == 0:
        raise ValueError(
            "every state has k or more exact duplicates, so every neighbor distance is zero: "
            "remove duplicates (numpy.unique(observations, axis=0)) or raise k"
        )
    return radius.clamp(min=float(positive.min()) / 2)


def _dimension_of_distances(distances: torch.Tensor) -> float:
    """The Levina-Bickel estimate with MacKay-Ghahramani averaging, from (M, k) ascending distances."""
    if distances.shape[1] < 2:
        raise ValueError("the intrinsic dimension needs k >= 2 neighbors, got k = 1")
    distinct = distances[distances[:, 0] > 0].double()
    if len(distinct) == 0:
        raise ValueError("no state without a duplicate: the intrinsic dimension cannot be estimated")
    log_ratio = distinct[:, -1:].log() - distinct[:, :-1].log()
    mean = float(log_ratio.mean())
    if mean == 0:
        raise ValueError("all neighbor distances are equal: the intrinsic dimension cannot be estimated")
    return 1 / mean


def _log_unit_ball(m: float) -> float:
    """log V_m, the volume of the unit ball in m dimensions (m need not be whole)."""
    return m / 2 * math.log(math.pi) - math.lgamma(m / 2 + 1)


def _neighbor_distances(
    states: States, k: int, references: int | States | None, seed: int, backend: str, progress: bool
) -> tuple[torch.Tensor, torch.Tensor | int]:
    """Ascending distances (M, k) float32 to the neighbors, own row left out, and how many states were searched:
    one number, or one for each state where only some of them are references themselves. On the device of the states."""
    count = len(states)
    searched: torch.Tensor | int
    if references is None:
        _check_k(k, count - 1, "the other observations")
        distances, _ = _knn(states, None, k, backend, progress)
        searched = count - 1
    elif isinstance(references, int | np.integer):
        rows = _reference_rows(count, int(references), seed)
        _check_k(k, len(rows) - 1, "references besides the state itself")
        own_rows = torch.from_numpy(rows)
        if isinstance(states, torch.Tensor):
            own_rows = own_rows.to(states.device)
        distances, indices = _knn(states, _take(states, own_rows), k + 1, backend, progress)
        distances, searched = _without_self(distances, indices, own_rows)
    else:
        others = _as_states(references, "references")
        if others.shape[1] != states.shape[1]:
            raise ValueError(f"observations have {states.shape[1]} columns, references {others.shape[1]}")
        _check_k(k, len(others), "references")
        distances, _ = _knn(states, others, k, backend, progress)
        searched = len(others)
    if not bool(distances.isfinite().all()):
        raise ValueError(f"backend {backend!r} is approximate and found fewer than k = {k} neighbors of some states")
    return distances, searched


def _knn(
    queries: States, references: States | None, k: int, backend: str, progress: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.knn` with a progress bar, as tensors."""
    with tqdm(total=len(queries), desc="neighbors", unit="state", unit_scale=True, disable=not progress) as bar:
        found: Any = ops.knn(
            queries, references, k=k, backend=backend, progress=lambda done, _: bar.update(done - bar.n)
        )
    return torch.as_tensor(found[0]), torch.as_tensor(found[1])


def _take(states: States, rows: torch.Tensor) -> States:
    return states[rows] if isinstance(states, torch.Tensor) else states[rows.numpy()]


def _reference_rows(count: int, references: int, seed: int) -> np.ndarray:
    """Sorted rows of a random subset, drawn without replacement."""
    if not 2 <= references <= count:
        raise ValueError(f"references must lie between 2 and the number of observations, {count}, got {references}")
    return np.sort(np.random.default_rng(seed).choice(count, references, replace=False))


def _without_self(
    distances: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drops one of k + 1 neighbors of every state: itself where it is a reference, the farthest elsewhere.

    A state with k duplicates of lower index may not be among its own neighbors; the farthest is dropped there too,
    as all of the k + 1 distances are zero.
    """
    own = torch.full_like(indices[:, 0], -1)
    own[rows] = torch.arange(len(rows), device=own.device)
    drop = indices == own[:, None]  # (M, k + 1)
    drop[~drop.any(1), -1] = True
    searched = len(rows) - (own >= 0).long()
    return distances[~drop].reshape(len(distances), -1), searched


def _check_k(k: int, available: int, what: str) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be an integer, got {k!r}")
    if not 1 <= k <= available:
        raise ValueError(f"k must lie between 1 and {available} (the number of {what}), got {k}")


def _cached_neighbor_distances(
    data: TransitionDataset,
    k: int = 10,
    references: int | None = None,
    seed: int = 0,
    backend: str = "auto",
    progress: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_neighbor_distances` of a dataset's normalized states, from the cache where it holds them."""
    if references is not None and not isinstance(references, int | np.integer):
        raise TypeError(f"references of a dataset's log-density must be a number, got {type(references).__name__}")

    def compute() -> dict[str, np.ndarray]:
        states = _as_states(data.normalized_observations, "observations")
        distances, searched = _neighbor_distances(states, k, references, seed, backend, progress)
        return {"distances": distances.numpy(), "searched": np.asarray(searched)}

    key = f"knn k={k} references={references} seed={seed if references else None} backend={backend}"
    found = _cached(data, key, compute, {"distances": (len(data), k)})
    return torch.from_numpy(found["distances"]), torch.from_numpy(found["searched"])


def _cached(
    data: TransitionDataset,
    key: str,
    compute: Callable[[], dict[str, np.ndarray]],
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """The arrays that `compute` returns, read from the cache beside the dataset if they were computed before.

    Args:
        data: the dataset; without a path nothing is cached.
        key: what is computed and with which options. The dataset's content and normalization are added to it.
        compute: makes the arrays.
        shapes: those that a valid file has.
    """
    if data.path is None:
        return compute()
    path = Path(data.path)
    normalizer = data.normalizer.mean.tobytes() + data.normalizer.scale.tobytes()
    digest = hashlib.sha256(f"{data.content_hash} {key} ".encode() + normalizer).hexdigest()[:24]
    file = (path if path.is_dir() else path.parent) / ".sdw_cache" / f"{key.split()[0]}-{digest}.npz"
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        if all(arrays[name].shape == shape and np.isfinite(arrays[name]).all() for name, shape in shapes.items()):
            return arrays
    except Exception:  # absent, truncated, not a zip file, not numbers, ...: computing again is right in every case
        pass
    arrays = compute()
    _save_quietly(file, arrays)
    return arrays


def _save_quietly(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a whole .npz or nothing; a place that cannot be written to only costs the next run its time."""
    temporary = file.with_name(f"{file.stem}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                np.savez(stream, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def _varying_columns(states: States) -> int:
    """Columns that are not constant: a constant one has no part in any distance, so it is no dimension either."""
    if isinstance(states, torch.Tensor):
        return max(1, int((states.amax(0) != states.amin(0)).sum()))
    return max(1, int(np.count_nonzero(states.max(axis=0) != states.min(axis=0))))


def _like(values: torch.Tensor, given: States) -> States:
    """Of the kind that was given; tensors lie on its device already."""
    return values if isinstance(given, torch.Tensor) else values.numpy()


def _to_numpy(values: States) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _as_states(observations: States, name: str) -> States:
    """(M, D) floating point, on the device it came on (integers become float32); or the error in them."""
    states: Any = observations.detach() if isinstance(observations, torch.Tensor) else np.asarray(observations)
    if states.ndim != 2 or 0 in states.shape:
        raise ValueError(f"{name} must have shape (M, D) with M, D >= 1, got {tuple(states.shape)}")
    if isinstance(states, torch.Tensor):
        kind = "c" if states.is_complex() else "f" if states.is_floating_point() else "i"
        finite: Any = torch.isfinite(states).all(dim=1)
    else:
        kind = states.dtype.kind
        finite = np.isfinite(states).all(axis=1) if kind in "fiub" else np.ones(1, bool)
    if kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got {states.dtype}")
    if not bool(finite.all()):
        rows = np.flatnonzero(~_to_numpy(finite))
        raise ValueError(f"{name}: {rows.size} rows have NaN or infinite values, the first is row {rows[0]}")
    if kind == "f":
        return states
    return states.float() if isinstance(states, torch.Tensor) else states.astype(np.float32)
