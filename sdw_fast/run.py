"""The run around the outer loop: checkpoints that resume to the same bits, evaluations, the bar, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from sdw_fast.config import DistillConfig
from sdw_fast.data import TransitionDataset
from sdw_fast.distiller import Distiller, Metrics
from sdw_fast.folder import RunFolder
from sdw_fast.interruption import deferred_interrupt
from sdw_fast.objectives import outer_problem
from sdw_fast.progress import progress_bar
from sdw_fast.ranks import Ranks
from sdw_fast.selection import HELD_OUT_EVERY, Best, evaluate_sets
from sdw_fast.synthetic import SyntheticDataset, real_pairs
from sdw_fast.teacher import Teacher

if TYPE_CHECKING:
    from sdw_fast.environments import Environment

Callback = Callable[[Distiller, Metrics], None]

# Outer steps between two looks at what another device computed: the host runs ahead of it in between.
FETCH_EVERY = 32
# Metrics that stand beside the progress bar, each from its first value on: title and format.
_SHOWN = {
    "loss": ("loss", ".4f"),
    "gradient_norm": ("‖∇‖", ".3g"),
    "held_out_loss": ("held out", ".4f"),
    "score": ("return", ".1f"),
}


@overload
def distill(
    data: TransitionDataset, teacher: Teacher | None = None, *, n_runs: None = None, **options: Any
) -> SyntheticDataset: ...


@overload
def distill(
    data: TransitionDataset, teacher: Teacher | None = None, *, n_runs: int, **options: Any
) -> list[SyntheticDataset]: ...


def distill(
    data: TransitionDataset,
    teacher: Teacher | None = None,
    *,
    n_runs: int | None = None,
    out: str | os.PathLike[str] | None = None,
    env: Environment | None = None,
    device: str | torch.device = "cpu",
    preset: str = "default",
    callback: Callback | None = None,
    progress: bool = True,
    **settings: Any,
) -> SyntheticDataset | list[SyntheticDataset]:
    """Distills a dataset into a synthetic set, or into several at once.

    Args:
        data: The offline dataset, as `load_dataset` gives it.
        teacher: π* and Q; not needed by objective "dbc".
        n_runs: R: distill R sets with the seeds seed, seed + 1, … side by side, and return a list of them.
        out: Folder of the run (see `run`); one that holds a checkpoint is continued.
        env: The environment to evaluate in, as `evaluate` takes it, in place of the dataset's own.
        device: Where to compute.
        preset: "default", "published" or "paper"; see `DistillConfig.preset`.
        callback: Called after every outer step with the distiller and the step's metrics.
        progress: Whether to show a progress bar.
        **settings: Fields of `DistillConfig`, e.g. objective="sdw", size=256, steps=5_000, seed=0.

    Returns:
        The synthetic set with the lowest loss on the states held out, or with the best return where eval_every is set,
        or the last: see `DistillConfig.select`. Its configuration says under "selected" what it was chosen by. With
        n_runs a list.

    Raises:
        ValueError: a setting is out of range, or as `outer_problem`, `real_pairs` and `run`.
    """
    config = DistillConfig.preset(preset, **settings)
    if env is not None:
        data = data.in_environment(env)
    distiller = new_distiller(data, teacher, config, device=device, n_runs=n_runs)
    sets = run(distiller, out, env=env, callback=callback, progress=progress)
    return sets[0] if n_runs is None else sets


def new_distiller(
    data: TransitionDataset,
    teacher: Teacher | None,
    config: DistillConfig,
    *,
    device: str | torch.device = "cpu",
    n_runs: int | None = None,
) -> Distiller:
    """The distiller of a dataset's outer problem that starts from real pairs, R times with n_runs."""
    if n_runs is not None and n_runs < 1:
        raise ValueError(f"n_runs must be at least 1, or None for a single run, got {n_runs}")
    problem = outer_problem(data, teacher, config)
    starts = [
        real_pairs(data, config.size, init=config.init, teacher=teacher, seed=config.seed + number)
        for number in range(n_runs or 1)
    ]
    return Distiller(problem, starts[0] if n_runs is None else starts, config, device=device)


