"""The package's figures. Each function returns a matplotlib Figure that no global state knows of; `save` writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sdw_fast.density import DensityWeights, density_weights
from sdw_fast.disk import replacing

Metrics = Sequence[Mapping[str, float]]  # one dict an outer step
# Figures of a run that are worth a panel, and what it is called.
PANELS = {
    "loss": "outer loss",
    "held_out_loss": "outer loss on states held out",
    "gradient_norm": "hypergradient norm",
    "adjoint_growth": "adjoint growth ‖λ_0‖ / ‖λ_T‖",
    "score": "score (normalized return)",
}
POINTS = 20_000  # drawn in a scatter plot at most: more hide one another and make files heavy


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure, whole or not at all; the suffix of `path` chooses the format (.png, .pdf, .svg)."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def principal_components(states: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (D,), the leading principal axes (D, count) and the share of the variance of each (count,) of (M, D) states.

    An axis points where its largest component is positive, so that pictures do not flip between runs. Where D < count
    the missing axes are zero.
    """
    mean = states.mean(axis=0, dtype=np.float64)
    covariance = np.atleast_2d(np.cov(states, rowvar=False, dtype=np.float64))
    variance, axes = np.linalg.eigh(covariance)
    variance, axes = variance[::-1][:count], axes[:, ::-1][:, :count]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    share = variance / max(np.trace(covariance), np.finfo(float).tiny)
    missing = count - axes.shape[1]
    return mean, np.pad(axes, ((0, 0), (0, missing))), np.pad(share, (0, missing))


def plot_density(observations: np.ndarray, logd: np.ndarray, weights: DensityWeights, *, seed: int = 0) -> Figure:
    """Draws the density histogram, the weights against the density, and the states colored by log-density.

    Args:
        observations: (M, D) states, normalized.
        logd: (M,) their log-densities.
        weights: what `density_weights` made of them.
        seed: of the states drawn where there are more than 20,000.
    """
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    histogram, against, scatter = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])

    _draw_histogram(histogram, logd, weights)
    order = np.argsort(logd, kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, 2000).astype(int))]
    against.plot(logd[order], weights.weights[order], color="tab:red")
    against.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
    against.set(xlabel="log-density (nats)", ylabel="weight (mean 1)", yscale="log")
    against.set_title(
        f"τ = {weights.tau:.3g}: effective sample size {weights.effective_sample_size:.1%}\n"
        f"largest weight {weights.largest:.3g}, rarest 1% carry {weights.rarest_share:.1%}",
        fontsize="medium",
    )

    rows = _sample(len(logd), seed)
    rows = rows[np.argsort(-logd[rows], kind="stable")]  # rare states on top: they are what one looks for
    mean, axes, share = principal_components(observations)
    position = (observations[rows] - mean) @ axes
    low, high = np.quantile(logd, [0.02, 0.98])  # the outermost states would take all of the colors
    points = scatter.scatter(
        *position.T, c=logd[rows], s=3, linewidths=0, cmap="viridis", vmin=low, vmax=high, rasterized=True
    )
    scatter.set(xlabel=f"component 1 ({share[0]:.0%} of variance)", ylabel=f"component 2 ({share[1]:.0%})")
    scatter.set_title("states, two principal components")
    figure.colorbar(points, ax=scatter, label="log-density (nats)", extend="both")
    return figure


def _draw_histogram(axes: Axes, logd: np.ndarray, weights: DensityWeights) -> None:
    """The log-densities of the states, counted and weighted."""
    bins = np.linspace(logd.min(), logd.max(), 80).tolist() if logd.min() < logd.max() else 10
    axes.hist(logd, bins=bins, color="0.75", label="dataset")
    axes.hist(logd, bins=bins, weights=weights.weights, histtype="step", color="tab:red", label="weighted")
    axes.set(xlabel="log-density (nats)", ylabel="states", title=f"{len(logd):,} states")
    axes.legend(frameon=False)


def plot_metrics(runs: Mapping[str, Metrics]) -> Figure:
    """Draws the learning curves of runs: outer loss, hypergradient norm, adjoint growth, and what is measured now
    and then: the loss on states held out, and the score.

    Args:
        runs: for each run its name and its metrics, one dict an outer step, as `read_metrics` gives them.
    """
    names = [name for name in PANELS if any(name in step for metrics in runs.values() for step in metrics)]
    figure = Figure(figsize=(4.6 * max(len(names), 1), 3.8), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, max(len(names), 1))), names, strict=False):
        for run, metrics in runs.items():
            _draw_curve(axes, metrics, name, run)
        axes.set(xlabel="outer step", title=PANELS[name], yscale="linear" if name == "score" else "log")
        axes.legend(frameon=False)
    return figure


