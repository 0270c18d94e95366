"""The SDW paper's analysis: quality against diversity of the data, returns against τ, weights and errors along an
episode, diversity of the synthetic sets.

python -m benchmarks.studies.diversity

ranking: policies cloned on whole datasets of rising quality and falling diversity, stopped early and late: the return
against the training loss that was reached, where the ranking of the datasets may flip.
tau: returns of SDW against τ, from the rows of `benchmarks.studies.suite` (its ablations; τ = 0 is Av-PBC).
stages: where in an episode the density weights lie, and the errors of policies cloned on the suite's sets.
sets: how widely the suite's synthetic sets spread, from runs/suite.

Adds rows to results/diversity.jsonl (their `part` is one of the words above; rankings that are there are skipped, of
the others what differs is added), prints the tables, fills docs/results.md and draws docs/diversity_*.png.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import cells, report, tasks, work
from benchmarks.studies.report import markdown, mean_and_error, standard_error
from sdw_fast import MLPPolicy, SyntheticDataset, TransitionDataset
from sdw_fast.density import DensityWeights

TABLE = table.RESULTS / "diversity.jsonl"
ENVS = ("hopper", "walker2d")
QUALITIES = ("mixture", "medium", "medium-expert", "expert")  # rising quality
STOPS = (10, 20, 40, 80, 160, 320, 640, 1280, 2560)  # gradient steps after which a policy is looked at
POLICIES, EPISODES = 3, 8
SCALES = (10, 100, 500)  # k of the density
COVERED, NEIGHBORHOOD = 20_000, 80  # states of a dataset, and how many of them a neighborhood holds: 256 cover it


def rows(part: str, *keys: str) -> dict[Any, table.Entries]:
    """The newest row of each key of a part."""
    return table.latest((row for row in table.read(TABLE) if row["part"] == part), *keys)


def clone_in_stages(data: TransitionDataset, seed: int) -> list[tuple[float, float]]:
    """Behavior cloning by Adam; returns (loss on the dataset, normalized return) at every stop."""
    states, actions = work.normalized_pairs(data)
    reached, ones = [], torch.ones(len(states))
    settings: dict[str, Any] = {"hidden": (256, 256, 256), "gain": 1.0, "batch_size": 256, "lr": 3e-4}
    for step, params in enumerate(work.cloning(data, seed, steps=STOPS[-1], **settings), start=1):
        if step in STOPS:
            with torch.no_grad():
                loss = sdw.ops.behavior_matching(params, states, actions, ones)
            returns = work.normalized_returns(MLPPolicy(params, data.units), data, EPISODES, seed)
            reached.append((float(loss), float(returns.mean())))
    return reached


def measure_ranking(case: tuple[str, str]) -> None:
    """Clones POLICIES policies on one dataset and records what they reached."""
    env, quality = case
    work.one_thread()
    data = tasks.dataset(f"{env}/{quality}")
    reached = [clone_in_stages(data, seed=cells.TEST_SEED + i * EPISODES) for i in range(POLICIES)]
    row = {"part": "ranking", "env": env, "quality": quality, "stops": STOPS, "reached": reached}
    measured = sdw.diversity.diversity(data).to_dict()
    row |= {"diversity": measured, "mean_return": data.summary().get("normalized_return_mean")}
    table.append(TABLE, {**row, **table.origin()})


def ranking(jobs: int) -> str:
    """Measures what is missing, draws docs/diversity_ranking.png, and returns the section."""
    found = rows("ranking", "env", "quality")
    if missing := [case for env in ENVS for quality in QUALITIES if (case := (env, quality)) not in found]:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            pool.map(measure_ranking, missing, chunksize=1)
        found = rows("ranking", "env", "quality")
    figure = Figure(figsize=(5.5 * len(ENVS), 4.2), layout="constrained")
    lines = []
    for axes, env in zip(figure.subplots(1, len(ENVS), squeeze=False)[0], ENVS, strict=True):
        for quality in QUALITIES:
            content = found[env, quality]
            reached = np.array(content["reached"])  # (policies, stops, 2)
            loss, returns = reached.mean(0).T
            error = reached[..., 1].std(0, ddof=1) / np.sqrt(len(reached))
            axes.errorbar(loss, returns, error, marker="o", markersize=3, capsize=2, label=quality)
            at = [f"{r:.0f} ± {e:.0f} ({x:.3f})" for x, r, e in zip(loss, returns, error, strict=True)]
            spread = content["diversity"]
            lines.append([f"{env}/{quality}", f"{spread['entropy']:.1f}", f"{spread['participation_ratio']:.1f}", *at])
        axes.set(xscale="log", xlabel="training loss reached", ylabel="D4RL-normalized return", title=env)
        axes.invert_xaxis()
        axes.legend()
    report.save_picture(figure, report.DOCS / "diversity_ranking.png")
    header = ["cloned on", "entropy (nats)", "participation ratio", *(f"{stop} steps" for stop in STOPS)]
    return f"""## Quality against diversity

