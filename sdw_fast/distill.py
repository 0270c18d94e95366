"""The outer loop: hypergradient descent on a synthetic set, with checkpoints that resume to the same bits."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sdw_fast import ops
from sdw_fast.data import TransitionDataset, denormalize_actions, normalize_actions
from sdw_fast.evaluate import Evaluation, evaluate_synthetic
from sdw_fast.objectives import OBJECTIVES, OuterProblem, outer_problem
from sdw_fast.policy import CLONING, orthogonal_parameters
from sdw_fast.synthetic import INITIALIZATIONS, SyntheticDataset, choose_pairs
from sdw_fast.teacher import Teacher
from sdw_fast.version import __version__

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine")


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
    hidden: tuple[int, ...] = CLONING["hidden"]  # hidden widths of the policies cloned on the set
    inner_width: int | None = 64  # hidden widths while distilling are at most this; None: those of `hidden`
    gain: float = CLONING["gain"]  # gain of the orthogonal initialization
    inner_steps: int = CLONING["inner_steps"]  # T
    inner_lr: float = CLONING["inner_lr"]  # α
    inner_momentum: float = CLONING["inner_momentum"]  # μ; 0: plain SGD, which wants a larger α
    window: int | None = None  # differentiate the last `window` inner steps only; None: all

    # outer loop
    steps: int = 5_000
    batch_size: int = 2_560  # states an outer step
    optimizer: str = "adam"  # "adam" or "sgd"
    lr: float = 0.03
    schedule: str = "cosine"  # of lr over the outer steps: "constant", or "cosine" down to 0
    momentum: float = 0.9  # of SGD; β₁ of Adam
    average: float = 0.9  # decay of the moving average that is the synthetic set; 0: the last iterate itself
    clip_norm: float = 0.02  # bound on the global norm of the hypergradient; SGD, which it slows down, wants more

    # the run
    seed: int = 0
    eval_every: int = 0  # outer steps between evaluations in the environment; 0: never
    eval_clones: int = 5  # policies cloned for an evaluation, from different initializations
    eval_episodes: int = 10  # episodes of an evaluation, in all
    checkpoint_every: int = 100  # outer steps between checkpoints, if the run has a folder

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        choices = {"objective": OBJECTIVES, "init": INITIALIZATIONS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
        for name, allowed in choices.items():
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
        for name in ("momentum", "inner_momentum", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.window is not None and not 1 <= self.window <= self.inner_steps:
            raise ValueError(f"window must be between 1 and inner_steps={self.inner_steps}, got {self.window}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden widths must be at least 1, got {self.hidden}")
        if self.inner_width is not None and self.inner_width < 1:
            raise ValueError(f"inner_width must be at least 1, or None for those of hidden, got {self.inner_width}")

    @classmethod
    def paper(cls, **overrides: Any) -> DistillConfig:
        """The settings of the papers' public code: 50,000 outer steps of SGD at 0.1 with momentum 0.9."""
        outer = {"optimizer": "sgd", "lr": 0.1, "schedule": "constant", "average": 0.0, "clip_norm": 2.0}
        inner = {"inner_width": None, "gain": math.sqrt(2), "inner_steps": 100, "inner_lr": 0.1, "inner_momentum": 0.0}
        return cls(**{"steps": 50_000, **outer, **inner, **overrides})

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


Metrics = dict[str, Any]  # a float each; with n_runs an array (R,) each
Callback = Callable[["Distiller", Metrics], None]

# Outer states, targets and weights up to this size lie on the device; a larger dataset stays in host memory.
RESIDENT_BYTES = 8 << 30
# Outer steps between two looks at what another device computed: the host runs ahead of it in between.
FETCH_EVERY = 32
# A step whose hypergradient is not finite is left out; as many in a row end the run.
MAX_LEFT_OUT = 10


