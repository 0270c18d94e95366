"""What the studies do with the package: choose, distill, clone, run. Everything here takes and returns its objects."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sdw_fast as sdw
from benchmarks import table
from benchmarks.studies import cells, tasks
from benchmarks.studies.cells import Cell
from sdw_fast import MLPPolicy, SyntheticDataset, TransitionDataset
from sdw_fast.networks import orthogonal_parameters
from sdw_fast.run import new_distiller, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STAGES = (0, 1, 10, 40, 100, 200, 400, 1000)  # steps into an episode, from each to the next


def options(doc: str | None, folders: Sequence[str] = ()) -> argparse.Namespace:
    """What a study is asked for, `doc` its help: the tasks that match `only`, or `tables` alone; and its folders."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in folders:
        parser.add_argument(name, nargs="?", type=Path, metavar=name.upper(), help="see above")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the tasks whose name matches")
    parser.add_argument("--tables", action="store_true", help="fill the table and stop")
    asked = parser.parse_args()
    asked.folders = [getattr(asked, name) for name in folders]
    if None in asked.folders and not asked.tables:
        parser.error(f"say where {' and '.join(map(str.upper, folders))} are, or --tables")
    return asked


def study(
    doc: str | None,
    cases: Iterable[Any],
    *,
    results: Callable[[], Container[Any]],
    measure: Callable[..., None],
    write_page: Callable[[], None],
    folders: Sequence[str] = (),
) -> None:
    """The command of a study that has a row a case: makes those that are missing, and fills its page.

    `folders` are what the command is to be given; `measure` takes their paths after the case.
    """
    asked = options(doc, folders)
    if not asked.tables:
        make_missing(cases, asked.only, results, lambda case: measure(case, *asked.folders))
    write_page()


def make_missing(
    cases: Iterable[Any], only: str, results: Callable[[], Container[Any]], measure: Callable[[Any], None]
) -> None:
    """Measures the cases that have no row, on one thread; the second part of a case says its task, which must match."""
    one_thread()
    for case in cases:
        if re.search(only, str(case[1])) and case not in results():
            measure(case)


def one_thread() -> None:
    """For a process that is one of as many as there are cores."""
    torch.set_num_threads(1)
    sdw.set_num_threads(1)


def synthetic_sets(together: Sequence[Cell]) -> list[SyntheticDataset]:
    """The set of each cell, which differ in the seed only: real pairs, or distilled, several seeds in one run."""
    task, method, _ = together[0]
    data, teacher = tasks.dataset(task), tasks.teacher(task)
    configs = [cells.config(cell) for cell in together]
    if method in cells.PAIRS:
        return [chosen_pairs(data, teacher, config) for config in configs]
    n_runs = None if len(together) == 1 else len(together)
    distiller = new_distiller(data, teacher, configs[0], device=DEVICE, n_runs=n_runs)
    run(distiller, cells.folder(together), progress=False)
    if n_runs:
        for cell, synthetic in zip(together, distiller.sets, strict=True):
            synthetic.save(cells.run_folder(cell) / "last.npz")
    return distiller.sets


def chosen_pairs(data: TransitionDataset, teacher: sdw.Teacher | None, config: sdw.DistillConfig) -> SyntheticDataset:
    """Real pairs, chosen as a distillation chooses those that it starts from."""
    pairs = sdw.real_pairs(data, config.size, init=config.init, teacher=teacher, seed=config.seed)
    return dataclasses.replace(pairs, config=config.to_dict())


def distilled(cell: Cell) -> SyntheticDataset | None:
    """The set that the suite distilled for a cell; None if it does not lie here."""
    file = cells.run_folder(cell) / "last.npz"
    return SyntheticDataset.load(file) if file.exists() else None


def distilling_seconds(together: Sequence[Cell]) -> float:
    """Seconds of all outer steps of a distillation, those that earlier calls took too; 0 if there are none."""
    log = next(cells.folder(together).rglob("metrics.jsonl"), None)
    return sum(json.loads(line)["seconds"] for line in log.read_text().splitlines()) if log else 0.0


def clone_dataset(data: TransitionDataset, seed: int) -> MLPPolicy:
    """Behavior cloning on a whole dataset: the suite's network, Adam with a cosine schedule."""
    config = sdw.DistillConfig(**cells.SETTINGS)
    *_, params = cloning(data, seed, hidden=config.hidden, gain=config.gain, schedule="cosine", **cells.BC)
    return MLPPolicy(params, data.units)


def clone_on_all(data: TransitionDataset, seed: int, *, held_out: float, look_every: int, **settings: Any) -> MLPPolicy:
    """Behavior cloning on a whole dataset: the parameters of the least loss on a share of the pairs that is held out.

    Args:
        data: The pairs.
        seed: Of the pairs held out, of θ_0 and of the batches.
        held_out: Share of the pairs.
        look_every: Steps between two looks at the loss; the last step is looked at too.
        **settings: steps, batch_size and lr of `cloning`, whose step size falls as a cosine.
    """
    rows = np.random.default_rng(seed).permutation(len(data))
    unseen, kept = (data.subset(np.sort(part)) for part in np.split(rows, [int(held_out * len(rows))]))
    states, actions = normalized_pairs(unseen)
    ones, defaults = torch.ones(len(states)), sdw.DistillConfig()
    least, best = np.inf, None
    steps = cloning(kept, seed, hidden=defaults.hidden, gain=defaults.gain, schedule="cosine", **settings)
    for step, params in enumerate(steps, start=1):
        if step % look_every and step < settings["steps"]:
            continue
        with torch.no_grad():
            loss = float(sdw.ops.behavior_matching(params, states, actions, ones, head=data.units.head))
        if loss < least:
            least, best = loss, [p.detach().clone() for p in params]
    assert best is not None, "the loss is not finite"
    return MLPPolicy(best, data.units)


