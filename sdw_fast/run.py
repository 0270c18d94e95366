"""The run around the outer loop: its folder, checkpoints that resume to the same bits, evaluations, the bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from sdw_fast.config import DistillConfig
from sdw_fast.data import TransitionDataset
from sdw_fast.distiller import Distiller, Metrics
from sdw_fast.evaluation import evaluate_synthetic
from sdw_fast.files import replacing, write_text
from sdw_fast.objectives import outer_problem
from sdw_fast.progress import progress_bar
from sdw_fast.synthetic import SyntheticDataset, real_pairs
from sdw_fast.teacher import Teacher
from sdw_fast.version import __version__

Callback = Callable[[Distiller, Metrics], None]

# Outer steps between two looks at what another device computed: the host runs ahead of it in between.
FETCH_EVERY = 32


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
        device: Where to compute.
        preset: "default", "published" or "paper"; see `DistillConfig.preset`.
        callback: Called after every outer step with the distiller and the step's metrics.
        progress: Whether to show a progress bar.
        **settings: Fields of `DistillConfig`, e.g. objective="sdw", size=256, steps=5_000, seed=0.

    Returns:
        The synthetic set: the one with the best return where eval_every is set, else the last. With n_runs a list.

    Raises:
        ValueError: a setting is out of range, or as `outer_problem`, `real_pairs` and `run`.
    """
    config = DistillConfig.preset(preset, **settings)
    distiller = new_distiller(data, teacher, config, device=device, n_runs=n_runs)
    sets = run(distiller, out, callback=callback, progress=progress)
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
    source: dict[str, Any] | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> list[SyntheticDataset]:
    """Takes the outer steps that remain, showing and keeping what comes of them.

    Args:
        distiller: The distillation; a folder with a checkpoint puts it where that was taken.
        out: Folder of the run: config.json, metrics.jsonl (a line a step), checkpoint, last.npz, and best.npz (the set
            with the highest return; without evaluations, the last). With several sets, metrics and sets lie in
            run-000, run-001, … inside it. None: nothing is written.
        source: Where dataset and teacher came from, kept in config.json for `sdw-fast distill --resume`.
        callback: Called after every step with the distiller and the step's metrics; a GPU then waits for it.
        progress: Whether to show the bar.

    Returns:
        The best set of every run, as best.npz.

    Raises:
        ValueError: evaluations are wanted and the dataset names no environment, or the folder's checkpoint belongs to
            another run (see `Distiller.load_state_dict`).
        KeyboardInterrupt: Ctrl-C; the step under way is finished and saved first. A second Ctrl-C stops at once.
    """
    config = distiller.config
    if config.eval_every and distiller.problem.units.env_id is None:
        raise ValueError("the dataset names no environment to evaluate in; set eval_every=0 or give it an env_id")
    folder = RunFolder(out, distiller, source) if out is not None else None
    best = Best(folder.best_returns if folder else [-math.inf] * distiller.n_runs, folder)
    bar = progress_bar(total=config.steps, initial=distiller.iteration, unit="step", smoothing=0.05, show=progress)
    pending: list[Tensor] = []  # figures not looked at yet
    last_return, seconds = math.nan, 0.0

    def due(every: int) -> bool:
        return distiller.iteration % every == 0 or distiller.iteration == config.steps

    with _deferred_interrupt() as interrupted, bar, folder or contextlib.nullcontext():
        while distiller.iteration < config.steps:
            began = time.perf_counter()
            pending.append(distiller.advance())
            evaluating = bool(config.eval_every) and due(config.eval_every)
            saving = folder is not None and due(config.checkpoint_every)
            wait = not distiller.runs_ahead or callback is not None or evaluating or saving or interrupted()
            if not wait and len(pending) < FETCH_EVERY and distiller.iteration < config.steps:
                seconds += time.perf_counter() - began
                continue
            steps = distiller.fetch(pending)
            seconds += time.perf_counter() - began
            for metrics in steps:
                metrics["seconds"] = seconds / len(steps)
            pending, seconds = [], 0.0
            if evaluating:
                steps[-1] |= best.evaluate(distiller)
                last_return = float(np.mean(steps[-1]["score"]))
            if folder:
                folder.log(distiller.iteration, steps)
            loss, norm = (np.mean(steps[-1][name]) for name in ("loss", "gradient_norm"))
            bar.set_postfix_str(f"loss {loss:.4f}, ‖∇‖ {norm:.3g}, return {last_return:.1f}", refresh=False)
            bar.update(len(steps))
            if callback:
                callback(distiller, steps[-1])
            stop = interrupted()
            if folder and (stop or saving):
                folder.checkpoint(distiller, best.returns)
            if stop:
                resume = f"`sdw-fast distill --resume {out}`" if source else f"the same call with out={out}"
                kept = f"; {resume} continues to the same result" if folder else ", nothing was kept"
                raise KeyboardInterrupt(f"stopped after outer step {distiller.iteration}{kept}")
    return best.final(distiller)


