"""The README's picture: what each policy returns, cloned on 256 pairs, beside the mean and the published number.

    python -m benchmarks.studies.spread

reads benchmarks/results/suite.jsonl and writes docs/spread.png.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from benchmarks import table
from benchmarks.studies.cells import PUBLISHED, TABLE
from benchmarks.studies.report import DOCS, save_picture

SHOWN = {"random": ("256 real pairs", "0.55"), "sdw-mild": ("256 synthetic pairs (SDW)", "tab:blue")}


def main() -> None:
    rows = [row for row in table.read(TABLE) if row["method"] in SHOWN]
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for place, (task, published) in enumerate(PUBLISHED.items()):
        for side, (method, (label, color)) in zip((-0.18, 0.18), SHOWN.items(), strict=True):
            policies = np.concatenate(
                [row["policies"] for row in rows if (row["task"], row["method"]) == (task, method)]
            )
            across = place + side + rng.uniform(-0.08, 0.08, len(policies))
            axes.scatter(across, policies, s=9, color=color, alpha=0.5, linewidths=0)
            mean, std = policies.mean(), policies.std()
            known = {"label": label} if place == 0 else {}
            axes.errorbar(place + side, mean, std, fmt="o", color=color, mec="black", capsize=4, zorder=3, **known)
        line = {"label": "published SDW (mean)"} if place == 0 else {}
        axes.hlines(published, place - 0.35, place + 0.35, color="tab:red", linestyle="--", **line)
    names = [task.replace("/", "\n") for task in PUBLISHED]
    axes.set(ylabel="D4RL-normalized return", xticks=range(len(PUBLISHED)), xticklabels=names, ylim=(None, 118))
    axes.set_title("each dot is one policy, cloned in seconds; bars are mean ± standard deviation", fontsize="medium")
    axes.legend(frameon=False, ncols=3)
    save_picture(figure, DOCS / "spread.png")


if __name__ == "__main__":
    main()
