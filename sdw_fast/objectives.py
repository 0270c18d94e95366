"""The outer problem: from a dataset, a teacher and a density to targets and weights, once for the whole dataset.

    H(S) = E_{s~D} [ w(s) · ‖π_θ_T(S)(s) − y(s)‖² / A ]

    dbc      y = the dataset's action   w = 1
    pbc      y = π*(s)                  w = 1
    av-pbc   y = π*(s)                  w = v(Q(s, π*(s)))
    sdw      y = π*(s)                  w = v(Q(s, π*(s))) · d(s)^(−τ)

v turns values into weights of mean 1, see `value_weights`; the papers' v(Q) = β · Q is an option. Any objective can
carry the density factor d(s)^(−τ), which is scaled to mean 1 (Lei, Zhang, Tao 2024 for the first three; Lei, Cheng,
Tao 2025, arXiv 2512.06692, for the last).

With state noise the problem holds every state twice: as it is, and at s' = s + σ·std(s)·ε, ε ~ N(0, 1), with the
target π*(s') and the weight v(Q(s', π*(s'))) · d(s)^(−τ). A policy that has left the data's states is then told how to
come back (DART, Laskey et al. 2017, adds noise to a teacher's actions in the environment for this).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdw_fast.config import DistillConfig
from sdw_fast.data import TransitionDataset
from sdw_fast.density import density_weights, effective_sample_size, log_density
from sdw_fast.teacher import Teacher
from sdw_fast.units import Units

# Of the values: these quantiles get the least and the largest weight, and the least is so large a share of the largest.
VALUE_QUANTILES = (0.01, 0.99)
LEAST_VALUE_WEIGHT = 0.2
BETA = 0.02  # the papers'
# A problem is told of where its weights are 0 on more than this share of the states, or where as few of them count.
MANY_FLOORED = 0.25
SMALL_SAMPLE = 0.1
# It is told of too where its teacher's actions are farther from the data's than their mean is: R² below this.
LEAST_AGREEMENT = 0.0
AGREEMENT_ROWS = 40_000  # that are looked at, at least, and of them the share whose episodes return most
AGREEMENT_SHARE = 0.25
_ROUNDING = 8 * float(np.finfo(np.float32).eps)  # of a network's values, relative


@dataclass(frozen=True)
class Objective:
    """What an objective's name stands for."""

    teacher_actions: bool  # targets are the teacher's actions, not the dataset's
    action_values: bool  # weights carry v(Q(s, π*(s)))
    density: bool  # weights carry d(s)^(−τ)


OBJECTIVES = {
    "dbc": Objective(teacher_actions=False, action_values=False, density=False),
    "pbc": Objective(teacher_actions=True, action_values=False, density=False),
    "av-pbc": Objective(teacher_actions=True, action_values=True, density=False),
    "sdw": Objective(teacher_actions=True, action_values=True, density=True),
}


@dataclass(frozen=True, eq=False)
class OuterProblem:
    """What the outer loop samples from: one row a state of the dataset, two with state noise.

    Attributes:
        observations: (M, D) float32 in environment units: the dataset's own array, where there is no state noise. A
            batch is normalized when it is gathered.
        targets: Actions to match, scaled so that the action bounds are −1 and 1, (M, A) float32.
        weights: w(s) ≥ 0, (M,) float32.
        units: The dataset's, with known action bounds.
        report: Figures worth showing: effective sample size, weights floored, mean Q, the teacher's agreement with the
            data, the density weights' own.
    """

    observations: NDArray[np.float32]
    targets: NDArray[np.float32]
    weights: NDArray[np.float32]
    units: Units
    report: dict[str, Any]

    def __len__(self) -> int:
        return len(self.observations)

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows to learn from and those held out: a tenth, none of fewer than twenty.

        They are drawn by the number of rows alone, so that sets of several seeds are compared on the same states.
        """
        rows = np.random.default_rng(len(self)).permutation(len(self))
        held = len(self) // 10 if len(self) >= 20 else 0
        return np.sort(rows[held:]), np.sort(rows[:held])

    def fingerprint(self) -> dict[str, str]:
        """A hash of each part that a distillation's bits depend on, by which a checkpoint knows its problem."""
        parts = {name: getattr(self, name) for name in ("observations", "targets", "weights")}
        hashes = {name: hashlib.blake2b(array.data, digest_size=16).hexdigest() for name, array in parts.items()}
        units = json.dumps(self.units.to_dict()).encode()
        return {**hashes, "units": hashlib.blake2b(units, digest_size=16).hexdigest()}