def run(
    distiller: Distiller,
    out: str | os.PathLike[str] | None = None,
    *,
    env: Environment | None = None,
    source: dict[str, Any] | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> list[SyntheticDataset]:
    """Takes the outer steps that remain, showing and keeping what comes of them.

    Under a process group of `torch.distributed` every rank calls it: the first owns the folder, the bar and the choice
    of the set, the policies that are evaluated are shared out, and all return the same sets.

    Args:
        distiller: The distillation; a folder with a checkpoint puts it where that was taken.
        out: Folder of the run: config.json, metrics.jsonl (a line a step), checkpoint, last.npz, and best.npz (the set
            chosen, see `DistillConfig.select`), for one run at a time. With several sets, metrics
            and sets lie in run-000, run-001, … inside it. None: nothing is written.
        env: The environment to evaluate in; None: the one that the units of the problem name.
        source: Where dataset and teacher came from, kept in config.json for `sdw-fast distill --resume`.
        callback: Called after every step with the distiller and the step's metrics; a GPU then waits for it.
        progress: Whether to show the bar.

    Returns:
        The best set of every run, as best.npz.

    Raises:
        ValueError: evaluations are wanted and there is no environment, or it does not fit (see `check_environment`);
            or the folder's checkpoint belongs to another run (see `Distiller.load_state_dict`) or is damaged.
        BlockingIOError: another run is at work in the folder.
        OSError: a file cannot be written: the disk is full, or the folder was deleted.
        KeyboardInterrupt: Ctrl-C; the step under way is finished and saved first. A second Ctrl-C stops at once.
    """
    config = distiller.config
    if config.eval_every:
        from sdw_fast.environments import check_environment

        env = check_environment(distiller.problem.units, env)
    pending: list[Tensor] = []  # figures not looked at yet
    shown: dict[str, str] = {}  # beside the bar: what was measured last
    seconds = 0.0

    with contextlib.ExitStack() as opened:
        interrupted = opened.enter_context(deferred_interrupt())
        ranks = distiller.ranks
        if ranks and ranks.rank:
            return _follow(distiller, ranks, env, interrupted)

        def open_folder() -> RunFolder | None:
            return None if out is None else opened.enter_context(RunFolder(out, distiller, source))

        folder = ranks.together(open_folder) if ranks else open_folder()
        if ranks:
            ranks.gather(distiller.state_dict() if distiller.iteration else None)
        best = Best(distiller, folder)
        bar = opened.enter_context(
            progress_bar(total=config.steps, initial=distiller.iteration, unit="step", smoothing=0.05, show=progress)
        )
        while distiller.iteration < config.steps:
            began = time.perf_counter()
            if ranks:
                ranks.stop = interrupted()
            pending.append(distiller.advance())
            evaluating = _due(distiller, config.eval_every)
            looking = config.select != "last" and _due(distiller, HELD_OUT_EVERY)
            saving = folder is not None and _due(distiller, config.checkpoint_every)
            wait = not distiller.runs_ahead or ranks is not None or callback is not None or interrupted()
            wait = wait or evaluating or looking or saving
            if not wait and len(pending) < FETCH_EVERY and distiller.iteration < config.steps:
                seconds += time.perf_counter() - began
                continue
            steps = distiller.fetch(pending)
            seconds += time.perf_counter() - began
            for metrics in steps:
                metrics["seconds"] = seconds / len(steps)
            pending, seconds = [], 0.0
            if looking:
                steps[-1] |= best.look()
            if evaluating:
                steps[-1] |= best.evaluate(env)
            if folder:
                folder.log(distiller.iteration, steps)
            for name, (title, form) in _SHOWN.items():
                if name in steps[-1]:
                    shown[title] = format(np.mean(steps[-1][name]), form)
            bar.set_postfix(shown, refresh=False)
            bar.update(len(steps))
            if callback:
                callback(distiller, steps[-1])
            stop = ranks.stopping if ranks else interrupted()
            if folder and (stop or saving):
                folder.checkpoint(distiller, best.by, best.scores)
            if stop:
                resume = f"`sdw-fast distill --resume {out}`" if source else f"the same call with out={out}"
                kept = f"; {resume} continues to the same result" if folder else ", nothing was kept"
                raise KeyboardInterrupt(f"stopped after outer step {distiller.iteration}{kept}")
        sets = best.final()
        if ranks:
            ranks.gather(sets)
        if interrupted():
            raise KeyboardInterrupt(f"stopped after outer step {distiller.iteration}, the last; the run is complete")
    return sets


def _due(distiller: Distiller, every: int) -> bool:
    """Whether what happens after so many steps, and after the last, is to happen now; 0: never."""
    last = distiller.iteration == distiller.config.steps
    return every > 0 and (last or distiller.iteration % every == 0)


def _follow(
    distiller: Distiller, ranks: Ranks, env: Environment | None, interrupted: Callable[[], bool]
) -> list[SyntheticDataset]:
    """What a rank other than the first does in `run`: it goes on from the first's checkpoint, and takes the steps."""
    ranks.together(lambda: None)
    state = ranks.gather(None)[0]
    if state is not None:
        distiller.load_state_dict(state)
    while distiller.iteration < distiller.config.steps:
        ranks.stop = interrupted()
        distiller.step()
        if _due(distiller, distiller.config.eval_every):
            evaluate_sets(distiller, env)
        if ranks.stopping:
            raise KeyboardInterrupt(f"stopped after outer step {distiller.iteration}")
    sets: list[SyntheticDataset] = ranks.gather(None)[0]
    if interrupted():
        raise KeyboardInterrupt(f"stopped after outer step {distiller.iteration}, the last; the run is complete")
    return sets
