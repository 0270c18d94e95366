"""The outer problem: from a dataset, a teacher and a density to targets and weights, once for the whole dataset.

    H(S) = E_{s~D} [ w(s) · ‖π_θ_T(S)(s) − y(s)‖² / A ]

    dbc      y = the dataset's action   w = 1
    pbc      y = π*(s)                  w = 1
    av-pbc   y = π*(s)                  w = β · Q(s, π*(s))
    sdw      y = π*(s)                  w = β · Q(s, π*(s)) · d(s)^(−τ)

Any of them can carry the density factor d(s)^(−τ), which is scaled to mean 1 (Lei, Zhang, Tao 2024 for the first
three; Lei, Cheng, Tao 2025, arXiv 2512.06692, for the last).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdw_fast.config import DistillConfig
from sdw_fast.data import TransitionDataset
from sdw_fast.density import density_weights, effective_sample_size, log_density
from sdw_fast.teacher import Teacher
from sdw_fast.units import Units


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


@dataclass(frozen=True, eq=False)
class OuterProblem:
    """What the outer loop samples from: one row a state of the dataset.

    Attributes:
        observations: (M, D) float32 in environment units: the dataset's own array. A batch is normalized when it is
            gathered.
        targets: Actions to match, scaled so that the action bounds are −1 and 1, (M, A) float32.
        weights: w(s) ≥ 0, (M,) float32.
        units: The dataset's, with known action bounds.
        report: Figures worth showing: effective sample size, weights floored, mean Q, the density weights' own.
    """

    observations: NDArray[np.float32]
    targets: NDArray[np.float32]
    weights: NDArray[np.float32]
    units: Units
    report: dict[str, Any]

    def __len__(self) -> int:
        return len(self.observations)

    def fingerprint(self) -> dict[str, str]:
        """A hash of each part that a distillation's bits depend on, by which a checkpoint knows its problem."""
        parts = {name: getattr(self, name) for name in ("observations", "targets", "weights")}
        hashes = {name: hashlib.blake2b(array.data, digest_size=16).hexdigest() for name, array in parts.items()}
        units = json.dumps(self.units.to_dict()).encode()
        return {**hashes, "units": hashlib.blake2b(units, digest_size=16).hexdigest()}


def outer_problem(
    data: TransitionDataset, teacher: Teacher | None = None, config: DistillConfig | None = None
) -> OuterProblem:
    """Computes the targets and weights of an objective for every state of a dataset.

    Args:
        data: The offline dataset.
        teacher: π* and Q; "dbc" needs none, "pbc" no critic.
        config: objective, density, density_method, k, tau, ess, clip and beta are read.

    Returns:
        The outer problem. Weights below 0 (states of negative value, which would reward error) are floored at 0 and
        counted in the report.

    Raises:
        ValueError: the objective needs a teacher that is missing, the action bounds are not known, or no weight is
            positive.
    """
    config = config or DistillConfig()
    kind = OBJECTIVES[config.objective]
    report: dict[str, Any] = {"objective": config.objective, "states": len(data)}
    weights = np.ones(len(data), dtype=np.float64)
    if not kind.teacher_actions:
        targets = data.units.require_actions().normalize(data.actions)
    elif teacher is None:
        raise ValueError(
            f"objective {config.objective!r} matches a teacher's actions: pass a teacher, or use objective='dbc'"
        )
    else:
        targets, values = teacher.label(data.observations, data.units, values=kind.action_values)
        if values is not None:
            weights = np.maximum(config.beta * values.astype(np.float64), 0.0)
            report |= {
                "mean_q": float(values.mean(dtype=np.float64)),
                "weights_floored": int((values < 0).sum()),
            }
    if kind.density if config.density is None else config.density:
        options: dict[str, Any] = {"k": config.k} if config.density_method == "knn" else {}
        factor = density_weights(
            log_density(data, config.density_method, **options),
            tau=config.tau,
            ess=config.ess if config.tau is None else None,
            clip=config.clip,
        )
        weights = weights * factor.weights
        report["density"] = factor.to_dict()
    if not weights.any():
        raise ValueError(
            f"every weight of objective {config.objective!r} is 0: the teacher values all {len(data)} states at 0 or "
            "less; use objective='pbc', or a teacher whose returns are positive"
        )
    report |= {
        "effective_sample_size": float(effective_sample_size(weights)),
        "mean_weight": float(weights.mean()),
        "largest_weight": float(weights.max()),
    }
    return OuterProblem(data.observations, targets, weights.astype(np.float32), data.units, report)
