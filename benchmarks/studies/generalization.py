"""Distilled sets beyond the network and optimizer they were distilled with: the OBD paper's generalization study.

python -m benchmarks.studies.generalization                 # hopper/medium and walker2d/medium, Av-PBC and SDW

Takes the sets that `benchmarks.studies.suite` left in runs/suite (and distills those that are missing), trains policies
of other depths and widths, residual ones, and with other optimizers on them, and runs each in the environment. Adds a
row a set to results/generalization.jsonl, prints the table and fills docs/results.md; sets done are skipped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import cells, report, tasks, work
from sdw_fast import MLPPolicy, SyntheticDataset

TABLE = table.RESULTS / "generalization.jsonl"
TASKS, METHODS, SEED = ("hopper/medium", "walker2d/medium"), ("av-pbc", "sdw"), 0
POLICIES, EPISODES = 5, 6  # trained a variant, and episodes of each
ENSEMBLE = 10
# The OBD paper's Av-PBC (arXiv 2410.22728, tables 1 to 3), on the variants that both have; distilled without momentum.
PUBLISHED: dict[str, dict[str, float]] = {
    "hopper/medium": {
        **{"as distilled": 32.5, "2 layers": 26.2, "3 layers": 28.1, "5 layers": 29.1, "6 layers": 29.6},
        **{"residual MLP": 29.8, "Adam": 31.2, "AdamW": 33.3, f"ensemble of {ENSEMBLE}": 27.6},
    },
    "walker2d/medium": {
        **{"as distilled": 39.5, "2 layers": 41.3, "3 layers": 44.1, "5 layers": 36.7, "6 layers": 28.2},
        **{"residual MLP": 35.7, "Adam": 41.9, "AdamW": 44.2, f"ensemble of {ENSEMBLE}": 58.6},
    },
}

# The rows of docs/results.md.
SHOWN = [*PUBLISHED["hopper/medium"], "SGD without momentum"]

Case = tuple[str, str]  # task, method
Policy = Callable[[Tensor], Tensor]
Train = Callable[[SyntheticDataset, int], Policy]  # (set, seed) -> policy


class Residual(nn.Module):
    """A residual MLP: a layer to 256 units, two blocks of x + W₂ ReLU(W₁ ReLU(x)), a layer to the actions, tanh."""

    def __init__(self, inputs: int, outputs: int, gain: float, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 256), nn.Linear(256, outputs)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)) for _ in range(2)
        )
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.orthogonal_(linear.weight, gain, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return torch.tanh(self.last(torch.relu(x)))


def with_hidden(*hidden: int) -> Train:
    """Behavior cloning as distilled, on a network of other hidden widths."""
    return lambda synthetic, seed: sdw.behavior_clone(synthetic, hidden=hidden, seed=seed)


def with_optimizer(make: Callable[[Any], torch.optim.Optimizer], steps: int, residual: bool = False) -> Train:
    """Full-batch behavior cloning by an optimizer of torch, on the default network or a residual one."""

    def train(synthetic: SyntheticDataset, seed: int) -> Policy:
        config = synthetic.config
        states, actions = work.normalized_pairs(synthetic)
        generator = torch.Generator().manual_seed(seed)
        sizes = states.shape[1], config["hidden"], actions.shape[1]
        policy = MLPPolicy(work.initial(*sizes, config["gain"], generator), synthetic.units)
        if residual:
            policy.net = Residual(sizes[0], sizes[-1], config["gain"], generator)  # type: ignore[assignment]
        optimizer = make(policy.parameters())
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(policy.net(states), actions).backward()
            optimizer.step()
        return policy.requires_grad_(False)

    return train


def ensemble(synthetic: SyntheticDataset, seed: int) -> Policy:
    """The mean action of policies cloned from different initializations."""
    members = [sdw.behavior_clone(synthetic, seed=1000 * (seed + 1) + i) for i in range(ENSEMBLE)]
    return lambda states: torch.stack([member(states) for member in members]).mean(0)


def variants(config: dict[str, Any]) -> dict[str, Train]:
    """What is trained on a set, by name; step counts and step sizes follow those it was distilled with."""
    steps, lr, momentum = config["inner_steps"], config["inner_lr"], config["inner_momentum"]
    sgd: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    return {
        "as distilled": lambda synthetic, seed: sdw.behavior_clone(synthetic, seed=seed),
        "2 layers": with_hidden(256),
        "3 layers": with_hidden(256, 256),
        "5 layers": with_hidden(*[256] * 4),
        "6 layers": with_hidden(*[256] * 5),
        "width 64": with_hidden(*[64] * 3),
        "width 128": with_hidden(*[128] * 3),
        "width 512": with_hidden(*[512] * 3),
        "residual MLP": with_optimizer(lambda p: sgd(p, lr, momentum), steps, residual=True),
        "4 × the steps": lambda synthetic, seed: sdw.behavior_clone(synthetic, inner_steps=4 * steps, seed=seed),
        "SGD without momentum": with_optimizer(lambda p: sgd(p, 5 * lr), steps),
        "Adam": with_optimizer(lambda p: torch.optim.Adam(p, 1e-3), 2 * steps),
        "AdamW": with_optimizer(lambda p: torch.optim.AdamW(p, 1e-3), 2 * steps),
        f"ensemble of {ENSEMBLE}": ensemble,
    }


def synthetic_set(task: str, method: str) -> SyntheticDataset:
    """The set that the suite distilled, or that is distilled now."""
    cell = (task, method, SEED)
    return work.distilled(cell) or work.synthetic_sets([cell])[0]


def measure(case: Case) -> str:
    """Measures all variants on one set, records them, and returns a line."""
    task, method = case
    work.one_thread()
    synthetic, data = synthetic_set(task, method), tasks.dataset(task)
    returns: dict[str, list[float]] = {}
    for name, train in variants(synthetic.config).items():
        returns[name] = []
        for number in range(POLICIES):
            policy = train(synthetic, cells.TEST_SEED + number)
            episodes = work.normalized_returns(policy, data, EPISODES, seed=cells.TEST_SEED + number * EPISODES)
            returns[name].append(round(float(episodes.mean()), 3))
    row = {"task": task, "method": method, "seed": SEED, "returns": returns}
    table.append(TABLE, {**row, "settings": cells.settings((*case, SEED)), **table.origin()})
    return f"{task} {method}: " + ", ".join(f"{name} {np.mean(values):.1f}" for name, values in returns.items())


def results() -> dict[Case, dict[str, list[float]]]:
    """The returns of every variant on the sets of the settings of now, in the order of the table."""
    newest = {
        (row["task"], row["method"]): row["returns"]
        for row in table.read(TABLE)
        if cells.up_to_date(row, (row["task"], row["method"], row["seed"]))
    }
    return {case: newest[case] for task in TASKS for method in METHODS if (case := (task, method)) in newest}


def results_table(names: Sequence[str] | None = None) -> str:
    """Return of every variant, or of those named, on every set, beside the published numbers."""
    found = results()
    names = names or list(dict.fromkeys(name for returns in found.values() for name in returns))
    header = [
        "trained on the set",
        *(f"{task}, {cells.METHODS[method]}" for task, method in found),
        *(f"{task}, published Av-PBC" for task in TASKS),
    ]
    rows = [
        [
            name,
            *(report.mean_and_error(returns.get(name, []), POLICIES) for returns in found.values()),
            *(str(PUBLISHED[task].get(name, "–")) for task in TASKS),
        ]
        for name in names
    ]
    return report.markdown(header, rows)


def write_page() -> None:
    """Fills the study's table of docs/results.md."""
    report.fill("generalization", results_table(SHOWN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="sets at a time")
    options = parser.parse_args()
    found = results()
    if missing := [case for task in TASKS for method in METHODS if (case := (task, method)) not in found]:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for line in pool.imap_unordered(measure, missing):
                print(line, flush=True)
    print(results_table())
    write_page()


if __name__ == "__main__":
    main()