def value_weights(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Weights that rise with the value of a state, whatever the scale and the zero of the rewards.

        w = ε + (1 − ε) · clip((Q − q_low) / (q_high − q_low), 0, 1),   scaled to mean 1

    with q_low and q_high the quantiles 0.01 and 0.99 of Q over the dataset, and ε = 0.2, so that no state is left
    out and the effective sample size is at least 4ε / (1 + ε)² = 0.56 of the states (Kantorovich's inequality).

    Q → aQ + b with a > 0 gives the same weights. So do rewards times a constant; a constant added to the rewards does
    where episodes are never terminated. Where they are, it shifts Q by less in states near a termination: then Q is
    another one, for it pays or costs to live on.

    Args:
        values: Q(s, π*(s)), (M,). Values that are all equal, but for rounding, give equal weights.

    Returns:
        The weights, (M,) float64, positive, mean 1.
    """
    q = values.astype(np.float64)
    low, high = np.quantile(q, VALUE_QUANTILES)
    if high - low <= _ROUNDING * np.abs(q).max():  # nearly all are equal: what differs are the others
        low, high = q.min(), q.max()
    if high - low <= _ROUNDING * np.abs(q).max():
        return np.ones(len(q))
    weights = LEAST_VALUE_WEIGHT + (1 - LEAST_VALUE_WEIGHT) * np.clip((q - low) / (high - low), 0, 1)
    return weights / weights.mean()


def outer_problem(
    data: TransitionDataset, teacher: Teacher | None = None, config: DistillConfig | None = None
) -> OuterProblem:
    """Computes the targets and weights of an objective for every state of a dataset.

    Args:
        data: The offline dataset.
        teacher: π* and Q; "dbc" needs none, "pbc" no critic.
        config: objective, value_weights, beta, density, density_method, k, tau, ess, clip and state_noise are read.

    Returns:
        The outer problem. With value_weights="paper", states of negative value, which would reward error, get weight 0
        and are counted in the report.

    Raises:
        ValueError: the objective needs a teacher that is missing, the action bounds are not known, no weight is
            positive, or state_noise is beyond all bounds.

    Warns:
        UserWarning: more than a quarter of the states have weight 0, the effective sample size is below a tenth of
            the states, or the teacher acts unlike the data (see `teacher_agreement`).
    """
    config = config or DistillConfig()
    kind = OBJECTIVES[config.objective]
    observations = data.observations
    if config.state_noise:
        observations = _with_noise(observations, config.state_noise)
    report: dict[str, Any] = {"objective": config.objective, "states": len(observations)}
    weights = np.ones(len(observations), dtype=np.float64)
    if not kind.teacher_actions:
        targets = data.units.require_actions().normalize(data.actions)
    elif teacher is None:
        raise ValueError(
            f"objective {config.objective!r} matches a teacher's actions: pass a teacher, or use objective='dbc'"
        )
    else:
        targets, values = teacher.label(observations, data.units, values=kind.action_values)
        if values is not None:
            weights, figures = _of_values(values, config)
            report |= figures
    if kind.density if config.density is None else config.density:
        options: dict[str, Any] = {"k": config.k} if config.density_method == "knn" else {}
        factor = density_weights(
            log_density(data, config.density_method, **options),
            tau=config.tau,
            ess=config.ess if config.tau is None else None,
            clip=config.clip,
        )
        weights = weights * np.tile(factor.weights, len(observations) // len(data))
        report["density"] = factor.to_dict()
    if kind.teacher_actions and data.units.head != "softmax":
        report["teacher_agreement"] = teacher_agreement(targets[: len(data)], data)
    report |= {
        "effective_sample_size": float(effective_sample_size(weights)),
        "mean_weight": float(weights.mean()),
        "largest_weight": float(weights.max()),
    }
    _tell_of(report)
    _tell_of_teacher(report)
    return OuterProblem(observations, targets, weights.astype(np.float32), data.units, report)


def _with_noise(observations: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """The states, and below them the states with noise: (2M, D) float32, the same for every seed of a run.

    A dimension that does not vary gets no noise. Raises ValueError where a state leaves the range of float32.
    """
    deviation = observations.std(axis=0, dtype=np.float64)
    both = np.concatenate([observations, observations])
    noise = np.random.default_rng(len(observations)).standard_normal(observations.shape, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        noise *= (share * deviation).astype(np.float32)
        both[len(observations) :] += noise
    if not np.isfinite(both).all():
        raise ValueError(f"state_noise={share} takes states beyond the range of float32; 1 is much already")
    return both


def teacher_agreement(targets: NDArray[np.float32], data: TransitionDataset) -> float | None:
    """How well a teacher's actions y(s) explain the data's a(s) where the data are good.

        R² = 1 − E ‖y(s) − a(s)‖² / E ‖a(s) − ā‖²

    over the quarter of the transitions whose episodes return most, for a learner begins with actions that its teacher
    would not take; over all of them where there are no rewards. Teachers that were trained on the data reach 0.3 to
    0.95. Below 0 a policy that acts as the teacher does will leave the states that the data hold, and what is distilled
    from them is worth little there (docs/results.md, "With the papers' own teachers").

    Args:
        targets: (M, A) float32, the teacher's actions in normalized units.
        data: The dataset; continuous actions. Of more than 80,000 rows 40,000 to 80,000 are looked at.

    Returns:
        R², at most 1; None where all actions of the data are the same.
    """
    rows = np.arange(0, len(data), max(1, len(data) // AGREEMENT_ROWS))
    if data.rewards is not None:
        returns = data.episode_returns[np.searchsorted(data.episode_ends, rows)]
        rows = rows[returns >= np.quantile(returns, 1 - AGREEMENT_SHARE)]
    actions = data.units.require_actions().normalize(data.actions[rows]).astype(np.float64)
    spread = float(np.square(actions - actions.mean(0)).mean())
    return 1 - float(np.square(targets[rows] - actions).mean()) / spread if spread else None


def _of_values(values: NDArray[np.float32], config: DistillConfig) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """The weights of the values, and what the report says of them."""
    if config.value_weights == "shifted":
        weights, floored = value_weights(values), 0
    else:
        weights = np.maximum((config.beta or BETA) * values.astype(np.float64), 0.0)
        floored = int((values < 0).sum())
        if not weights.any():
            raise ValueError(
                f"every weight is 0: value_weights='paper' is β·Q, and the teacher values all {len(values)} states at "
                "0 or less; use value_weights='shifted', which no zero of Q matters to"
            )
    return weights, {
        "mean_q": float(values.mean(dtype=np.float64)),
        "weights_floored": floored,
        "value_effective_sample_size": float(effective_sample_size(weights)),
    }


def _tell_of(report: dict[str, Any]) -> None:
    """Warns of weights by which most of the dataset would not be learned from."""
    floored, sample = report.get("weights_floored", 0) / report["states"], report["effective_sample_size"]
    if floored <= MANY_FLOORED and sample >= SMALL_SAMPLE:
        return
    advice = "use value_weights='shifted'" if floored > MANY_FLOORED else "raise ess, or lower tau or clip"
    warnings.warn(
        f"{floored:.0%} of the {report['states']} states have weight 0, and the effective sample size is {sample:.1%} "
        f"of them: the set will hardly learn from the others; {advice}",
        stacklevel=3,
    )


def _tell_of_teacher(report: dict[str, Any]) -> None:
    """Warns of a teacher that acts unlike the data."""
    agreement = report.get("teacher_agreement")
    if agreement is not None and agreement < LEAST_AGREEMENT:
        warnings.warn(
            "the teacher acts unlike the dataset: its actions are farther from the data's than the mean of those is "
            f"(R² = {agreement:.2f}; trained on the data, teachers reach 0.3 to 0.95). Policies that act like it leave "
            "the states of the data, and their returns are poor: train a teacher on this dataset, or see whether "
            "states and actions are in the teacher's order and units",
            stacklevel=3,
        )
