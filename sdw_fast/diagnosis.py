"""What a run's figures mean, in words: what went wrong, by which sign, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdw_fast.config import DistillConfig
from sdw_fast.objectives import LEAST_AGREEMENT, MANY_FLOORED, SMALL_SAMPLE

# Beyond these a figure is worth a sentence. Growth of single hypergradients by orders of magnitude is the sign of
# chaotic inner training (docs/method.md, conditioning).
_GROWTH = 100.0
_LOST = 0.8  # of the best score


@dataclass(frozen=True)
class Finding:
    """A sentence about a run; `bad` where something should be changed."""

    text: str
    bad: bool = True


def diagnose(
    config: DistillConfig, objective: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]
) -> list[Finding]:
    """Reads the figures of a run.

    Args:
        config: Its settings.
        objective: The report of its outer problem, as config.json holds it.
        metrics: One dict an outer step, as `read_metrics` gives them.

    Returns:
        What is wrong, and what to do; one good finding where nothing is.
    """
    findings = [*_progress(config, metrics), *_stability(metrics)]
    findings += [*_teacher(objective), *_weights(objective), *_scores(config, metrics)]
    if not any(finding.bad for finding in findings):
        findings.insert(0, Finding("Nothing looks wrong.", bad=False))
    return findings


def _progress(config: DistillConfig, metrics: Sequence[Mapping[str, float]]) -> list[Finding]:
    if len(metrics) < config.steps:
        text = f"Unfinished: {len(metrics):,} of {config.steps:,} outer steps. sdw-fast distill --resume RUN goes on."
        return [Finding(text, bad=False)]
    losses = _finite(metrics, "loss")
    part = len(losses) // 10
    if part and np.mean(losses[-part:]) > 0.98 * np.mean(losses[:part]):
        return [
            Finding(
                "The outer loss did not fall. Try another lr, more inner_steps, or a larger inner_lr. Where real pairs "
                "are good already, little is to be gained."
            )
        ]
    return []


def _stability(metrics: Sequence[Mapping[str, float]]) -> list[Finding]:
    findings = []
    left_out = sum(not math.isfinite(step.get("loss", math.nan)) for step in metrics)
    if left_out:
        findings.append(
            Finding(
                f"{left_out:,} of {len(metrics):,} outer steps were left out, for the hypergradient was not finite: "
                "inner training diverges. Lower inner_lr or gain, or set window."
            )
        )
    growth = _finite(metrics, "adjoint_growth")
    late = growth[-max(len(growth) // 10, 1) :]
    if len(late) and float(np.median(late)) > _GROWTH:
        findings.append(
            Finding(
                f"Diverging: the unroll amplifies a change by {np.median(late):.3g} at the end (adjoint growth, which "
                "stays below 100 in healthy runs). Lower inner_lr, gain or inner_steps, or set window."
            )
        )
    return findings


def _teacher(objective: Mapping[str, Any]) -> list[Finding]:
    agreement = objective.get("teacher_agreement")
    if not isinstance(agreement, (int, float)) or agreement >= LEAST_AGREEMENT:
        return []
    return [
        Finding(
            f"The teacher acts unlike the dataset (R² = {agreement:.2f} of its actions for the data's): its policies "
            "leave the states of the data. Train a teacher on this dataset, or see whether states and actions are in "
            "its order and units."
        )
    ]


def _weights(objective: Mapping[str, Any]) -> list[Finding]:
    findings = []
    states = objective.get("states") or 1
    floored = (objective.get("weights_floored") or 0) / states
    if floored > MANY_FLOORED:
        findings.append(
            Finding(
                f"{floored:.0%} of the states have weight 0, because the teacher's Q is negative there. Use "
                "value_weights=shifted, which no zero of Q matters to."
            )
        )
    effective = objective.get("effective_sample_size")
    if isinstance(effective, (int, float)) and effective < SMALL_SAMPLE:
        findings.append(
            Finding(
                f"Few states decide: the effective sample size is {effective:.0%} of the dataset. Raise ess, or lower "
                "tau or clip; if it is Q that varies so much, compare with objective pbc."
            )
        )
    return findings


def _scores(config: DistillConfig, metrics: Sequence[Mapping[str, float]]) -> list[Finding]:
    measured = [step for step in metrics if math.isfinite(step.get("score", math.nan))]
    if not measured:
        return [Finding("Not evaluated. sdw-fast evaluate RUN/best.npz tells what its policies return.", bad=False)]
    findings = []
    scores = [step["score"] for step in measured]
    if scores[-1] < _LOST * max(scores):
        best = measured[int(np.argmax(scores))]["step"]
        findings.append(
            Finding(
                f"The return fell from {max(scores):.1f} at step {best:,.0f} to {scores[-1]:.1f}. best.npz is the "
                "best; single evaluations are noisy, so measure both with more episodes."
            )
        )
    spread = measured[-1].get("score_std", 0.0)
    if spread > 0.5 * abs(scores[-1]) and config.fixed_initialization is None:  # a fixed one gives no ensemble
        findings.append(
            Finding(
                f"Episodes differ by {spread:.0f} points (sd): some policies fail. Their mean action is steadier: "
                "behavior_clone(ensemble=10).",
                bad=False,
            )
        )
    return findings


def _finite(metrics: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [step[name] for step in metrics if math.isfinite(step.get(name, math.nan))]
