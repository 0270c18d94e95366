"""The SDW paper's analysis: quality against diversity of the data, returns against τ, weights and errors along an
episode, diversity of the synthetic sets.

python -m benchmarks.diversity_study

ranking: policies cloned on whole datasets of rising quality and falling diversity, stopped early and late: the return
against the training loss that was reached, where the ranking of the datasets may flip.
tau: returns of SDW against τ, from the results of `benchmarks.suite` (its ablations; τ = 0 is Av-PBC).
stages: where in an episode the density weights lie, and the errors of policies cloned on the suite's sets.
sets: how widely the suite's synthetic sets spread, from runs/suite.

Writes results/diversity/*.json, results/diversity.md and docs/diversity_*.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import sdw_fast as sdw
from benchmarks import suite
from benchmarks.table import machine, markdown, write_text
from benchmarks.train_teachers import ROOT, TASKS, dataset, path
from sdw_fast import plots
from sdw_fast.data import TransitionDataset, normalize_actions
from sdw_fast.density import DensityWeights
from sdw_fast.synthetic import SyntheticDataset
from sdw_fast.teacher import Teacher

RESULTS, DOCS = suite.RESULTS.parent / "diversity", ROOT / "docs"
ENVS = ("hopper", "walker2d")
QUALITIES = ("medium-replay", "medium", "medium-expert", "expert")  # rising quality
STOPS = (10, 20, 40, 80, 160, 320, 640, 1280, 2560)  # gradient steps after which a policy is looked at
POLICIES, EPISODES = 3, 8
STAGES = (0, 1, 10, 40, 100, 200, 400, 1000)  # steps into an episode, from each to the next
SCALES = (10, 100, 500)  # k of the density
COVERED, NEIGHBORHOOD = 20_000, 80  # states of a dataset, and how many of them a neighborhood holds: 256 cover it


def clone_in_stages(data: TransitionDataset, seed: int) -> list[tuple[float, float]]:
    """Behavior cloning by Adam; returns (loss on the dataset, normalized return) at every stop."""
    states = torch.from_numpy(data.normalized_observations)
    actions = torch.from_numpy(normalize_actions(data.actions, *data.action_bounds))
    reached, ones = [], torch.ones(len(states))
    assert data.env_id is not None
    settings: dict[str, Any] = {"hidden": (256, 256, 256), "gain": 1.0, "batch_size": 256, "lr": 3e-4}
    for step, params in enumerate(suite.cloning(data, seed, steps=STOPS[-1], **settings), start=1):
        if step in STOPS:
            with torch.no_grad():
                loss = sdw.ops.behavior_matching(params, states, actions, ones)
            policy = suite.policy_of(data, params)
            result = sdw.evaluate(policy, data.env_id, episodes=EPISODES, seed=seed)
            reached.append((float(loss), result.normalized_mean or 0.0))
    return reached


def measure_ranking(case: tuple[str, str]) -> None:
    """Clones POLICIES policies on one dataset and writes what they reached."""
    env, quality = case
    torch.set_num_threads(1)
    sdw.set_num_threads(1)
    data = dataset(f"{env}/{quality}")
    spread = sdw.diversity(data)
    reached = [clone_in_stages(data, seed=suite.TEST_SEED + i * EPISODES) for i in range(POLICIES)]
    content = {"env": env, "quality": quality, "stops": STOPS, "reached": reached, "machine": machine()}
    content |= {"diversity": spread.to_dict(), "mean_return": data.summary().get("normalized_return_mean")}
    write_text(ranking_file(case), json.dumps(content, indent=1) + "\n")


def ranking_file(case: tuple[str, str]) -> Path:
    return RESULTS / f"ranking-{case[0]}-{case[1]}.json"


def ranking(jobs: int) -> str:
    """Measures what is missing, draws docs/diversity_ranking.png, and returns the section of the page."""
    cases = [(env, quality) for env in ENVS for quality in QUALITIES]
    if missing := [case for case in cases if not ranking_file(case).exists()]:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            pool.map(measure_ranking, missing, chunksize=1)
    figure = Figure(figsize=(5.5 * len(ENVS), 4.2), layout="constrained")
    rows = []
    for axes, env in zip(figure.subplots(1, len(ENVS), squeeze=False)[0], ENVS, strict=True):
        for quality in QUALITIES:
            content = json.loads(ranking_file((env, quality)).read_text())
            reached = np.array(content["reached"])  # (policies, stops, 2)
            loss, returns = reached.mean(0).T
            error = reached[..., 1].std(0, ddof=1) / np.sqrt(len(reached))
            axes.errorbar(loss, returns, error, marker="o", markersize=3, capsize=2, label=quality)
            at = [f"{r:.0f} ± {e:.0f} ({x:.3f})" for x, r, e in zip(loss, returns, error, strict=True)]
            spread = content["diversity"]
            rows.append([f"{env}/{quality}", f"{spread['entropy']:.1f}", f"{spread['participation_ratio']:.1f}", *at])
        axes.set(xscale="log", xlabel="training loss reached", ylabel="D4RL-normalized return", title=env)
        axes.invert_xaxis()
        axes.legend()
    plots.save(figure, DOCS / "diversity_ranking.png")
    header = ["cloned on", "entropy (nats)", "participation ratio", *(f"{stop} steps" for stop in STOPS)]
    return f"""## Quality against diversity