Policies cloned on whole datasets by Adam, looked at after ever more gradient steps: D4RL-normalized return, mean ±
standard error of {POLICIES} policies, {EPISODES} episodes each; in brackets the loss on the dataset. Entropy and
participation ratio of the states, each dataset in its own normalization.

{markdown(header, lines)}
"""


def tau() -> str:
    """Draws docs/diversity_tau.png from the suite's rows, and returns the section."""
    given = {overrides["tau"]: method for method, overrides in cells.ABLATIONS.items() if "tau" in overrides}
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.subplots()
    found, lines = cells.results(), []
    for task in cells.ABLATED:
        points = []
        by_size = _weights(tasks.dataset(task), k=cells.SETTINGS["k"]).tau  # of the effective sample size
        exponents = {0.0: "av-pbc", by_size: "sdw", **given}
        for exponent, method in sorted(exponents.items()):
            if values := cells.seeds_returns(found, task, method):
                points.append((exponent, np.mean(values), standard_error(values)))  # NaN, of one seed: no bar
            lines.append([task, f"{exponent:.2g}", mean_and_error(values, len(cells.seeds(method)))])
        if points:
            axes.errorbar(*np.array(points).T, marker="o", capsize=2, label=task)
    axes.set(xlabel="τ (0: Av-PBC)", ylabel="D4RL-normalized return")
    axes.legend()
    report.save_picture(figure, report.DOCS / "diversity_tau.png")
    return f"""## Return against τ

Densities of k = {cells.SETTINGS["k"]}; the τ that is not round is that of an effective sample size of
{cells.SETTINGS["ess"]}. A point without a bar is one seed.

{markdown(["task", "τ", "D4RL-normalized return"], lines)}
"""


def stages() -> str:
    """Measures weights and errors along an episode, and returns the section."""
    for task in cells.ABLATED:
        known = rows("stages", "task").get(task, {}).get("columns", {})
        if (columns := known | _along_an_episode(task)) != known:
            table.append(TABLE, {"part": "stages", "task": task, "columns": columns, **table.origin()})
    body = "\n\n".join(f"**{task}**\n\n{stages_table(task)}" for task in cells.ABLATED)
    return f"""## Weights and errors along an episode

Share of the transitions; mean density weight (effective sample size {cells.SETTINGS["ess"]}, clipped at quantile
{cells.SETTINGS["clip"]}) for several k; mean squared distance from the teacher's actions (normalized units) of policies
cloned on the suite's sets, {POLICIES} a set, mean over seeds.

{body}
"""


def stages_table(task: str) -> str:
    """Weights and errors of a task along an episode."""
    columns = rows("stages", "task")[task]["columns"]
    return report.stages_table(columns, work.STAGES)