def cloning(
    data: TransitionDataset,
    seed: int,
    *,
    hidden: Sequence[int],
    gain: float,
    steps: int,
    batch_size: int,
    lr: float,
    schedule: str = "constant",
) -> Iterator[list[Tensor]]:
    """Behavior cloning on a whole dataset by Adam on minibatches; yields the parameters after every step."""
    generator = torch.Generator().manual_seed(seed)
    states, actions = normalized_pairs(data)
    params = [p.requires_grad_() for p in initial(states.shape[1], hidden, actions.shape[1], gain, generator)]
    optimizer = torch.optim.Adam(params, lr, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if schedule == "cosine" else None
    ones = torch.ones(batch_size)
    for _ in range(steps):
        rows = torch.randint(len(states), (batch_size,), generator=generator)
        optimizer.zero_grad()
        sdw.ops.behavior_matching(params, states[rows], actions[rows], ones, head=data.units.head).backward()
        optimizer.step()
        if cosine:
            cosine.step()
        yield params


def initial(inputs: int, hidden: Sequence[int], outputs: int, gain: float, generator: torch.Generator) -> list[Tensor]:
    """Parameters as every policy of the package starts with."""
    drawn = orthogonal_parameters((inputs, *hidden, outputs), gain=gain, generators=[generator])
    return [parameter[0] for parameter in drawn]


def normalized_pairs(pairs: TransitionDataset | SyntheticDataset) -> tuple[Tensor, Tensor]:
    """States and actions as a policy's network sees them."""
    states, actions = pairs.units.states, pairs.units.require_actions()
    return (
        torch.from_numpy(states.normalize(pairs.observations)),
        torch.from_numpy(actions.normalize(pairs.actions)),
    )


def steps_into_episode(data: TransitionDataset) -> np.ndarray:
    """How many steps of its episode came before each row, (M,)."""
    return np.concatenate([np.arange(length) for length in np.diff(data.episode_ends, prepend=-1)])


def stages(data: TransitionDataset) -> np.ndarray:
    """The number of the stage of its episode that each row is in, (M,)."""
    return np.searchsorted(STAGES, steps_into_episode(data), side="right") - 1


def mean_of_stages(values: np.ndarray, data: TransitionDataset) -> list[float]:
    """Mean of a value a row, (M,), over the rows of each stage; 0 of a stage without rows."""
    return group_means(values, stages(data), len(STAGES) - 1)


def group_means(values: np.ndarray, groups: np.ndarray, number: int) -> list[float]:
    """Mean of the values, (M,), of each of so many groups, whose numbers are given, (M,); 0 of one without values."""
    sums, counts = np.bincount(groups, values, minlength=number), np.bincount(groups, minlength=number)
    return (sums / np.maximum(counts, 1)).tolist()


def errors(policies: Iterable[MLPPolicy], data: TransitionDataset, targets: np.ndarray) -> np.ndarray:
    """Squared distance from normalized actions (M, A), mean over the actions and the policies, of each row: (M,)."""
    observations, units = torch.from_numpy(data.observations), data.units.require_actions()
    every = []
    for policy in policies:
        with torch.no_grad():
            actions = units.normalize(policy(observations).numpy())
        every.append(((actions - targets) ** 2).mean(1))
    return np.mean(every, axis=0)


def clones(synthetic: SyntheticDataset, count: int) -> Iterator[MLPPolicy]:
    """Policies cloned on a set, from seeds that nothing else uses."""
    for clone in range(count):
        yield sdw.behavior_clone(synthetic, seed=cells.TEST_SEED + clone)


def ensemble(synthetic: SyntheticDataset, members: int) -> MLPPolicy:
    """The mean action of the policies that `clones` gives."""
    return sdw.behavior_clone(synthetic, seed=cells.TEST_SEED, ensemble=members)


def record(path: Path, row: table.Entries, settings: Any, began: float) -> None:
    """Adds a row to a study's table, with the CPU seconds since `began` (`time.process_time`), and prints it."""
    row = {**row, "cpu_seconds": round(time.process_time() - began, 1)}
    table.append(path, {**row, "settings": settings, **table.origin()})
    print(row, flush=True)


def returns_of_set(
    synthetic: SyntheticDataset, data: TransitionDataset, *, policies: int, episodes: int, of_ensemble: int
) -> dict[str, Any]:
    """What a row says of a set: the returns of policies cloned on it, and that of their mean action."""
    return {
        "policies": mean_returns(clones(synthetic, policies), data, episodes),
        "ensemble": mean_returns([ensemble(synthetic, policies)], data, of_ensemble)[0],
    }


def mean_returns(policies: Iterable[Any], data: TransitionDataset, episodes: int) -> list[float]:
    """D4RL-normalized return of each policy, mean over episodes of its own, whose seeds nothing else uses."""
    every = (
        normalized_returns(policy, data, episodes, seed=cells.TEST_SEED + number * episodes)
        for number, policy in enumerate(policies)
    )
    return [round(float(returns.mean()), 2) for returns in every]


def normalized_returns(policy: Any, data: TransitionDataset, episodes: int, seed: int) -> np.ndarray:
    """D4RL-normalized returns of a policy's episodes, whose seeds are `seed` and those that follow."""
    assert data.env_id is not None
    evaluation = sdw.evaluate(policy, data.env_id, episodes=episodes, seed=seed)
    assert evaluation.normalized is not None
    return evaluation.normalized