Policies cloned on whole datasets by Adam, looked at after ever more gradient steps: D4RL-normalized return, mean ±
standard error of {POLICIES} policies, {EPISODES} episodes each; in brackets the loss on the dataset. Entropy and
participation ratio of the states, each dataset in its own normalization.

![return against loss](../../docs/diversity_ranking.png)

{markdown(header, rows)}
"""


def tau() -> str:
    """Draws docs/diversity_tau.png from the suite's results, and returns the section of the page."""
    given = {overrides["tau"]: method for method, overrides in suite.ABLATIONS.items() if "tau" in overrides}
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.subplots()
    rows = []
    for task in suite.ABLATED:
        points = []
        found = _weights(dataset(task), k=suite.SETTINGS["k"]).tau  # by the effective sample size
        exponents = {0.0: "av-pbc", found: "sdw", **given}
        for exponent, method in sorted(exponents.items()):
            cells = [cell for seed in suite.SEEDS if suite.done(cell := (task, method, seed))]
            values = [json.loads(suite.result_path(cell).read_text())["normalized_return"] for cell in cells]
            if values:
                points.append((exponent, np.mean(values), suite.standard_error(values)))  # NaN, of one seed: no bar
            rows.append([task, f"{exponent:.2g}", suite.mean_and_error(values, len(suite.SEEDS))])
        if points:
            axes.errorbar(*np.array(points).T, marker="o", capsize=2, label=task)
    axes.set(xlabel="τ (0: Av-PBC)", ylabel="D4RL-normalized return")
    axes.legend()
    plots.save(figure, DOCS / "diversity_tau.png")
    return f"""## Return against τ

Densities of k = {suite.SETTINGS["k"]}; the τ that is not round is that of an effective sample size of
{suite.SETTINGS["ess"]}. A point without a bar is one seed.

![return against τ](../../docs/diversity_tau.png)

{markdown(["task", "τ", "D4RL-normalized return"], rows)}
"""


def stages() -> str:
    """Measures weights and errors along an episode, and returns the section of the page."""
    file = RESULTS / "stages.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    for task in suite.ABLATED:
        kept[task] = kept.get(task, {}) | _along_an_episode(task)
    write_text(file, json.dumps(kept, indent=1) + "\n")
    tables = [
        f"**{task}**\n\n"
        + markdown(
            ["steps into the episode", *figures],
            [
                [f"{first} to {last - 1}", *(f"{values[i]:.3f}" for values in figures.values())]
                for i, (first, last) in enumerate(itertools.pairwise(STAGES))
            ],
        )
        for task, figures in kept.items()
    ]
    body = "\n\n".join(tables)
    return f"""## Weights and errors along an episode

Share of the transitions; mean density weight (effective sample size {suite.SETTINGS["ess"]}, clipped at quantile
{suite.SETTINGS["clip"]}) for several k; mean squared distance from the teacher's actions (normalized units) of policies
cloned on the suite's sets, {POLICIES} a set, mean over seeds.

{body}
"""


