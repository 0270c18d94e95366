"""The folder of a run: its lock, configuration, metrics, checkpoint and sets, written whole and derived from one file.

The checkpoint is the run. On every start the sets are written anew from it and metrics beyond it are cut off, so that a
run killed between any two files goes on as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdw_fast.config import DistillConfig
from sdw_fast.disk import locked, naming
from sdw_fast.distiller import Distiller, Metrics
from sdw_fast.files import (
    check_sum,
    damage_named,
    read_torch,
    reading,
    sealed,
    to_json,
    unsealed,
    write_npz,
    write_text,
    write_torch,
)
from sdw_fast.objectives import OuterProblem
from sdw_fast.synthetic import SyntheticDataset
from sdw_fast.version import __version__

_STATES = 1000  # of the dataset, kept for reports
_CHECKPOINT = {"distiller", "best_by", "best_scores", "best_sets"}


class RunFolder:
    """The folder of one run, held by this process alone. Every file is written whole; metrics are appended.

    With several sets, metrics and sets lie in folders run-000, run-001, … of their own; configuration and checkpoint
    are one for all. On opening a folder with a checkpoint the distiller continues from it. A context manager: leaving
    it closes what is open.

    Attributes:
        best_by: What sets are chosen by, see `DistillConfig.selected_by`; None before the first checkpoint.
        best_scores: The best score so far of every run, −inf before the first.
        best_sets: The sets that reached them, by the number of the run.

    Raises:
        BlockingIOError: another run holds the folder.
        ValueError: the checkpoint is damaged or of another run.
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
        self.best_by: str | None = None
        self.best_scores = [-math.inf for _ in numbers]
        self.best_sets: dict[int, SyntheticDataset] = {}
        with contextlib.ExitStack() as opened:
            opened.enter_context(locked(self.path))
            if self._checkpoint.exists():
                self._continue(distiller)
            for path in self._runs:
                _cut_metrics(path, distiller.iteration)
            self._write_sets(distiller)
            self._write_config(distiller, source)
            self._write_states(distiller.problem)
            self._metrics = [
                opened.enter_context((path / "metrics.jsonl").open("a", buffering=1, encoding="utf-8"))
                for path in self._runs
            ]
            self._tensorboard = [_tensorboard_writer(path / "tensorboard", distiller.iteration) for path in self._runs]
            for writer in filter(None, self._tensorboard):
                opened.callback(writer.close)
            self._opened = opened.pop_all()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _continue(self, distiller: Distiller) -> None:
        state = load_checkpoint(self._checkpoint)
        with damage_named(self._checkpoint, "checkpoint", ValueError):
            distiller.load_state_dict(state["distiller"])
            self.best_by = str(state["best_by"])
            self.best_scores = [float(best) for best in state["best_scores"]]
            for number, (last, best) in enumerate(zip(distiller.sets, state["best_sets"], strict=True)):
                if best is not None:
                    arrays = {name: best[name].numpy() for name in ("observations", "actions")}
                    self.best_sets[number] = dataclasses.replace(last, **arrays, config=best["config"])

    def _write_sets(self, distiller: Distiller) -> None:
        """Writes last.npz and best.npz as the checkpoint has them, and takes away those that it does not have.

        A finished run that never measured its sets keeps its best.npz, which is its last set.
        """
        for number, (path, last) in enumerate(zip(self._runs, distiller.sets, strict=True)):
            for name, one in (("last", last if distiller.iteration else None), ("best", self.best_sets.get(number))):
                if one is not None:
                    one.save(path / f"{name}.npz")
                elif distiller.iteration < distiller.config.steps:
                    (path / f"{name}.npz").unlink(missing_ok=True)

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
            "rounding": distiller.rounding,
        }
        write_text(self.path / "config.json", to_json(sealed(content), indent=2) + "\n")

    def _write_states(self, problem: OuterProblem) -> None:
        """Writes states.npz: rows of the outer problem, evenly spread, in environment units, for reports."""
        rows = np.linspace(0, len(problem) - 1, min(_STATES, len(problem))).astype(np.int64)
        targets = problem.units.require_actions().denormalize(problem.targets[rows])
        arrays = {"observations": problem.observations[rows], "targets": targets, "weights": problem.weights[rows]}
        write_npz(self.path / "states.npz", **arrays)

    def save_best(self, number: int, synthetic: SyntheticDataset) -> None:
        """Writes the best set of a run."""
        self.best_sets[number] = synthetic
        synthetic.save(self._runs[number] / "best.npz")

    def log(self, iteration: int, steps: Sequence[Metrics]) -> None:
        """Appends the metrics of the steps that end at `iteration`."""
        for step, metrics in enumerate(steps, start=iteration - len(steps) + 1):
            for number, (file, tensorboard) in enumerate(zip(self._metrics, self._tensorboard, strict=True)):
                own = {name: float(x[number] if np.ndim(x) else x) for name, x in metrics.items()}
                with naming(file.name):
                    file.write(metrics_line({"step": step, **own}))
                for name, value in own.items() if tensorboard is not None else ():
                    tensorboard.add_scalar(name, value, step)

    def checkpoint(self, distiller: Distiller, best_by: str, best_scores: Sequence[float]) -> None:
        """Writes the checkpoint and the sets as they stand.

        Raises:
            OSError: the disk is full, or the folder was deleted.
        """
        if not (self.path / "config.json").exists():
            raise FileNotFoundError(f"the folder of the run, {self.path}, was deleted while the run was writing to it")
        for file in self._metrics:  # those of its steps are there where the checkpoint is
            os.fsync(file.fileno())
        best = [self.best_sets.get(number) for number in range(distiller.n_runs)]
        state = {
            "distiller": distiller.state_dict(),
            "best_by": best_by,
            "best_scores": list(best_scores),
            "best_sets": [one and _as_tensors(one) for one in best],
        }
        write_torch(self._checkpoint, state)
        for path, synthetic in zip(self._runs, distiller.sets, strict=True):
            synthetic.save(path / "last.npz")