class Distiller:
    """Distills a dataset step by step: `step()` by hand, or `run()` to the end with a folder of results.

    An outer step draws θ_0 and a batch of states, unrolls T steps of behavior cloning on the synthetic set, takes the
    weighted matching loss at θ_T, and follows its hypergradient (design of Lei et al.; see `sdw_fast.ops.unrolled_bc`).
    The synthetic states and actions are optimized in normalized units.

    On a GPU everything that a step needs lies there (a dataset beyond 8 GiB stays in host memory, where each batch is
    gathered and sent ahead), and `run` looks at the metrics every 32 steps only: the host never waits in between.

    Args:
        data: The offline dataset.
        teacher: π* and Q; not needed by objective "dbc".
        config: The hyperparameters.
        device: Where the dataset, the synthetic set and the kernels live.
        n_runs: R: distill R sets at once, each with its own random numbers. Run r takes the draws of a single run with
            seed + r, so that it follows the same steps up to rounding. None: one run, without a leading dimension.

    Attributes:
        observations, actions: The synthetic set in normalized units, (N, D) and (N, A), or (R, N, D) and (R, N, A).
        iteration: Outer steps taken.
        report: Figures of the objective, see `sdw_fast.objectives.OuterProblem`.

    Raises:
        ValueError: the objective needs a teacher that is missing, the dataset is smaller than config.size, n_runs is
            below 1, or the device is a GPU and there is none.
    """

    def __init__(
        self,
        data: TransitionDataset,
        teacher: Teacher | None = None,
        config: DistillConfig | None = None,
        *,
        device: str | torch.device = "cpu",
        n_runs: int | None = None,
    ) -> None:
        if n_runs is not None and n_runs < 1:
            raise ValueError(f"n_runs must be at least 1, or None for a single run, got {n_runs}")
        self.config = config = config or DistillConfig()
        self.data = data
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={device!r} needs a GPU and a CUDA build of torch, and torch finds none here")
        self.n_runs = n_runs
        self.seeds = [config.seed + run for run in range(n_runs or 1)]
        problem = self._outer_problem(data, teacher, config)
        self.report = problem.report
        self._batches = OuterBatches(problem, self.device)
        chosen = [
            choose_pairs(data, config.size, method=config.init, teacher=teacher, rng=np.random.default_rng(seed))
            for seed in self.seeds
        ]
        rows = chosen[0] if n_runs is None else np.stack(chosen)
        self.observations = self._leaf(data.normalized_observations[rows])
        self.actions = self._leaf(normalize_actions(data.actions[rows], *data.action_bounds))
        widths = [min(width, config.inner_width or width) for width in config.hidden]
        self._sizes = (self.observations.shape[-1], *widths, self.actions.shape[-1])
        self._generators = [torch.Generator(self.device).manual_seed(seed) for seed in self.seeds]
        self._row_generators = self._generators
        if self._batches.device != self.device:
            self._row_generators = [torch.Generator(self._batches.device).manual_seed(seed) for seed in self.seeds]
        self._optimizer = self._make_optimizer()
        self._averages = [x.detach().clone() for x in self._leaves] if config.average else []
        self._left_out = 0  # steps in a row, up to the last fetched
        self.iteration = 0
        self._best_returns = [-math.inf] * len(self.seeds)

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

    @property
    def _ahead(self) -> bool:
        """Whether steps are only enqueued, so that the host must not ask what came of them."""
        return self.device.type != "cpu"

    @property
    def _leaves(self) -> list[Tensor]:
        return [self.observations, self.actions]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        leaves, config = self._leaves, self.config
        fused = self._ahead or None  # the fused kernels can be told on the device to leave a step out
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(leaves, lr=config.lr, momentum=config.momentum, fused=fused)
            if config.momentum:  # fused SGD allocates it in its first step, and leaves it undefined if that is left out
                for leaf in leaves:
                    optimizer.state[leaf]["momentum_buffer"] = torch.zeros_like(leaf)
            return optimizer
        return torch.optim.Adam(leaves, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)

    def step(self) -> Metrics:
        """Takes one outer step. Beyond config.steps a cosine schedule leaves nothing to move by.

        A step whose loss or hypergradient is not finite is left out: it counts, its metrics say so, and the synthetic
        set stays as it was. With n_runs it is left out of all of them.

        Returns:
            "loss": H on this step's batch before the step; "gradient_norm": norm of the hypergradient before clipping;
            "adjoint_growth": ‖∂H/∂θ_start‖ / ‖∂H/∂θ_T‖, where θ_start is θ_0 (or the start of the window): the factor
            by which the unroll amplifies, large when inner training is chaotic. A float each, or with n_runs an array
            (R,).

        Raises:
            FloatingPointError: ten or more steps in a row were left out, this one the last.
        """
        return self._fetch([self._advance()])[0]

    def _advance(self) -> Tensor:
        """Takes one outer step, or leaves it out if it is not finite; on another device it is only enqueued.

        Returns:
            The metrics that `step` names, (3,) or (3, R).
        """
        config = self.config
        initial, batches = self._draw()
        for parameter in initial:
            parameter.requires_grad_()
        final = ops.unrolled_bc(
            self.observations,
            self.actions,
            initial,
            steps=config.inner_steps,
            lr=config.inner_lr,
            momentum=config.inner_momentum,
            window=config.window,
        )
        for parameter in final:
            parameter.retain_grad()
        if self.n_runs is None:
            losses = ops.behavior_matching(final, *batches[0])
        else:
            policies = zip(*(parameter.unbind() for parameter in final), strict=True)
            losses = torch.stack(
                [ops.behavior_matching(policy, *batch) for policy, batch in zip(policies, batches, strict=True)]
            )
        self._optimizer.zero_grad()
        losses.sum().backward()
        norms = self._clip()
        metrics = torch.stack([losses.detach(), norms, self._norms(initial) / self._norms(final)])
        self.iteration += 1
        finite = metrics[:2].isfinite().all()
        if self._ahead:
            self._optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
        elif not finite:
            return metrics
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.step()
        if self._averages:
            # A plain mean of the iterates at first, so that the average forgets where it started.
            share = max(1 - config.average, 1 / self.iteration) * finite
            for average, leaf in zip(self._averages, self._leaves, strict=True):
                average.lerp_(leaf.detach(), share)
        return metrics

    def _learning_rate(self) -> float:
        """The outer learning rate of the step under way."""
        if self.config.schedule == "constant":
            return self.config.lr
        done = min((self.iteration - 1) / self.config.steps, 1.0)
        return self.config.lr * (1 + math.cos(math.pi * done)) / 2

    def _draw(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Draws θ_0 of every run, as one list of parameters, and every run's states, targets and weights."""
        generators = self._generators[0] if self.n_runs is None else self._generators
        initial = orthogonal_parameters(self._sizes, gain=self.config.gain, generator=generators)
        return initial, [self._batches.draw(self.config.batch_size, generator) for generator in self._row_generators]

    def _norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Norm of the gradients of all tensors together: a scalar, or one a run."""
        first = 0 if self.n_runs is None else 1
        norms = [
            torch.linalg.vector_norm(t.grad, dim=tuple(range(first, t.ndim))) for t in tensors if t.grad is not None
        ]
        return torch.linalg.vector_norm(torch.stack(norms), dim=0)

    def _clip(self) -> Tensor:
        """Scales each run's hypergradient down to norm clip_norm where it is longer; returns the norms before."""
        norms = self._norms(self._leaves)
        factors = (self.config.clip_norm / (norms + 1e-6)).clamp(max=1.0)
        for leaf in self._leaves:
            if leaf.grad is not None:
                leaf.grad.mul_(factors[..., None, None])
        return norms

    def _fetch(self, steps: list[Tensor]) -> list[Metrics]:
        """Waits for the last steps taken, and returns the metrics of each. Raises FloatingPointError as `step`."""
        figures = torch.stack(steps).cpu().numpy()  # (steps, 3) or (steps, 3, R)
        for number, (loss, norm, _) in enumerate(figures, start=self.iteration - len(steps) + 1):
            self._left_out = 0 if np.isfinite([loss, norm]).all() else self._left_out + 1
            if self._left_out >= MAX_LEFT_OUT:
                raise FloatingPointError(
                    f"{self._left_out} outer steps in a row are not finite, up to step {number}: loss {loss}, "
                    f"hypergradient norm {norm}; lower inner_lr or gain (see docs: conditioning)"
                )
        names = ("loss", "gradient_norm", "adjoint_growth")
        return [
            {name: float(x) if self.n_runs is None else x for name, x in zip(names, step, strict=True)}
            for step in figures
        ]

    @property
    def sets(self) -> list[SyntheticDataset]:
        """The synthetic sets as they stand, one a run, in the environment's units; moving averages if so configured."""
        observations, actions = (x.detach().cpu().numpy() for x in self._averages or self._leaves)
        if self.n_runs is None:
            observations, actions = observations[None], actions[None]
        data = self.data
        low, high = data.action_bounds
        return [
            SyntheticDataset(
                observations=data.normalizer.denormalize(observations[run]),
                actions=denormalize_actions(actions[run], low, high),
                normalizer=data.normalizer,
                action_low=low,
                action_high=high,
                env_id=data.env_id,
                reference_scores=data.reference_scores,
                config={**self.config.to_dict(), "seed": seed, "iteration": self.iteration},
                dataset_name=data.name,
                dataset_hash=data.content_hash,
            )
            for run, seed in enumerate(self.seeds)
        ]

    @property
    def synthetic(self) -> SyntheticDataset:
        """The synthetic set as it stands, in the environment's units. With n_runs there are several: see `sets`."""
        if self.n_runs is not None:
            raise ValueError(f"{self.n_runs} sets are being distilled: take .sets, a list, in place of .synthetic")
        return self.sets[0]

    @property
    def best_return(self) -> float:
        """The highest return of an evaluation so far, of any run; −inf before the first."""
        return max(self._best_returns)

    def evaluate(self, run: int = 0) -> Evaluation:
        """Clones fresh policies on the synthetic set of a run and runs them in the dataset's environment.

        Raises:
            ValueError: the dataset does not say which environment it comes from.
        """
        if self.data.env_id is None:
            raise ValueError("the dataset names no environment to evaluate in; set eval_every=0 or give it an env_id")
        config = self.config
        return evaluate_synthetic(
            self.sets[run], clones=config.eval_clones, episodes=config.eval_episodes, seed=self.seeds[run]
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on to the same bits; tensors and plain values only."""
        state = {
            "version": __version__,
            "iteration": self.iteration,
            "best_returns": list(self._best_returns),
            "observations": self.observations.detach().clone(),
            "actions": self.actions.detach().clone(),
            "averages": [average.clone() for average in self._averages],
            "optimizer": self._optimizer.state_dict(),
            "generator": torch.stack([generator.get_state() for generator in self._generators]),
            "dataset_hash": self.data.content_hash,
            "config": self.config.to_dict(),
            "device": self.device.type,
            "n_runs": self.n_runs,
        }
        if self._row_generators is not self._generators:
            state["row_generator"] = torch.stack([generator.get_state() for generator in self._row_generators])
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            ValueError: the state belongs to another dataset, another configuration (the number of steps, of
                evaluations and of checkpoints may differ), another kind of device (whose random numbers are others) or
                another number of runs. With schedule="cosine" the number of steps must be the same too.
        """
        if state["dataset_hash"] != self.data.content_hash:
            raise ValueError(
                f"the checkpoint belongs to another dataset (content hash {state['dataset_hash'][:12]}…, "
                f"this one has {self.data.content_hash[:12]}…)"
            )
        free = ["eval_every", "eval_clones", "eval_episodes", "checkpoint_every"]
        free += ["steps"] if self.config.schedule == "constant" else []
        now = {**self.config.to_dict(), "device": self.device.type, "n_runs": self.n_runs}
        then = {**state["config"], "device": state.get("device", "cpu"), "n_runs": state.get("n_runs")}
        differing = [name for name in now | then if name not in free and now.get(name) != then.get(name)]
        if differing:
            hint = '; schedule="constant" leaves the number of steps open' if differing == ["steps"] else ""
            raise ValueError(f"the checkpoint was made with other settings of {differing}{hint}")
        with torch.no_grad():
            self.observations.copy_(state["observations"])
            self.actions.copy_(state["actions"])
            for average, saved in zip(self._averages, state.get("averages", []), strict=True):
                average.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        _set_states(self._generators, state["generator"])
        if self._row_generators is not self._generators:
            _set_states(self._row_generators, state["row_generator"])
        self._left_out = 0
        self.iteration = state["iteration"]
        self._best_returns = list(state["best_returns"]) if "best_returns" in state else [state["best_return"]]

    def run(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        source: dict[str, Any] | None = None,
        callback: Callback | None = None,
        progress: bool = True,
    ) -> SyntheticDataset | list[SyntheticDataset]:
        """Takes the outer steps that remain, showing and keeping what comes of them.

        Args:
            folder: Where to keep the run: config.json, metrics.jsonl (a line a step), checkpoint, last.npz, and
                best.npz (the set with the highest return; without evaluations, the last). A folder that holds a
                checkpoint is continued. With n_runs, metrics and sets lie in run-000, run-001, … inside it.
                None: nothing is written.
            source: Where dataset and teacher came from, kept in config.json for `sdw-fast distill --resume`.
            callback: Called after every step with the distiller and the step's metrics; a GPU then waits for it.
            progress: Whether to show the bar.

        Returns:
            The best set, as best.npz; with n_runs a list of them.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step under way is finished and saved first. A second Ctrl-C stops at once.
        """
        config = self.config
        run = RunFolder(folder, self, source) if folder is not None else None
        best = run.best() if run and config.eval_every else {}
        bar = tqdm(total=config.steps, initial=self.iteration, disable=not progress, unit="step", smoothing=0.05)
        pending: list[Tensor] = []  # metrics not looked at yet
        last_return, seconds = math.nan, 0.0
        with _deferred_interrupt() as interrupted, bar, run or contextlib.nullcontext():
            while self.iteration < config.steps:
                began = time.perf_counter()
                pending.append(self._advance())
                evaluating = bool(config.eval_every) and self._due(config.eval_every)
                saving = run is not None and self._due(config.checkpoint_every)
                wait = not self._ahead or callback is not None or evaluating or saving or interrupted()
                if not wait and len(pending) < FETCH_EVERY and self.iteration < config.steps:
                    seconds += time.perf_counter() - began
                    continue
                steps = self._fetch(pending)
                seconds += time.perf_counter() - began
                for metrics in steps:
                    metrics["seconds"] = seconds / len(steps)
                pending, seconds = [], 0.0
                if evaluating:
                    steps[-1] |= self._evaluate_all(best, run)
                    last_return = float(np.mean(steps[-1]["score"]))
                if run:
                    run.log(self.iteration, steps)
                loss, norm = (np.mean(steps[-1][name]) for name in ("loss", "gradient_norm"))
                bar.set_postfix_str(f"loss {loss:.4f}, ‖∇‖ {norm:.3g}, return {last_return:.1f}", refresh=False)
                bar.update(len(steps))
                if callback:
                    callback(self, steps[-1])
                stop = interrupted()
                if run and (stop or saving):
                    run.checkpoint(self)
                if stop:
                    resume = (
                        f"`sdw-fast distill --resume {folder}`" if source else f"the same call with folder={folder}"
                    )
                    kept = f"; {resume} continues to the same result" if run else ", nothing was kept"
                    raise KeyboardInterrupt(f"stopped after outer step {self.iteration}{kept}")
        for number, last in enumerate(self.sets):
            if number not in best:
                best[number] = last
                if run:
                    run.save_best(number, last)
        return best[0] if self.n_runs is None else [best[number] for number in range(self.n_runs)]

    def _evaluate_all(self, best: dict[int, SyntheticDataset], run: RunFolder | None) -> Metrics:
        """Evaluates every run's set, and keeps in `best` (and in the folder) those that beat all before them."""
        results = [self.evaluate(number) for number in range(len(self.seeds))]
        returns = [result.mean for result in results]
        scores = [result.mean if result.normalized_mean is None else result.normalized_mean for result in results]
        for number, score in enumerate(scores):
            if score > self._best_returns[number]:
                self._best_returns[number], best[number] = score, self.sets[number]
                if run:
                    run.save_best(number, best[number])
        if self.n_runs is None:
            return {"return": returns[0], "score": scores[0]}
        return {"return": np.array(returns), "score": np.array(scores)}

    def _due(self, every: int) -> bool:
        return self.iteration % every == 0 or self.iteration == self.config.steps


class OuterBatches:
    """Draws batches of an outer problem for a device: from there, or from host memory above RESIDENT_BYTES.

    Attributes:
        device: Where the rows lie and where the generators that draw them must live.
    """

    def __init__(self, problem: OuterProblem, device: torch.device) -> None:
        arrays = (problem.states, problem.targets, problem.weights)
        resident = sum(array.nbytes for array in arrays) <= RESIDENT_BYTES
        self.device = device if resident else torch.device("cpu")
        self._target = device
        self._tensors = [torch.as_tensor(array, device=self.device) for array in arrays]

    def draw(self, size: int, generator: torch.Generator) -> list[Tensor]:
        """Returns the states (B, D), targets (B, A) and weights (B,) of `size` rows drawn with replacement."""
        rows = torch.randint(len(self._tensors[0]), (size,), generator=generator, device=self.device)
        batch = [tensor[rows] for tensor in self._tensors]
        if self.device == self._target:
            return batch
        return [part.pin_memory().to(self._target, non_blocking=True) for part in batch]


class RunFolder:
    """The folder of one run. Every file is written whole under a temporary name and renamed; metrics are appended.

    With n_runs, the runs' metrics and sets lie in folders run-000, run-001, … of their own; configuration and
    checkpoint are one for all. On opening a folder with a checkpoint the distiller continues from it, and metrics
    beyond it are cut off, so that a killed run leaves the same files as one that was not. A context manager: leaving
    it closes what is open.
    """

    def __init__(
        self, folder: str | os.PathLike[str], distiller: Distiller, source: dict[str, Any] | None = None
    ) -> None:
        self.path = Path(folder)
        self._batched = distiller.n_runs is not None
        self._runs = [self.path / f"run-{r:03}" for r in range(len(distiller.seeds))] if self._batched else [self.path]
        for path in self._runs:
            path.mkdir(parents=True, exist_ok=True)
        self._checkpoint = self.path / "checkpoint"
        if self._checkpoint.exists():
            distiller.load_state_dict(load_checkpoint(self._checkpoint))
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
        data = distiller.data
        content = {
            "version": __version__,
            "source": source,
            "config": distiller.config.to_dict(),
            "n_runs": distiller.n_runs,
            "dataset": {"name": data.name, "hash": data.content_hash, "transitions": len(data)},
            "objective": distiller.report,
        }
        _write_text(self.path / "config.json", json.dumps(content, indent=2) + "\n")

    def best(self) -> dict[int, SyntheticDataset]:
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

    def checkpoint(self, distiller: Distiller) -> None:
        """Writes the checkpoint and the sets as they stand."""
        temporary = self._checkpoint.with_name(f".checkpoint.{os.getpid()}.tmp")
        try:
            torch.save(distiller.state_dict(), temporary)
            temporary.replace(self._checkpoint)
        finally:
            temporary.unlink(missing_ok=True)
        for path, synthetic in zip(self._runs, distiller.sets, strict=True):
            synthetic.save(path / "last.npz")


def _cut_metrics(folder: Path, iteration: int) -> None:
    if (folder / "metrics.jsonl").exists():
        kept = [metrics for metrics in read_metrics(folder) if metrics["step"] <= iteration]
        _write_text(folder / "metrics.jsonl", "".join(json.dumps(metrics) + "\n" for metrics in kept))


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
    folder: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    callback: Callback | None = None,
    progress: bool = True,
    **settings: Any,
) -> SyntheticDataset | list[SyntheticDataset]:
    """Distills a dataset into a synthetic set, or into several at once.

    Args:
        data: The offline dataset, as `load_dataset` gives it.
        teacher: π* and Q; not needed by objective "dbc".
        n_runs: R: distill R sets with the seeds seed, seed + 1, … side by side; see `Distiller`.
        folder: Where to keep the run (see `Distiller.run`); a folder with a checkpoint is continued.
        device: Where to compute.
        callback: Called after every outer step with the distiller and the step's metrics.
        progress: Whether to show a progress bar.
        **settings: Fields of `DistillConfig`, e.g. objective="sdw", size=256, steps=5_000, seed=0.

    Returns:
        The synthetic set: the one with the best return where eval_every is set, else the last. With n_runs a list.
    """
    distiller = Distiller(data, teacher, DistillConfig.from_dict(settings), device=device, n_runs=n_runs)
    return distiller.run(folder, callback=callback, progress=progress)


def _set_states(generators: Sequence[torch.Generator], states: Tensor) -> None:
    for generator, state in zip(generators, states.cpu().reshape(len(generators), -1), strict=True):
        generator.set_state(state.clone())  # a view into other states is misaligned


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