def _along_an_episode(task: str) -> dict[str, list[float]]:
    """The columns of a task's table, a number a stage."""
    data, teacher = dataset(task), Teacher.load(path(task))
    step = np.concatenate([np.arange(length) for length in np.diff(data.episode_ends, prepend=-1)])
    stage = np.searchsorted(STAGES, step, side="right") - 1
    count = np.bincount(stage, minlength=len(STAGES) - 1)

    def mean(values: np.ndarray) -> list[float]:
        return (np.bincount(stage, values, minlength=len(count)) / np.maximum(count, 1)).tolist()

    columns = {"share": (count / len(data)).tolist()}
    for k in SCALES:
        columns[f"weight, k = {k}"] = mean(_weights(data, k).weights)
    targets = normalize_actions(teacher.actions(data.observations), *data.action_bounds)
    for method in ("av-pbc", "sdw"):
        if errors := [_errors(pairs, data, targets) for pairs in _sets(task, method)]:
            columns[f"error, {suite.METHODS[method]}"] = mean(np.mean(errors, axis=0))
    return columns


def _weights(data: TransitionDataset, k: int) -> DensityWeights:
    """The suite's density weights at another scale."""
    return sdw.density_weights(sdw.log_density(data, k=k), ess=suite.SETTINGS["ess"], clip=suite.SETTINGS["clip"])


def _errors(pairs: SyntheticDataset, data: TransitionDataset, targets: np.ndarray) -> np.ndarray:
    """Squared distance from the targets, mean over actions and over policies cloned on a set: (M,)."""
    states = torch.from_numpy(data.observations)
    errors = []
    for seed in range(POLICIES):
        with torch.no_grad():
            actions = normalize_actions(sdw.behavior_clone(pairs, seed=seed)(states).numpy(), *data.action_bounds)
        errors.append(((actions - targets) ** 2).mean(1))
    return np.mean(errors, axis=0)


def _sets(task: str, method: str) -> list[SyntheticDataset]:
    """The suite's synthetic sets of a method that lie in runs/suite, a seed each."""
    files = [suite.run_folder((task, method, seed)) / "last.npz" for seed in suite.seeds(method)]
    return [SyntheticDataset.load(file) for file in files if file.exists()]


def spread(task: str, method: str, covered: np.ndarray) -> dict[str, float] | None:
    """Diversity of the suite's synthetic sets of a method, mean over the seeds that there are; None without any."""
    measured = [_spread(pairs.normalized_observations, covered) for pairs in _sets(task, method)]
    return {name: float(np.mean([m[name] for m in measured])) for name in measured[0]} if measured else None


def _covered_and_random(task: str) -> tuple[np.ndarray, np.ndarray]:
    """States to be covered, and as many random others as a synthetic set has pairs."""
    states = dataset(task).normalized_observations
    chosen = np.random.default_rng(0).choice(len(states), COVERED + suite.SETTINGS["size"], replace=False)
    return states[chosen[:COVERED]], states[chosen[COVERED:]]


def _spread(points: np.ndarray, covered: np.ndarray) -> dict[str, float]:
    figures: dict[str, Any] = sdw.diversity(points).to_dict()
    kept = {name: figures[name] for name in ("entropy", "participation_ratio", "neighbor_distance")}
    return kept | {"coverage": sdw.coverage(covered, points, k=NEIGHBORHOOD)}


def sets() -> str:
    """Measures the synthetic sets of runs/suite beside random pairs, and returns the section of the page."""
    file = RESULTS / "sets.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    for task in TASKS:
        covered, random = _covered_and_random(task)
        found = {"random": _spread(random, covered)}
        found |= {method: spread(task, method, covered) for method in suite.DISTILLED}
        kept[task] = kept.get(task, {}) | {method: figures for method, figures in found.items() if figures}
    write_text(file, json.dumps(kept, indent=1) + "\n")
    names = ("entropy", "participation_ratio", "neighbor_distance", "coverage")
    rows = [
        [task, label, *(f"{kept[task][method][name]:.2f}" for name in names)]
        for task in kept
        for method, label in suite.METHODS.items()
        if method in kept[task]
    ]
    return f"""## Diversity of the synthetic sets

On normalized states, k = 10, mean over seeds. Coverage: the share of {COVERED:,} states of the dataset whose
neighborhood of {NEIGHBORHOOD} others holds a synthetic state.

{markdown(["task", "method", "entropy (nats)", "participation ratio", "neighbor distance", "coverage"], rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="datasets at a time")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    sections = [ranking(options.jobs), tau(), stages(), sets()]
    head = "# Diversity\n\nMade by `python -m benchmarks.diversity_study`.\n\n"
    write_text(RESULTS.with_suffix(".md"), head + "\n".join(sections))


if __name__ == "__main__":
    main()