def plot_report(
    runs: Mapping[str, Metrics],
    baselines: Mapping[str, float],
    states: np.ndarray,
    logd: np.ndarray,
    weights: DensityWeights,
    synthetic: Mapping[str, np.ndarray],
) -> Figure:
    """Draws a comparison of distillations of one dataset: learning curves, densities, and where the sets lie.

    Args:
        runs: for each run its name and its metrics, with a score at the steps where it was measured.
        baselines: scores to draw as horizontal lines.
        states: (M, D) states of the dataset, normalized.
        logd: (M,) their log-densities.
        weights: what `density_weights` made of them.
        synthetic: for each run its name and its synthetic states (N, D), normalized.
    """
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    curves, histogram, scatter = figure.subplots(1, 3)
    for run, metrics in runs.items():
        _draw_curve(curves, metrics, "score", run)
    for (name, score), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        curves.axhline(score, color="0.4", linestyle=style, label=name)
    curves.set(xlabel="outer step", ylabel="D4RL-normalized return", title="policies cloned on the synthetic set")
    if curves.lines:
        curves.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False)

    _draw_histogram(histogram, logd, weights)

    mean, axes, share = principal_components(states)
    position = (states[_sample(len(states), 0)] - mean) @ axes
    scatter.scatter(*position.T, c="0.8", s=2, linewidths=0, rasterized=True, label="dataset")
    for (name, points), color in zip(synthetic.items(), ("tab:blue", "tab:orange", "tab:green"), strict=False):
        scatter.scatter(*((points - mean) @ axes).T, s=14, color=color, linewidths=0, alpha=0.8, label=name)
    scatter.set(xlabel=f"component 1 ({share[0]:.0%} of variance)", ylabel=f"component 2 ({share[1]:.0%})")
    scatter.set_title("real and synthetic states")
    scatter.legend(frameon=False, markerscale=2)
    return figure


def smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The running mean over a 50th of the steps, at the last step of each window."""
    window = max(len(values) // 50, 1)
    return steps[window - 1 :], np.convolve(values, np.full(window, 1 / window), mode="valid")


def _draw_curve(axes: Axes, metrics: Metrics, name: str, label: str) -> None:
    """One figure of a run against the outer step, where finite; those of every step smoothed over a 50th of the run."""
    points = [(step["step"], step[name]) for step in metrics if np.isfinite(step.get(name, np.nan))]
    if not points:
        return
    steps, values = np.array(points).T
    axes.plot(*((steps, values) if name == "score" else smoothed(steps, values)), label=label)


def plot_tau(logd: np.ndarray, *, clip: float = 0.99, chosen: float | None = None) -> Figure:
    """Draws what τ costs: effective sample size, largest weight and the share of the rarest 1% against τ.

    Args:
        logd: (M,) log-densities, not all equal.
        clip: quantile that weights are clipped at, as in `density_weights`.
        chosen: a τ to mark.

    Raises:
        ValueError: as `density_weights`, or all log-densities are equal.
    """
    lowest = np.quantile(logd, 1 - clip)
    if lowest >= logd.max():
        raise ValueError("all log-densities are equal: every tau gives equal weights")
    smallest = np.count_nonzero(logd <= lowest) / len(logd)  # the effective sample size as τ grows without bound
    low, high = (density_weights(logd, ess=smallest + part * (1 - smallest), clip=clip).tau for part in (0.98, 0.03))
    if chosen:
        low, high = min(low, chosen), max(high, chosen)
    results = [density_weights(logd, tau=tau, clip=clip) for tau in np.geomspace(low, high, 40).tolist()]
    taus = [result.tau for result in results]

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(taus, [result.effective_sample_size for result in results], label="effective sample size")
    left.plot(taus, [result.rarest_share for result in results], label="weight of the rarest 1%")
    left.set(xscale="log", xlabel="τ", ylabel="fraction", ylim=(0, 1))
    left.legend(frameon=False)
    right.plot(taus, [result.largest for result in results], color="tab:red")
    right.set(xscale="log", yscale="log", xlabel="τ", ylabel="largest weight (mean 1)")
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if chosen:
            _mark(axes, chosen)
    return figure


def _mark(axes: Axes, tau: float) -> None:
    axes.axvline(tau, color="0.3", linestyle="--", linewidth=1)
    axes.annotate(f" τ = {tau:.3g}", (tau, 1), xycoords=("data", "axes fraction"), va="top", fontsize="small")


def _sample(count: int, seed: int) -> np.ndarray:
    """At most POINTS rows of `count`, without replacement."""
    return np.random.default_rng(seed).choice(count, min(count, POINTS), replace=False)