def _as_tensors(synthetic: SyntheticDataset) -> dict[str, Any]:
    arrays = {name: torch.from_numpy(getattr(synthetic, name).copy()) for name in ("observations", "actions")}
    return {**arrays, "config": synthetic.config}


def _cut_metrics(folder: Path, iteration: int) -> None:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    kept = [metrics for metrics in read_metrics(folder) if metrics["step"] <= iteration]
    reached = kept[-1]["step"] if kept else 0
    if reached < iteration:  # they are on the disk before the checkpoint is
        raise ValueError(
            f"{path} ends at step {reached} and the checkpoint at step {iteration}: it was cut; remove it to go on "
            "without those figures"
        )
    write_text(path, "".join(map(metrics_line, kept)))


def metrics_line(metrics: Metrics) -> str:
    """A step's metrics as a line, which ends in the CRC-32 of what stands before it."""
    text = to_json(metrics)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'


def _metrics(line: str) -> Metrics:
    metrics = json.loads(line)
    if not isinstance(metrics, dict) or metrics_line({n: x for n, x in metrics.items() if n != "crc"}) != line:
        raise ValueError("a line is not the metrics of a step, or was changed")
    del metrics["crc"]
    return {name: math.nan if x is None else x for name, x in metrics.items()}


def read_run(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], DistillConfig]:
    """Reads a run's config.json: where its dataset and teacher came from, and its settings.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: config.json is damaged, or the run was not started by the command line.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run (no config.json)")
    with reading(path, "configuration of a run"):
        content = unsealed(json.loads(path.read_text(encoding="utf-8")))
        source, config = content["source"], DistillConfig.from_dict(content["config"])
        if source is not None and (not isinstance(source, dict) or not isinstance(source.get("dataset"), str)):
            raise ValueError(f"its source must name a dataset, got {source!r}")
    if source is None:
        raise ValueError(f"the run in {folder} was started from Python: continue it with sdw.distill(..., out=...)")
    return source, config


def find_runs(folders: Iterable[str | os.PathLike[str]]) -> dict[str, Path]:
    """Names and folders of the runs that lie in these folders: one each, or run-000, run-001, … of several sets.

    A name is as much of the path as tells the runs apart.

    Raises:
        FileNotFoundError: a folder holds no run.
    """
    paths: list[Path] = []
    for folder in map(Path, folders):
        found = [folder] if (folder / "metrics.jsonl").exists() else sorted(folder.glob("run-*/"))
        if not found:
            raise FileNotFoundError(f"{folder} holds no run (no metrics.jsonl, and no run-000)")
        paths += found
    paths = list(dict.fromkeys(path.resolve() for path in paths))
    parts = 1
    while len({path.parts[-parts:] for path in paths}) < len(paths):
        parts += 1
    return {"/".join(path.parts[-parts:]): path for path in paths}


def read_metrics(folder: str | os.PathLike[str]) -> list[Metrics]:
    """Reads a run's metrics.jsonl, one dict an outer step; a last line cut off by a crash is left out.

    Figures that were not finite are null in the file, and NaN here.

    Raises:
        FileNotFoundError: the folder holds no metrics.
        ValueError: another line is damaged.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no metrics (no metrics.jsonl)")
    with reading(path, "file of metrics"), path.open(encoding="utf-8") as file:
        steps = [_metrics(line) for line in file if line.endswith("\n")]
        first = steps[0]["step"] if steps else 0
        if [step["step"] for step in steps] != list(range(first, first + len(steps))):
            raise ValueError("its steps do not follow one another")
        return steps


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a run's checkpoint. Raises ValueError if the file is damaged or something else."""
    path = Path(path)
    with reading(path, "checkpoint"):
        check_sum(path)
        state = read_torch(path)
        if not isinstance(state, dict) or _CHECKPOINT - set(state):
            raise ValueError(
                f"it is not one of this version of sdw_fast ({__version__}): finish that run with the version it was "
                "started with, or start it anew in another folder"
            )
        return state


def _tensorboard_writer(path: Path, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path), purge_step=iteration + 1)
