"""The picture of docs/performance.md: time per outer step against the width and N, from the recorded sweeps.

    python -m benchmarks.plot_unrolled_bc

reads benchmarks/results/unrolled_bc.jsonl and writes docs/outer_step.png.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from benchmarks.bench_unrolled_bc import SWEPT
from benchmarks.model import Problem
from benchmarks.studies.report import DOCS, save_picture
from benchmarks.timing import recorded

SHOWN = {
    "sdw_fast": "tab:blue",
    "JAX jit(grad(scan))": "tab:orange",
    "closed form in PyTorch (twin)": "tab:green",
    "autograd double backward (papers)": "tab:red",
}
PEAK = 220e9  # multiply-adds counted as two, a second: both cores of the recorded machine (Zen 4, AVX-512)


def at_the_peak(problem: Problem) -> float:
    """Seconds of all matrix products of an outer step at the FMA peak."""
    total = 0
    for layer, (inputs, outputs) in enumerate(problem.layers):
        more = layer > 0  # of the first layer nothing goes back, and its inputs do not move
        inner = problem.steps * problem.size * (6 + 3 * more)  # three or two to train, six or four for the adjoint
        total += inputs * outputs * (inner + problem.batch * (2 + more))
    return 2 * total / PEAK


def main() -> None:
    tables = recorded()
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, (swept, sizes) in zip(figure.subplots(1, 2), SWEPT.items(), strict=True):
        found = {size: tables[name] for size in sizes if (name := f"unrolled_bc/{swept}={size}") in tables}
        for name, color in SHOWN.items():
            medians = [table[name].median for table, _ in found.values()]
            axes.plot(list(found), [1e3 * (m or float("nan")) for m in medians], "o-", color=color, label=name)
        peaks = [1e3 * at_the_peak(sizes[size]) for size in found]
        axes.plot(list(found), peaks, "k--", label="FMA peak of both cores")
        axes.set(xscale="log", yscale="log", xlabel=swept, xticks=list(found), xticklabels=list(found))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set(xlabel="units of the three hidden layers (N = 256)", ylabel="ms an outer step, T = 20")
    figure.axes[1].set(xlabel="N (256 units)")
    figure.axes[0].legend(frameon=False, fontsize="small")
    save_picture(figure, DOCS / "outer_step.png")


if __name__ == "__main__":
    main()
