"""The outer loop: hypergradient descent on a synthetic set, with checkpoints that resume to the same bits."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sdw_fast import ops
from sdw_fast.data import TransitionDataset, denormalize_actions, normalize_actions
from sdw_fast.evaluate import Evaluation, evaluate_synthetic
from sdw_fast.objectives import OBJECTIVES, OuterProblem, outer_problem
from sdw_fast.policy import orthogonal_parameters
from sdw_fast.synthetic import INITIALIZATIONS, SyntheticDataset, choose_pairs
from sdw_fast.teacher import Teacher
from sdw_fast.version import __version__

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class DistillConfig:
    """Every hyperparameter of a distillation. `DistillConfig.paper()` gives those of the papers' public code.

    Raises:
        ValueError: a value is out of range; the message says which and what is allowed.
    """

    # objective (see sdw_fast.objectives)
    objective: str = "sdw"  # "dbc", "pbc", "av-pbc" or "sdw"
    density: bool | None = None  # weights carry d(s)^(−τ); None: as the objective says
    density_method: str = "knn"  # "knn", or "flow" (the paper's, slower)
    k: int = 10  # neighbors of the k-NN density
    tau: float | None = None  # exponent τ of the density; None: set by ess
    ess: float = 0.5  # effective sample size of the density weights, as a share of the dataset, if tau is None
    clip: float = 0.99  # quantile at which the density weights are clipped
    beta: float = 0.02  # β, the scale of Q in the weights

    # synthetic set
    size: int = 256  # pairs, N
    init: str = "random"  # "random", "kmeans++" or "top-q" real pairs

    # inner loop: behavior cloning on the synthetic set
    hidden: tuple[int, ...] = (256, 256, 256)  # hidden widths of the policy
    gain: float = math.sqrt(2)  # gain of the orthogonal initialization
    inner_steps: int = 100  # T
    inner_lr: float = 0.1  # α
    window: int | None = None  # differentiate the last `window` inner steps only; None: all

    # outer loop
    steps: int = 5_000
    batch_size: int = 2_560  # states an outer step
    optimizer: str = "adam"  # "adam" or "sgd"
    lr: float = 0.01
    momentum: float = 0.9  # of SGD; β₁ of Adam
    clip_norm: float = 2.0  # bound on the global norm of the hypergradient

    # the run
    seed: int = 0
    eval_every: int = 0  # outer steps between evaluations in the environment; 0: never
    eval_clones: int = 5  # policies cloned for an evaluation, from different initializations
    eval_episodes: int = 10  # episodes of an evaluation, in all
    checkpoint_every: int = 100  # outer steps between checkpoints, if the run has a folder

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name, allowed in (("objective", OBJECTIVES), ("init", INITIALIZATIONS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}")
        for name in ("size", "inner_steps", "steps", "batch_size", "eval_clones", "checkpoint_every", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "inner_lr", "clip_norm", "gain", "beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be 0 (never) or more, got {self.eval_every}")
        if self.eval_episodes < self.eval_clones:
            raise ValueError(f"eval_episodes={self.eval_episodes} must be at least eval_clones={self.eval_clones}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.window is not None and not 1 <= self.window <= self.inner_steps:
            raise ValueError(f"window must be between 1 and inner_steps={self.inner_steps}, got {self.window}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden widths must be at least 1, got {self.hidden}")

    @classmethod
    def paper(cls, **overrides: Any) -> DistillConfig:
        """The settings of the papers' public code: 50,000 outer steps of SGD at 0.1 with momentum 0.9."""
        return replace(cls(optimizer="sgd", lr=0.1, momentum=0.9, steps=50_000), **overrides)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {**asdict(self), "hidden": list(self.hidden)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DistillConfig:
        """Inverse of `to_dict`. Raises ValueError for a name that is not a setting."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown settings {unknown}; the settings are {sorted(known)}")
        return cls(**values)


Metrics = dict[str, float]
Callback = Callable[["Distiller", Metrics], None]


class Distiller:
    """Distills a dataset step by step: `step()` by hand, or `run()` to the end with a folder of results.

    An outer step draws θ_0 and a batch of states, unrolls T steps of behavior cloning on the synthetic set, takes the
    weighted matching loss at θ_T, and follows its hypergradient (design of Lei et al.; see `sdw_fast.ops.unrolled_bc`).
    The synthetic states and actions are optimized in normalized units.

    Args:
        data: The offline dataset.
        teacher: π* and Q; not needed by objective "dbc".
        config: The hyperparameters.
        device: Where the dataset, the synthetic set and the kernels live.

    Raises:
        ValueError: the objective needs a teacher that is missing, or the dataset is smaller than config.size.
    """

    def __init__(
        self,
        data: TransitionDataset,
        teacher: Teacher | None = None,
        config: DistillConfig | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config = config or DistillConfig()
        self.data = data
        self.device = torch.device(device)
        problem = self._outer_problem(data, teacher, config)
        self.report = problem.report
        self._states, self._targets, self._weights = (
            torch.as_tensor(array, device=self.device) for array in (problem.states, problem.targets, problem.weights)
        )
        rows = choose_pairs(
            data, config.size, method=config.init, teacher=teacher, rng=np.random.default_rng(config.seed)
        )
        self.observations = self._leaf(data.normalized_observations[rows])
        self.actions = self._leaf(normalize_actions(data.actions[rows], *data.action_bounds))
        self._sizes = (self.observations.shape[1], *config.hidden, self.actions.shape[1])
        self._generator = torch.Generator(self.device).manual_seed(config.seed)
        self._optimizer = self._make_optimizer()
        self.iteration = 0
        self.best_return = -math.inf

    @staticmethod
    def _outer_problem(data: TransitionDataset, teacher: Teacher | None, config: DistillConfig) -> OuterProblem:
        return outer_problem(
            data,
            teacher,
            objective=config.objective,
            density=config.density,
            density_method=config.density_method,
            k=config.k,
            tau=config.tau,
            ess=config.ess if config.tau is None else None,
            clip=config.clip,
            beta=config.beta,
        )

    def _leaf(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, dtype=torch.float32, device=self.device, requires_grad=True)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        leaves, config = [self.observations, self.actions], self.config
        if config.optimizer == "sgd":
            return torch.optim.SGD(leaves, lr=config.lr, momentum=config.momentum)
        return torch.optim.Adam(leaves, lr=config.lr, betas=(config.momentum, 0.999))

    def step(self) -> Metrics:
        """Takes one outer step.

        Returns:
            "loss": H on this step's batch before the step; "gradient_norm": norm of the hypergradient before clipping;
            "adjoint_growth": ‖∂H/∂θ_start‖ / ‖∂H/∂θ_T‖, where θ_start is θ_0 (or the start of the window): the factor
            by which the unroll amplifies, large when inner training is chaotic.

        Raises:
            FloatingPointError: the loss or the hypergradient is not finite. The synthetic set is left as it was.
        """
        config = self.config
        initial = orthogonal_parameters(self._sizes, gain=config.gain, generator=self._generator)
        for parameter in initial:
            parameter.requires_grad_()
        rows = torch.randint(len(self._states), (config.batch_size,), generator=self._generator, device=self.device)
        final = ops.unrolled_bc(
            self.observations,
            self.actions,
            initial,
            steps=config.inner_steps,
            lr=config.inner_lr,
            window=config.window,
        )
        for parameter in final:
            parameter.retain_grad()
        loss = ops.behavior_matching(final, self._states[rows], self._targets[rows], self._weights[rows])
        self._optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([self.observations, self.actions], config.clip_norm)
        metrics = {
            "loss": float(loss.detach()),
            "gradient_norm": float(norm),
            "adjoint_growth": float(_norm(initial) / _norm(final)),
        }
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])):
            raise FloatingPointError(
                f"outer step {self.iteration + 1}: loss {metrics['loss']}, hypergradient norm "
                f"{metrics['gradient_norm']}; lower inner_lr or gain (see docs: conditioning)"
            )
        self._optimizer.step()
        self.iteration += 1
        return metrics

    @property
    def synthetic(self) -> SyntheticDataset:
        """The synthetic set as it stands, in the environment's units."""
        data = self.data
        low, high = data.action_bounds
        return SyntheticDataset(
            observations=data.normalizer.denormalize(self.observations.detach().cpu().numpy()),
            actions=denormalize_actions(self.actions.detach().cpu().numpy(), low, high),
            normalizer=data.normalizer,
            action_low=low,
            action_high=high,
            env_id=data.env_id,
            reference_scores=data.reference_scores,
            config={**self.config.to_dict(), "iteration": self.iteration},
            dataset_name=data.name,
            dataset_hash=data.content_hash,
        )

    def evaluate(self) -> Evaluation:
        """Clones fresh policies on the synthetic set and runs them in the dataset's environment.

        Raises:
            ValueError: the dataset does not say which environment it comes from.
        """
        if self.data.env_id is None:
            raise ValueError("the dataset names no environment to evaluate in; set eval_every=0 or give it an env_id")
        config = self.config
        return evaluate_synthetic(
            self.synthetic, clones=config.eval_clones, episodes=config.eval_episodes, seed=config.seed
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on to the same bits; tensors and plain values only."""
        return {
            "version": __version__,
            "iteration": self.iteration,
            "best_return": self.best_return,
            "observations": self.observations.detach().clone(),
            "actions": self.actions.detach().clone(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "dataset_hash": self.data.content_hash,
            "config": self.config.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            ValueError: the state belongs to another dataset or another configuration (the number of steps, of
                evaluations and of checkpoints may differ).
        """
        if state["dataset_hash"] != self.data.content_hash:
            raise ValueError(
                f"the checkpoint belongs to another dataset (content hash {state['dataset_hash'][:12]}…, "
                f"this one has {self.data.content_hash[:12]}…)"
            )
        free = ("steps", "eval_every", "eval_clones", "eval_episodes", "checkpoint_every")
        now = self.config.to_dict()
        differing = [name for name, value in state["config"].items() if name not in free and now.get(name) != value]
        if differing:
            raise ValueError(f"the checkpoint was made with other settings of {differing}")
        with torch.no_grad():
            self.observations.copy_(state["observations"])
            self.actions.copy_(state["actions"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"].cpu())
        self.iteration = state["iteration"]
        self.best_return = state["best_return"]

    def run(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        source: dict[str, Any] | None = None,
        callback: Callback | None = None,
        progress: bool = True,
    ) -> SyntheticDataset:
        """Takes the outer steps that remain, showing and keeping what comes of them.

        Args:
            folder: Where to keep the run: config.json, metrics.jsonl (a line a step), checkpoint, last.npz, and
                best.npz (the set with the highest return; without evaluations, the last). A folder that holds a
                checkpoint is continued. None: nothing is written.
            source: Where dataset and teacher came from, kept in config.json for `sdw-fast distill --resume`.
            callback: Called after every step with the distiller and the step's metrics.
            progress: Whether to show the bar.

        Returns:
            The best set, as best.npz.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step under way is finished and saved first. A second Ctrl-C stops at once.
        """
        run = RunFolder(folder, self, source) if folder is not None else None
        best = run.best() if run and self.config.eval_every else None
        bar = tqdm(total=self.config.steps, initial=self.iteration, disable=not progress, unit="step", smoothing=0.05)
        last_return = math.nan
        with _deferred_interrupt() as interrupted, bar:
            while self.iteration < self.config.steps:
                began = time.perf_counter()
                metrics = self.step()
                metrics["seconds"] = time.perf_counter() - began
                if self.config.eval_every and self._due(self.config.eval_every):
                    result = self.evaluate()
                    last_return = result.mean if result.normalized_mean is None else result.normalized_mean
                    metrics |= {"return": result.mean, "score": last_return}
                    if last_return > self.best_return:
                        self.best_return, best = last_return, self.synthetic
                        if run:
                            run.save_best(best)
                if run:
                    run.log(self.iteration, metrics)
                bar.set_postfix_str(
                    f"loss {metrics['loss']:.4f}, ‖∇‖ {metrics['gradient_norm']:.3g}, return {last_return:.1f}",
                    refresh=False,
                )
                bar.update()
                if callback:
                    callback(self, metrics)
                stop = interrupted()
                if run and (stop or self._due(self.config.checkpoint_every)):
                    run.checkpoint(self)
                if stop:
                    resume = (
                        f"`sdw-fast distill --resume {folder}`" if source else f"the same call with folder={folder}"
                    )
                    kept = f"; {resume} continues to the same result" if run else ", nothing was kept"
                    raise KeyboardInterrupt(f"stopped after outer step {self.iteration}{kept}")
        if best is None:
            best = self.synthetic
            if run:
                run.save_best(best)
        return best

    def _due(self, every: int) -> bool:
        return self.iteration % every == 0 or self.iteration == self.config.steps


class RunFolder:
    """The folder of one run. Every file is written whole under a temporary name and renamed; metrics are appended.

    On opening a folder with a checkpoint the distiller continues from it, and metrics beyond it are cut off, so that
    a killed run leaves the same files as one that was not.
    """

    def __init__(
        self, folder: str | os.PathLike[str], distiller: Distiller, source: dict[str, Any] | None = None
    ) -> None:
        self.path = Path(folder)
        self.path.mkdir(parents=True, exist_ok=True)
        self._checkpoint = self.path / "checkpoint"
        if self._checkpoint.exists():
            distiller.load_state_dict(load_checkpoint(self._checkpoint))
        self._cut_metrics(distiller.iteration)
        if not distiller.iteration:
            (self.path / "best.npz").unlink(missing_ok=True)
        self._write_config(distiller, source)
        self._metrics = (self.path / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self._tensorboard = _tensorboard_writer(self.path / "tensorboard", distiller.iteration)

    def _write_config(self, distiller: Distiller, source: dict[str, Any] | None) -> None:
        data = distiller.data
        content = {
            "version": __version__,
            "source": source,
            "config": distiller.config.to_dict(),
            "dataset": {"name": data.name, "hash": data.content_hash, "transitions": len(data)},
            "objective": distiller.report,
        }
        _write_text(self.path / "config.json", json.dumps(content, indent=2) + "\n")

    def _cut_metrics(self, iteration: int) -> None:
        if (self.path / "metrics.jsonl").exists():
            kept = [metrics for metrics in read_metrics(self.path) if metrics["step"] <= iteration]
            _write_text(self.path / "metrics.jsonl", "".join(json.dumps(metrics) + "\n" for metrics in kept))

    def best(self) -> SyntheticDataset | None:
        path = self.path / "best.npz"
        return SyntheticDataset.load(path) if path.exists() else None

    def save_best(self, synthetic: SyntheticDataset) -> None:
        synthetic.save(self.path / "best.npz")

    def log(self, iteration: int, metrics: Metrics) -> None:
        self._metrics.write(json.dumps({"step": iteration, **metrics}) + "\n")
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, iteration)

    def checkpoint(self, distiller: Distiller) -> None:
        temporary = self._checkpoint.with_name(f".checkpoint.{os.getpid()}.tmp")
        try:
            torch.save(distiller.state_dict(), temporary)
            temporary.replace(self._checkpoint)
        finally:
            temporary.unlink(missing_ok=True)
        distiller.synthetic.save(self.path / "last.npz")


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
        raise ValueError(f"the run in {folder} was started from Python: continue it with sdw.distill(..., folder=...)")
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
        missing = {"iteration", "observations", "actions", "optimizer", "generator", "dataset_hash"} - set(state)
    except Exception as error:  # torch raises several kinds on a damaged file
        raise ValueError(f"{path} is not a readable checkpoint (truncated?): {error}") from error
    if missing:
        raise ValueError(f"{path} is not a checkpoint of a distillation: it lacks {sorted(missing)}")
    return state


def distill(
    data: TransitionDataset,
    teacher: Teacher | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    callback: Callback | None = None,
    progress: bool = True,
    **settings: Any,
) -> SyntheticDataset:
    """Distills a dataset into a synthetic set.

    Args:
        data: The offline dataset, as `load_dataset` gives it.
        teacher: π* and Q; not needed by objective "dbc".
        folder: Where to keep the run (see `Distiller.run`); a folder with a checkpoint is continued.
        device: Where to compute.
        callback: Called after every outer step with the distiller and the step's metrics.
        progress: Whether to show a progress bar.
        **settings: Fields of `DistillConfig`, e.g. objective="sdw", size=256, steps=5_000, seed=0.

    Returns:
        The synthetic set: the one with the best return where eval_every is set, else the last.
    """
    distiller = Distiller(data, teacher, DistillConfig.from_dict(settings), device=device)
    return distiller.run(folder, callback=callback, progress=progress)


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.grad.norm() for t in tensors if t.grad is not None]).norm()


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


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
