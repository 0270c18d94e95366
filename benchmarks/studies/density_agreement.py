"""Do nearest neighbors, a flow and a kernel estimate agree on which states are rare? Tables for docs/density.md.

python -m benchmarks.studies.density_agreement                    # the suite's medium datasets, collected if missing
python -m benchmarks.studies.density_agreement DATASET ... --states 20000 --pictures docs

The estimates take a minute or two a dataset; neighbors and flows are cached beside it.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr

import sdw_fast as sdw
from benchmarks.studies.report import markdown, save_picture
from benchmarks.studies.work import normalized_pairs
from sdw_fast import plots

SUITE = ("hopper/medium", "halfcheetah/medium", "walker2d/medium")
METHODS = ("knn", "flow", "kde")
PAIRS = list(itertools.combinations(METHODS, 2))


def kde_log_density(states: np.ndarray | torch.Tensor, *, bandwidth: str | float = "scott") -> np.ndarray:
    """Log-density of every state under a Gaussian kernel density estimate, leave-one-out, for comparison at small M.

        d(s_i) = 1/(M − 1) · Σ_{j≠i} Π_c N(s_ic; s_jc, (h σ_c)²)

    with σ_c the standard deviation of column c. Work and time are M² D; memory is bounded by blocks.

    Args:
        states: (M, D), normalized. Constant columns are left out.
        bandwidth: h in standard deviations. "scott": M^(−1/(D+4)); "silverman": (M (D+2)/4)^(−1/(D+4)); or a number.

    Returns:
        (M,) float64 natural logarithms.

    Raises:
        ValueError: one state, no column varies, or a bandwidth not understood.
    """
    x = torch.as_tensor(states).double()
    if len(x) < 2:
        raise ValueError("one state has no density: give at least 2")
    x = x[:, (x != x[0]).any(dim=0)]
    count, columns = x.shape
    if columns == 0:
        raise ValueError("all states are equal, so they have no density")
    if bandwidth == "scott":
        h = count ** (-1 / (columns + 4))
    elif bandwidth == "silverman":
        h = (count * (columns + 2) / 4) ** (-1 / (columns + 4))
    elif not isinstance(bandwidth, str) and bandwidth > 0 and math.isfinite(bandwidth):
        h = float(bandwidth)
    else:
        raise ValueError(f"bandwidth must be 'scott', 'silverman' or a positive number, got {bandwidth!r}")
    width = h * x.std(dim=0)
    x = (x - x.mean(dim=0)) / width
    log_kernels = torch.empty(count, dtype=torch.float64)
    rows = max(1, (1 << 23) // count)  # a block of distances takes 64 MB
    for start in range(0, count, rows):
        block = x[start : start + rows]
        exponent = torch.cdist(block, x).square_().mul_(-0.5)  # (B, M)
        own = torch.arange(len(block))
        exponent[own, start + own] = -torch.inf
        log_kernels[start : start + rows] = torch.logsumexp(exponent, dim=1)
    normalization = math.log(count - 1) + columns * math.log(2 * math.pi) / 2 + float(width.log().sum())
    return (log_kernels - normalization).numpy()


def log_densities(data: sdw.TransitionDataset) -> dict[str, np.ndarray]:
    """The log-density of every state by each method."""
    logd = {method: sdw.log_density(data, method, progress=True) for method in ("knn", "flow")}
    return {**logd, "kde": kde_log_density(normalized_pairs(data)[0])}


def sample(dataset: str, count: int, seed: int) -> sdw.TransitionDataset:
    """At most `count` random transitions of a dataset; one of the suite is collected where it is missing."""
    try:
        data = sdw.load_dataset(dataset)
    except (FileNotFoundError, ValueError):
        if dataset not in SUITE:
            raise
        data = sdw.load_dataset(sdw.collect(dataset, steps=100_000, seed=0))
    rows = np.random.default_rng(seed).choice(len(data), min(count, len(data)), replace=False)
    return data.subset(np.sort(rows))


def rarest_shared(a: np.ndarray, b: np.ndarray, share: float = 0.1) -> float:
    """Fraction of the rarest tenth by `a` that belongs to the rarest tenth by `b`; 0.1 by chance."""
    return float(np.mean(b[a <= np.quantile(a, share)] <= np.quantile(b, share)))


def picture(estimates: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Log-densities of one method against those of another, a row of panels for each dataset."""
    figure = Figure(figsize=(9.6, 3 * len(estimates)), layout="constrained")
    grid = figure.subplots(len(estimates), len(PAIRS), squeeze=False)
    for panels, (dataset, logd) in zip(grid, estimates.items(), strict=True):
        for panel, (a, b) in zip(panels, PAIRS, strict=True):
            (left, right), (low, high) = (np.quantile(logd[method], [0.002, 0.998]) for method in (a, b))
            extent = (left, right, low, high)
            cells = panel.hexbin(logd[a], logd[b], gridsize=40, extent=extent, bins="log", mincnt=1, linewidths=0)
            cells.set_antialiased(False)  # the seams between cells would be most of the file
            panel.set(xlabel=f"log-density, {a}", ylabel=f"log-density, {b}", xlim=(left, right), ylim=(low, high))
            panel.set_title(f"{dataset}\nrank correlation {spearmanr(logd[a], logd[b])[0]:.2f}", fontsize="medium")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", default=SUITE, metavar="DATASET")
    parser.add_argument("--states", type=int, default=20_000, help="random states of each dataset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="where to draw; weights are the first dataset's"
    )
    options = parser.parse_args()

    estimates: dict[str, dict[str, np.ndarray]] = {}
    agreement, choices, dimensions, spread = [], [], [], []
    for name in options.datasets:
        data = sample(name, options.states, options.seed)
        states = normalized_pairs(data)[0].numpy()
        logd = estimates[name] = log_densities(data)
        agreement.append(
            [name, f"{len(data):,}"]
            + [f"{spearmanr(logd[a], logd[b])[0]:.2f}" for a, b in PAIRS]
            + [f"{rarest_shared(logd[a], logd[b]):.0%}" for a, b in PAIRS]
        )

        variants = [
            (logd["knn"], sdw.log_density(data, k=3)),
            (logd["knn"], sdw.log_density(data, k=50)),
            (logd["knn"], sdw.log_density(data, references=len(data) // 10)),
            (logd["flow"], sdw.log_density(data, "flow", seed=1, progress=True)),
        ]
        choices.append([name] + [f"{spearmanr(a, b)[0]:.2f}" for a, b in variants])

        measured = sdw.diversity.diversity(data)
        estimated = [f"{sdw.diversity.estimate_dimension(states, k):.1f}" for k in (5, 10, 20, 50)]
        dimensions.append([name, str(measured.dimension), f"{measured.participation_ratio:.1f}", *estimated])
        candidates = {
            "knn, ambient": logd["knn"],
            "knn, intrinsic": sdw.log_density(data, dimension="intrinsic"),
            "flow": logd["flow"],
            "kde": logd["kde"],
        }
        for method, values in candidates.items():
            low, high = np.quantile(values, [0.05, 0.95])
            taus = [sdw.density_weights(values, ess=ess).tau for ess in (0.75, 0.5, 0.25)]
            spread.append([name, method, f"{values.std():.1f}", f"{high - low:.1f}", *(f"{tau:.2f}" for tau in taus)])

    pairs = [f"{a}, {b}" for a, b in PAIRS]
    print("\nSpearman's rank correlation, and the shared part of the rarest tenth\n")
    print(markdown(["dataset", "states", *pairs, *(f"rarest: {p}" for p in pairs)], agreement))
    print("\nRank correlation with the default choices (k = 10, all states as references, seed 0)\n")
    print(
        markdown(["dataset", "knn, k = 3", "knn, k = 50", "knn, a tenth as references", "flow, another seed"], choices)
    )
    print("\nDimension: columns that vary, participation ratio, Levina-Bickel estimate\n")
    print(markdown(["dataset", "ambient", "participation", *(f"k = {k}" for k in (5, 10, 20, 50))], dimensions))
    print("\nSpread of the log-density (standard deviation, 5% to 95%) and τ for an effective sample size\n")
    print(markdown(["dataset", "estimate", "std", "5–95%", "τ for 75%", "τ for 50%", "τ for 25%"], spread))
    if options.pictures:
        data = sample(options.datasets[0], options.states, options.seed)
        logd = sdw.log_density(data)
        weights = sdw.density_weights(logd, ess=0.5)
        states = normalized_pairs(data)[0].numpy()
        save_picture(picture(estimates), options.pictures / "density_agreement.png")
        save_picture(plots.plot_density(states, logd, weights), options.pictures / "density.png")
        save_picture(plots.plot_tau(logd, chosen=weights.tau), options.pictures / "density_tau.png")


if __name__ == "__main__":
    main()