class Best:
    """The best set so far of every run, and its score; without evaluations, the last set."""

    def __init__(self, returns: list[float], folder: RunFolder | None) -> None:
        self.returns = list(returns)  # −inf before the first evaluation
        self._folder = folder
        self._sets = folder.best_sets() if folder else {}

    def evaluate(self, distiller: Distiller) -> Metrics:
        """Clones policies on every run's set and runs them in the environment; keeps the sets that beat all before."""
        config, sets = distiller.config, distiller.sets
        results = [
            evaluate_synthetic(one, clones=config.eval_clones, episodes=config.eval_episodes, seed=seed)
            for one, seed in zip(sets, distiller.seeds, strict=True)
        ]
        scores = [result.mean if result.normalized_mean is None else result.normalized_mean for result in results]
        for number, score in enumerate(scores):
            if score > self.returns[number]:
                self.returns[number] = score
                self._keep(number, sets[number])
        return {
            "return": distiller.of_runs(np.array([result.mean for result in results])),
            "score": distiller.of_runs(np.array(scores)),
        }

    def final(self, distiller: Distiller) -> list[SyntheticDataset]:
        """The best sets; of a run that was never evaluated, the last."""
        for number, last in enumerate(distiller.sets):
            if number not in self._sets or not distiller.config.eval_every:
                self._keep(number, last)
        return [self._sets[number] for number in range(distiller.n_runs)]

    def _keep(self, number: int, synthetic: SyntheticDataset) -> None:
        self._sets[number] = synthetic
        if self._folder:
            self._folder.save_best(number, synthetic)


