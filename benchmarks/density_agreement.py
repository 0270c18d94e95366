"""Do nearest neighbors, a flow and a kernel estimate agree on which states are rare? Tables for docs/density.md.

python -m benchmarks.density_agreement                            # the suite's medium datasets, collected if missing
python -m benchmarks.density_agreement DATASET ... --states 20000 --pictures docs

The estimates take a minute or two a dataset and are cached beside it.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

import sdw_fast as sdw
from sdw_fast import plots

SUITE = ("hopper/medium", "halfcheetah/medium", "walker2d/medium")
METHODS = ("knn", "flow", "kde")
PAIRS = list(itertools.combinations(METHODS, 2))


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


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def picture(estimates: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Log-densities of one method against those of another, a row of panels for each dataset."""
    figure = Figure(figsize=(11, 3.4 * len(estimates)), layout="constrained")
    grid = figure.subplots(len(estimates), len(PAIRS), squeeze=False)
    for panels, (dataset, logd) in zip(grid, estimates.items(), strict=True):
        for panel, (a, b) in zip(panels, PAIRS, strict=True):
            (left, right), (low, high) = (np.quantile(logd[method], [0.002, 0.998]) for method in (a, b))
            panel.hexbin(
                logd[a], logd[b], gridsize=60, extent=(left, right, low, high), bins="log", mincnt=1, linewidths=0
            )
            panel.set(xlabel=f"log-density, {a}", ylabel=f"log-density, {b}", xlim=(left, right), ylim=(low, high))
            panel.set_title(f"{dataset}: rank correlation {spearmanr(logd[a], logd[b])[0]:.2f}", fontsize="medium")
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
        states = data.normalized_observations
        logd = estimates[name] = {method: sdw.log_density(data, method, progress=True) for method in METHODS}
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

        measured = sdw.diversity(data)
        estimated = [f"{sdw.estimate_dimension(states, k):.1f}" for k in (5, 10, 20, 50)]
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
    print(table(["dataset", "states", *pairs, *(f"rarest: {p}" for p in pairs)], agreement))
    print("\nRank correlation with the default choices (k = 10, all states as references, seed 0)\n")
    print(table(["dataset", "knn, k = 3", "knn, k = 50", "knn, a tenth as references", "flow, another seed"], choices))
    print("\nDimension: columns that vary, participation ratio, Levina-Bickel estimate\n")
    print(table(["dataset", "ambient", "participation", *(f"k = {k}" for k in (5, 10, 20, 50))], dimensions))
    print("\nSpread of the log-density (standard deviation, 5% to 95%) and τ for an effective sample size\n")
    print(table(["dataset", "estimate", "std", "5–95%", "τ for 75%", "τ for 50%", "τ for 25%"], spread))
    if options.pictures:
        data = sample(options.datasets[0], options.states, options.seed)
        logd = sdw.log_density(data)
        weights = sdw.density_weights(logd, ess=0.5)
        plots.save(picture(estimates), options.pictures / "density_agreement.png")
        plots.save(plots.plot_density(data.normalized_observations, logd, weights), options.pictures / "density.png")
        plots.save(plots.plot_tau(logd, chosen=weights.tau), options.pictures / "density_tau.png")


if __name__ == "__main__":
    main()