def _along_an_episode(task: str) -> dict[str, list[float]]:
    """The columns of a task's table, a number a stage."""
    data = tasks.dataset(task)
    count = np.bincount(work.stages(data), minlength=len(work.STAGES) - 1)
    columns = {"share": (count / len(data)).tolist()}
    for k in SCALES:
        columns[f"weight, k = {k}"] = work.mean_of_stages(_weights(data, k).weights, data)
    targets, _ = tasks.teacher(task).label(data.observations, data.units, values=False)
    for method in ("av-pbc", "sdw"):
        if errors := [_errors(pairs, data, targets) for pairs in _sets(task, method)]:
            columns[f"error, {cells.METHODS[method]}"] = work.mean_of_stages(np.mean(errors, axis=0), data)
    return columns


def _weights(data: TransitionDataset, k: int) -> DensityWeights:
    """The suite's density weights at another scale."""
    return sdw.density_weights(sdw.log_density(data, k=k), ess=cells.SETTINGS["ess"], clip=cells.SETTINGS["clip"])


def _errors(pairs: SyntheticDataset, data: TransitionDataset, targets: np.ndarray) -> np.ndarray:
    """Of policies cloned on a set: (M,)."""
    return work.errors((sdw.behavior_clone(pairs, seed=seed) for seed in range(POLICIES)), data, targets)


def _sets(task: str, method: str) -> list[SyntheticDataset]:
    """The suite's synthetic sets of a method that lie in runs/suite, a seed each."""
    sets = [work.distilled((task, method, seed)) for seed in cells.seeds(method)]
    return [pairs for pairs in sets if pairs is not None]


def sets() -> str:
    """Measures the synthetic sets of runs/suite beside random pairs, and returns the section."""
    known = rows("sets", "task", "method")
    for task in tasks.TASKS:
        covered, random = _covered_and_random(task)
        for method in ("random", *cells.DISTILLED):
            found = [random] if method == "random" else [p.normalized()[0] for p in _sets(task, method)]
            measured = [_spread(points, covered) for points in found]
            figures = {name: float(np.mean([m[name] for m in measured])) for name in measured[0]} if measured else None
            if figures and figures != known.get((task, method), {}).get("spread"):
                row = {"part": "sets", "task": task, "method": method, "spread": figures}
                table.append(TABLE, {**row, **table.origin()})
    return f"""## Diversity of the synthetic sets

On normalized states, k = 10, mean over seeds. Coverage: the share of {COVERED:,} states of the dataset whose
neighborhood of {NEIGHBORHOOD} others holds a synthetic state.

{sets_table()}
"""


def sets_table() -> str:
    """How widely the sets of every task and method spread."""
    known = rows("sets", "task", "method")
    names = ("entropy", "participation_ratio", "neighbor_distance", "coverage")
    lines = [
        [task, label, *(f"{known[task, method]['spread'][name]:.2f}" for name in names)]
        for task in tasks.TASKS
        for method, label in cells.METHODS.items()
        if (task, method) in known
    ]
    return markdown(["task", "method", "entropy (nats)", "participation ratio", "neighbor distance", "coverage"], lines)


def _covered_and_random(task: str) -> tuple[np.ndarray, np.ndarray]:
    """States to be covered, and as many random others as a synthetic set has pairs."""
    states = work.normalized_pairs(tasks.dataset(task))[0].numpy()
    chosen = np.random.default_rng(0).choice(len(states), COVERED + cells.SETTINGS["size"], replace=False)
    return states[chosen[:COVERED]], states[chosen[COVERED:]]


def _spread(points: np.ndarray, covered: np.ndarray) -> dict[str, float]:
    figures: dict[str, Any] = sdw.diversity.diversity(points).to_dict()
    kept = {name: figures[name] for name in ("entropy", "participation_ratio", "neighbor_distance")}
    return kept | {"coverage": sdw.diversity.coverage(covered, points, k=NEIGHBORHOOD)}


def write_page() -> None:
    """Fills the study's table of docs/results.md."""
    report.fill("stages", stages_table("hopper/medium"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="datasets at a time")
    options = parser.parse_args()
    for section in (ranking(options.jobs), tau(), stages(), sets()):
        print(section)
    write_page()


if __name__ == "__main__":
    main()
