"""The outer objectives: from a dataset, a teacher and a density to targets and weights, once for the whole dataset.

    H(S) = E_{s~D} [ w(s) · ‖π_θ_T(S)(s) − y(s)‖² / A ]

    dbc      y = the dataset's action   w = 1
    pbc      y = π*(s)                  w = 1
    av-pbc   y = π*(s)                  w = β · Q(s, π*(s))
    sdw      y = π*(s)                  w = β · Q(s, π*(s)) · d(s)^(−τ)

Any of them can carry the density factor d(s)^(−τ), which is scaled to mean 1 (Lei, Zhang, Tao 2024 for the first
three; Lei, Cheng, Tao 2025, arXiv 2512.06692, for the last).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdw_fast.data import TransitionDataset, normalize_actions
from sdw_fast.density import DensityWeights, density_weights, effective_sample_size, log_density
from sdw_fast.teacher import Teacher


@dataclass(frozen=True)
class Objective:
    """What an objective's name stands for."""

    teacher_actions: bool  # targets are the teacher's actions, not the dataset's
    action_values: bool  # weights carry β · Q(s, π*(s))
    density: bool  # weights carry d(s)^(−τ)


OBJECTIVES = {
    "dbc": Objective(teacher_actions=False, action_values=False, density=False),
    "pbc": Objective(teacher_actions=True, action_values=False, density=False),
    "av-pbc": Objective(teacher_actions=True, action_values=True, density=False),
    "sdw": Objective(teacher_actions=True, action_values=True, density=True),
}


@dataclass(frozen=True)
class OuterProblem:
    """What the outer loop samples from: one row a state of the dataset.

    Attributes:
        states: Normalized observations, (M, D) float32.
        targets: Actions to match, scaled so that the action bounds are −1 and 1, (M, A) float32.
        weights: w(s) ≥ 0, (M,) float32.
        report: Figures worth showing: effective sample size, weights floored, mean Q, the density weights' own.
    """

    states: NDArray[np.float32]
    targets: NDArray[np.float32]
    weights: NDArray[np.float32]
    report: dict[str, Any]


def outer_problem(
    data: TransitionDataset,
    teacher: Teacher | None = None,
    *,
    objective: str = "sdw",
    density: bool | None = None,
    density_method: str = "knn",
    k: int = 10,
    tau: float | None = None,
    ess: float | None = None,
    clip: float = 0.99,
    beta: float = 0.02,
) -> OuterProblem:
    """Computes the targets and weights of an objective for every state of a dataset.

    Args:
        data: The offline dataset.
        teacher: π* and Q, in the environment's units; "dbc" needs none, "pbc" no critic.
        objective: "dbc", "pbc", "av-pbc" or "sdw".
        density: Whether the weights carry d(s)^(−τ); None: as the objective says.
        density_method: Estimator of log d, see `log_density`.
        k: Neighbors of the k-NN estimate.
        tau, ess, clip: Exactly one of tau and ess, and the clipping quantile: see `density_weights`.
        beta: β, the scale of Q in the weights.

    Returns:
        The outer problem. Weights below 0 (states of negative value, which would reward error) are floored at 0 and
        counted in the report.

    Raises:
        ValueError: the objective is unknown, or needs a teacher that is missing, or no weight is positive.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {list(OBJECTIVES)}, got {objective!r}")
    kind = OBJECTIVES[objective]
    if kind.teacher_actions and teacher is None:
        raise ValueError(f"objective {objective!r} matches a teacher's actions: pass a teacher, or use objective='dbc'")
    weights = np.ones(len(data), dtype=np.float64)
    report: dict[str, Any] = {"objective": objective, "states": len(data)}
    targets = data.actions
    if teacher is not None and kind.teacher_actions:
        targets = np.asarray(teacher.actions(data.observations), dtype=np.float32)
    if teacher is not None and kind.action_values:
        values = np.asarray(teacher.values(data.observations, targets), dtype=np.float64)
        weights = np.maximum(beta * values, 0.0)
        report |= {"mean_q": float(values.mean()), "weights_floored": int((values < 0).sum())}
    if kind.density if density is None else density:
        factor = _density_factor(data, density_method, k, tau, ess, clip)
        weights = weights * factor.weights
        report["density"] = factor.to_dict()
    if not weights.any():
        raise ValueError(
            f"every weight of objective {objective!r} is 0: the teacher values all {len(data)} states at 0 or less; "
            "use objective='pbc', or a teacher whose returns are positive"
        )
    report |= {
        "effective_sample_size": float(effective_sample_size(weights)),
        "mean_weight": float(weights.mean()),
        "largest_weight": float(weights.max()),
    }
    return OuterProblem(
        states=data.normalized_observations,
        targets=normalize_actions(targets, *data.action_bounds),
        weights=weights.astype(np.float32),
        report=report,
    )


def _density_factor(
    data: TransitionDataset, method: str, k: int, tau: float | None, ess: float | None, clip: float
) -> DensityWeights:
    logd = log_density(data, method=method, k=k) if method == "knn" else log_density(data, method=method)
    return density_weights(logd, tau=tau, ess=ess, clip=clip)
