"""Diversity: how widely a dataset's states spread, how many dimensions they fill, how much of another they cover."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from sdw_fast.data import TransitionDataset
from sdw_fast.density import log_unit_ball
from sdw_fast.neighbors import (
    States,
    dataset_neighbor_distances,
    floored_radius,
    intrinsic_dimension,
    neighbor_distances,
    states_of,
    varying_columns,
)


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
    distances, _ = neighbor_distances(states_of(observations, "observations"), k, backend=backend, progress=progress)
    return intrinsic_dimension(distances)


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
    if isinstance(source, TransitionDataset):
        states = torch.from_numpy(source.normalized_observations())
        distances, _ = dataset_neighbor_distances(source, k, progress=progress)
    else:
        states = states_of(source, "observations")
        distances, _ = neighbor_distances(states, k, progress=progress)
    count, columns = len(states), varying_columns(states)
    digamma = torch.digamma(torch.tensor([count, k], dtype=torch.float64))
    log_volume = log_unit_ball(columns) + columns * float(floored_radius(distances).log().mean())
    return Diversity(
        states=count,
        dimension=columns,
        intrinsic_dimension=intrinsic_dimension(distances),
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
        by: the dataset that covers, or (N, D) states. Two datasets are both normalized by the units of the first;
            two arrays are taken as they are.
        k: neighbors that make a neighborhood, 1 ≤ k < M.

    Raises:
        TypeError: one dataset and one array.
        ValueError: as `knn_log_density`.
    """
    if isinstance(of, TransitionDataset) and isinstance(by, TransitionDataset):
        covered = torch.from_numpy(of.normalized_observations())
        covering = torch.from_numpy(of.units.states.normalize(by.observations))
        distances, _ = dataset_neighbor_distances(of, k)
    elif isinstance(of, TransitionDataset) or isinstance(by, TransitionDataset):
        raise TypeError("coverage compares two datasets or two arrays, got one of each")
    else:
        covered, covering = states_of(of, "of"), states_of(by, "by")
        distances, _ = neighbor_distances(covered, k)
    nearest, _ = neighbor_distances(covered, 1, covering)
    return float((nearest[:, 0] <= distances[:, -1]).double().mean())


def _participation_ratio(states: Tensor) -> float:
    """(tr C)² / tr C² of the covariance C of the columns."""
    covariance = torch.atleast_2d(states.double().T.cov())
    return float(covariance.trace() ** 2 / covariance.square().sum())