class RunFolder:
    """The folder of one run. Every file is written whole under a temporary name and renamed; metrics are appended.

    With several sets, metrics and sets lie in folders run-000, run-001, … of their own; configuration and checkpoint
    are one for all. On opening a folder with a checkpoint the distiller continues from it, and metrics beyond it are
    cut off, so that a killed run leaves the same files as one that was not. A context manager: leaving it closes what
    is open.
    """

    def __init__(
        self, folder: str | os.PathLike[str], distiller: Distiller, source: dict[str, Any] | None = None
    ) -> None:
        self.path = Path(folder)
        numbers = range(distiller.n_runs)
        self._runs = [self.path / f"run-{number:03}" for number in numbers] if distiller.batched else [self.path]
        for path in self._runs:
            path.mkdir(parents=True, exist_ok=True)
        self._checkpoint = self.path / "checkpoint"
        self.best_returns = [-math.inf for _ in numbers]
        if self._checkpoint.exists():
            state = load_checkpoint(self._checkpoint)
            distiller.load_state_dict(state["distiller"])
            self.best_returns = state["best_returns"]
        for path in self._runs:
            _cut_metrics(path, distiller.iteration)
            if not distiller.iteration:
                (path / "best.npz").unlink(missing_ok=True)
        self._write_config(distiller, source)
        self._open_files = contextlib.ExitStack()
        self._metrics = [
            self._open_files.enter_context((path / "metrics.jsonl").open("a", buffering=1, encoding="utf-8"))
            for path in self._runs
        ]
        self._tensorboard = [_tensorboard_writer(path / "tensorboard", distiller.iteration) for path in self._runs]
        for writer in filter(None, self._tensorboard):
            self._open_files.callback(writer.close)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def _write_config(self, distiller: Distiller, source: dict[str, Any] | None) -> None:
        start = distiller.sets[0]
        content = {
            "version": __version__,
            "source": source,
            "config": distiller.config.to_dict(),
            "n_runs": distiller.n_runs if distiller.batched else None,
            "dataset": {
                "name": start.dataset_name,
                "hash": start.dataset_hash,
                "transitions": len(distiller.problem),
            },
            "objective": distiller.problem.report,
        }
        write_text(self.path / "config.json", json.dumps(content, indent=2) + "\n")

    def best_sets(self) -> dict[int, SyntheticDataset]:
        """The best set so far of every run that has one, by its number."""
        paths = [path / "best.npz" for path in self._runs]
        return {number: SyntheticDataset.load(path) for number, path in enumerate(paths) if path.exists()}

    def save_best(self, number: int, synthetic: SyntheticDataset) -> None:
        """Writes the best set of a run."""
        synthetic.save(self._runs[number] / "best.npz")

    def log(self, iteration: int, steps: Sequence[Metrics]) -> None:
        """Appends the metrics of the steps that end at `iteration`."""
        for step, metrics in enumerate(steps, start=iteration - len(steps) + 1):
            for number, (file, tensorboard) in enumerate(zip(self._metrics, self._tensorboard, strict=True)):
                own = {name: float(x[number] if np.ndim(x) else x) for name, x in metrics.items()}
                file.write(json.dumps({"step": step, **own}) + "\n")
                for name, value in own.items() if tensorboard is not None else ():
                    tensorboard.add_scalar(name, value, step)

    def checkpoint(self, distiller: Distiller, best_returns: Sequence[float]) -> None:
        """Writes the checkpoint and the sets as they stand."""
        with replacing(self._checkpoint) as temporary:
            torch.save({"distiller": distiller.state_dict(), "best_returns": list(best_returns)}, temporary)
        for path, synthetic in zip(self._runs, distiller.sets, strict=True):
            synthetic.save(path / "last.npz")


def _cut_metrics(folder: Path, iteration: int) -> None:
    if (folder / "metrics.jsonl").exists():
        kept = [metrics for metrics in read_metrics(folder) if metrics["step"] <= iteration]
        write_text(folder / "metrics.jsonl", "".join(json.dumps(metrics) + "\n" for metrics in kept))


def read_run(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], DistillConfig]:
    """Reads a run's config.json: where its dataset and teacher came from, and its settings.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: config.json is damaged, or the run was not started by the command line.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run (no config.json)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        source, config = content["source"], DistillConfig.from_dict(content["config"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if source is None:
        raise ValueError(f"the run in {folder} was started from Python: continue it with sdw.distill(..., out=...)")
    return source, config


def read_metrics(folder: str | os.PathLike[str]) -> list[Metrics]:
    """Reads a run's metrics.jsonl, one dict an outer step; a last line cut off by a crash is left out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no metrics (no metrics.jsonl)")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a run's checkpoint. Raises ValueError if the file is damaged or something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds on a damaged file
        raise ValueError(f"{path} is not a readable checkpoint (truncated?): {error}") from error
    if not isinstance(state, dict) or {"distiller", "best_returns"} - set(state):
        raise ValueError(
            f"{path} is not a checkpoint of this version of sdw_fast ({__version__}): finish that run with the version "
            "it was started with, or start it anew in another folder"
        )
    return state


def _tensorboard_writer(path: Path, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path), purge_step=iteration + 1)


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag, so that a step is never cut in two; the second acts at once.

    Python delivers signals to the main thread only; elsewhere nothing changes.
    """
    flag = False

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal flag
        flag = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = signal.signal(signal.SIGINT, remember)
    except ValueError:  # not in the main thread
        yield lambda: False
        return
    try:
        yield lambda: flag
    finally:
        signal.signal(signal.SIGINT, previous)
