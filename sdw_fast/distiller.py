"""The outer loop, step by step: an outer problem and a synthetic set → a better set.

Knows nothing of files, environments or reinforcement learning. R sets are distilled at once, each with random numbers
of its own; one set is R = 1.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdw_fast.batches import Draws, OuterBatches
from sdw_fast.config import DistillConfig
from sdw_fast.descent import clip, norms_of, outer_lr, outer_optimizer
from sdw_fast.files import damage_named
from sdw_fast.identity import identity, refuse_other, tell_of_rounding
from sdw_fast.inner import InnerLoop
from sdw_fast.objectives import OuterProblem
from sdw_fast.ops._backend import one_thread
from sdw_fast.ranks import Ranks, ranked
from sdw_fast.stability import LEAST, Watch, bearable_lr, rough, tell_of
from sdw_fast.synthetic import SyntheticDataset
from sdw_fast.version import __version__

Metrics = dict[str, Any]  # a float each; of several sets an array (R,) each

# A step whose hypergradient is not finite is left out; as many in a row end the run.
MAX_LEFT_OUT = 10
# Steps launched kernel by kernel before one is captured: libraries make ready in them, which no graph can hold.
WARM_UP = 2


class Distiller:
    """Distills an outer problem into a synthetic set, or into several at once.

    An outer step draws θ_0 and a batch of states, unrolls T steps of behavior cloning on the synthetic set, takes the
    weighted matching loss at θ_T, and follows its hypergradient (design of Lei et al.; see `sdw_fast.ops.unrolled_bc`).
    The synthetic states and actions are optimized in normalized units; the probabilities of discrete actions as the
    softmax of free numbers, since the unrolled loss is linear in its targets and would push them without end.

    The hypergradient is the mean over `initializations` θ_0, each with a batch of its own. Under a process group of
    `torch.distributed` its ranks share them out, with one all-reduce a step; every rank holds the same set, and the
    draws do not depend on the number of ranks.

    On a GPU everything that a step needs lies there, and a step is one CUDA graph, so that the host does not launch
    its kernels one by one. A problem beyond 8 GiB stays in host memory, where each batch is gathered and sent ahead;
    its steps, those of several initializations and those of ranks are launched kernel by kernel, to the same bits.

    Args:
        problem: What to match.
        start: The set to start from (see `real_pairs`), or R sets of one size: then R are distilled side by side. Run r
            takes the draws of a single run with seed + r.
        config: The settings; those of the inner and outer loop and the seed are read.
        device: Where the problem, the sets and the kernels live.

    Attributes:
        observations, actions: What is optimized, (R, N, D) and (R, N, A): the sets in normalized units, and of discrete
            actions the logits.
        inner_loop: What an outer step unrolls.
        batches: What an outer step draws from.
        held_out: (H,) int64, the rows of the problem that no step draws.
        iteration: Outer steps taken.
        ranks: Those of the process group, or None.
        rounding: Where a run went on with other rounding, e.g. {"from_step": 100, "threads": [1, 2]}.
        seeds: Of each run.

    Raises:
        ValueError: a set does not fit the problem or the others, or the device is a GPU and there is none, or is
            neither that nor the CPU; or behavior cloning on a set is unstable whatever the step size.

    Warns:
        UserWarning: inner_lr was lowered (see `sdw_fast.stability`), now or in a later step; or CUDA or PyTorch did not
            capture a step as a graph, so that steps are slower.
    """

    def __init__(
        self,
        problem: OuterProblem,
        start: SyntheticDataset | Sequence[SyntheticDataset],
        config: DistillConfig | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self.problem = problem
        self._fingerprint = functools.cache(problem.fingerprint)
        self.ranks = Ranks() if ranked() else None
        self.config = config = _shared_out(config or DistillConfig(), self.ranks)
        self.device = _device(device)
        self.batched = not isinstance(start, SyntheticDataset)
        self._start = [start] if isinstance(start, SyntheticDataset) else list(start)
        _check_start(self._start, problem)
        self.n_runs = len(self._start)
        self.seeds = [config.seed + run for run in range(self.n_runs)]
        learned, held_out = problem.split() if config.select != "last" else (None, np.zeros(0, np.int64))
        self.held_out: np.ndarray = held_out
        self.batches = OuterBatches(problem, self.device, learned)
        states, actions = zip(*(one.normalized() for one in self._start), strict=True)
        self.inner_loop = InnerLoop(config, states[0].shape[-1], actions[0].shape[-1], problem.units.head)
        self._leaves = [
            torch.tensor(np.stack(arrays), dtype=torch.float32, device=self.device, requires_grad=True)
            for arrays in (states, [self.inner_loop.free(x) for x in actions])
        ]
        self.observations, self.actions = self._leaves
        self._averages = [x.detach().clone() for x in self._leaves] if config.average else []
        rates = usual = [config.inner_lr] * self.n_runs
        if config.adapt_inner_lr:
            rates = bearable_lr(self.inner_loop, *self.normalized, self.seeds)
            rates = self.ranks.gather(rates)[0] if self.ranks else rates
            tell_of(usual, rates, "cloning on the starting pairs is unstable with more", batched=self.batched)
        self._watch = Watch(rates, LEAST * config.inner_lr, self.device, batched=self.batched)
        self._draws = self._new_draws()
        # On a GPU what changes from step to step is read there.
        self._lr: Any = torch.tensor(config.lr, device=self.device) if self.runs_ahead else config.lr
        self._share: Any = torch.ones((), device=self.device) if self.runs_ahead else 1.0  # see _follow_schedule
        self._optimizer = outer_optimizer(config, self._leaves, self._lr, fused=self.runs_ahead)
        rank, ranks = (self.ranks.rank, self.ranks.size) if self.ranks else (0, 1)
        self._own_share = range(rank, config.initializations or 1, ranks)
        self._capturable = (
            self.device.type == self.batches.device.type == "cuda"
            and self.ranks is None
            and (config.initializations or 1) == 1
        )
        self._launched = 0  # steps kernel by kernel, since a state was loaded
        self._replay: Callable[[], Tensor] | None = None
        self._left_out = 0  # steps in a row, up to the last fetched
        self.iteration = 0
        self.rounding: list[dict[str, Any]] = []

    @property
    def runs_ahead(self) -> bool:
        """Whether steps are only enqueued, so that the host must not ask what came of them."""
        return self.device.type != "cpu"

    @property
    def normalized(self) -> tuple[Tensor, Tensor]:
        """The sets as they stand in normalized units, (R, N, D) and (R, N, A); moving averages if so configured."""
        states, actions = self._averages or [x.detach() for x in self._leaves]
        return states, self.inner_loop.targets(actions)

    @property
    def inner_lr(self) -> list[float]:
        """The step size of each set's inner loop as it stands."""
        return self._watch.rates

    def step(self) -> Metrics:
        """Takes one outer step. Beyond config.steps a cosine schedule leaves nothing to move by.

        A step whose loss or hypergradient is not finite is left out: it counts, its metrics say so, and the synthetic
        set stays as it was. Of several sets it is left out for all.

        Returns:
            "loss": H on this step's batch before the step; "gradient_norm": norm of the hypergradient before clipping;
            "adjoint_growth": ‖∂H/∂θ_start‖ / ‖∂H/∂θ_T‖, where θ_start is θ_0 (or the start of the window): the factor
            by which the unroll amplifies, large when inner training is chaotic; "inner_loss": L_BC at θ_T;
            "inner_lr": the inner step size taken. A float each; an array (R,) where the distiller was given a list of
            sets.

        Raises:
            FloatingPointError: ten or more steps in a row were left out, this one the last; or the inner loop stays
                unstable at a hundredth of inner_lr.
        """
        return self.fetch([self.advance()])[0]

    @one_thread()
    def advance(self) -> Tensor:
        """Takes one outer step and hardly waits; returns its figures (5, R), to be given to `fetch`."""
        self._follow_schedule()
        if self._replay is None and self._capturable and self._launched >= WARM_UP:
            self._capture()
        if self._replay is not None:
            figures = self._replay().clone()
        else:
            figures = self._take(*self._draws.draw(self._own_share, self.iteration))
            self._launched += 1
            if self.runs_ahead:
                self._draws.draw_ahead(self._own_share, self.iteration + 1)
        self.iteration += 1
        if self.config.adapt_inner_lr:
            self._watch.see(figures[-1] != 0, self.iteration)
        return figures[:-1]

    def _follow_schedule(self) -> None:
        """The outer learning rate of the step to come, and its iterate's share of the moving average."""
        step = self.iteration + 1
        lr = outer_lr(self.config, step)
        # A plain mean of the iterates at first, so that the average forgets where it started.
        share = max(1 - self.config.average, 1 / step)
        if self.runs_ahead:
            self._lr.fill_(lr)
            self._share.fill_(share)
            return
        self._share = share
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def _capture(self) -> None:
        """Makes one CUDA graph of all kernels of a step, its draws included; no more than a warning if that fails."""
        state = self._draws.state()
        for group in self._optimizer.param_groups:
            group["capturable"] = True  # PyTorch asks for it; the fused kernels are the same
        try:
            self._replay = self._draws.capture(self._take)
        except (RuntimeError, MemoryError) as error:
            self._capturable = False
            self._draws = self._new_draws()  # those that a failed capture has used are of no more use
            self._draws.load(state)
            warnings.warn(
                f"an outer step was not captured as a CUDA graph ({error}): its kernels are launched one by one, which "
                "is slower",
                stacklevel=4,
            )
        finally:
            for group in self._optimizer.param_groups:
                group["capturable"] = False

    def _new_draws(self) -> Draws:
        return Draws(self.inner_loop, self.batches, self.device, self.seeds, self.config.batch_size)

    def _take(self, initial: Sequence[Tensor], batch: Sequence[Tensor]) -> Tensor:
        """The step from these θ_0 (J·R, …) and batches; its figures and whether it was rough, (6, R).

        On a GPU it asks nothing back, and reads nothing of the host that changes from step to step.
        """
        count = len(batch[0]) // self.n_runs
        initial = [parameter.detach().requires_grad_() for parameter in initial]
        rates = self._watch.tensor.repeat(count)
        states, actions = (x.repeat(count, 1, 1) for x in (self.observations, self.inner_loop.targets(self.actions)))
        final = self.inner_loop.unroll(states, actions, initial, rates)
        for parameter in final:
            parameter.retain_grad()
        losses = self.inner_loop.match(final, *batch)
        self._optimizer.zero_grad()
        losses.sum().backward()
        before, after = (self.inner_loop.loss(params, states, actions) for params in (initial, final))
        own = torch.stack([losses.detach(), norms_of(initial) / norms_of(final), before, after])
        losses, growths, before, after = self._averaged(own)
        norms = clip(self._leaves, self.config.clip_norm)
        was_rough = rough(losses, norms, growths, (before, after))
        figures = torch.stack([losses, norms, growths, after, self._watch.tensor, was_rough.to(losses)])
        finite = figures[:2].isfinite().all()
        if self.runs_ahead:
            self._optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
        elif not finite:
            return figures
        self._optimizer.step()
        for average, leaf in zip(self._averages, self._leaves, strict=False):
            average.lerp_(leaf.detach(), self._share * finite)
        return figures

    def _averaged(self, figures: Tensor) -> Tensor:
        """Figures (F, J·R) as means over all initializations, (F, R); the hypergradients likewise, in place."""
        own = figures.unflatten(1, (-1, self.n_runs)).sum(1)
        gradients = [leaf.grad for leaf in self._leaves if leaf.grad is not None]
        if self.ranks:
            self.ranks.add([own, *gradients])
        for part in (own, *gradients):
            part /= self.config.initializations or 1
        return own

    def fetch(self, steps: Sequence[Tensor]) -> list[Metrics]:
        """Waits for the last steps taken by `advance`, and returns the metrics of each. Raises as `step`."""
        figures = torch.stack(list(steps)).cpu().numpy()  # (steps, 5, R)
        for number, (loss, norm, *_) in enumerate(figures, start=self.iteration - len(steps) + 1):
            self._left_out = 0 if np.isfinite([loss, norm]).all() else self._left_out + 1
            if self._left_out >= MAX_LEFT_OUT:
                raise FloatingPointError(
                    f"{self._left_out} outer steps in a row are not finite, up to step {number}: loss "
                    f"{self.of_runs(loss)}, hypergradient norm {self.of_runs(norm)}; lower inner_lr or gain (see docs: "
                    "conditioning)"
                )
        names = ("loss", "gradient_norm", "adjoint_growth", "inner_loss", "inner_lr")
        return [{name: self.of_runs(x) for name, x in zip(names, step, strict=True)} for step in figures]

    def of_runs(self, values: np.ndarray) -> Any:
        """A figure of every run, (R,), as metrics have it: a float where the distiller was given one set."""
        return values if self.batched else float(values[0])

    @property
    def sets(self) -> list[SyntheticDataset]:
        """The synthetic sets as they stand, one a run, in environment units; moving averages if so configured."""
        states, actions = (x.cpu().numpy() for x in self.normalized)
        units, config = self.problem.units, {**self.config.to_dict(), "size": states.shape[1]}
        return [
            dataclasses.replace(
                start,
                observations=units.states.denormalize(states[run]),
                actions=units.require_actions().denormalize(actions[run]),
                units=units,
                config={**config, "inner_lr": self.inner_lr[run], "seed": seed, "iteration": self.iteration},
                version=__version__,
            )
            for run, (start, seed) in enumerate(zip(self._start, self.seeds, strict=True))
        ]

    @property
    def synthetic(self) -> SyntheticDataset:
        """The synthetic set as it stands, in environment units; of several see `sets`."""
        if self.batched:
            raise ValueError(f"{self.n_runs} sets are being distilled: take .sets, a list, in place of .synthetic")
        return self.sets[0]

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on to the same bits: copies of tensors, and plain values."""
        return {
            **identity(self, self._fingerprint()),
            **self._watch.state(),
            "rounding": copy.deepcopy(self.rounding),
            "iteration": self.iteration,
            "observations": self.observations.detach().clone(),
            "actions": self.actions.detach().clone(),
            "averages": [average.clone() for average in self._averages],
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "generators": self._draws.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Another number of threads, instruction set or PyTorch changes the rounding: it is said in a warning, kept in
        `rounding`, and the run goes on to another result in its last bits.

        Raises:
            ValueError: the state is of another version, another problem (its observations, targets, weights or units
                differ), another configuration (the number of evaluations and of checkpoints may differ, and with
                schedule="constant" that of the steps), another kind of device (whose random numbers are others) or
                another number of runs; or it is damaged.
        """
        with damage_named("the checkpoint", "state of a distillation", ValueError):
            rounding = refuse_other(state, self.state_dict())
            with torch.no_grad():
                self.observations.copy_(state["observations"])
                self.actions.copy_(state["actions"])
                for average, saved in zip(self._averages, state["averages"], strict=True):
                    average.copy_(saved)
            self._watch.load(state["inner_lr"], state["rough"])
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would keep the state's own tensors
            self._draws.load(state["generators"])
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr
        self._launched, self._replay = 0, None
        self._left_out = 0
        self.iteration = state["iteration"]
        self.rounding = copy.deepcopy(state["rounding"])
        if rounding:
            self.rounding.append({"from_step": self.iteration, **rounding})
            tell_of_rounding(self.iteration, rounding)


def _shared_out(config: DistillConfig, ranks: Ranks | None) -> DistillConfig:
    """The settings, under ranks with a number of initializations, of which every rank has at least one."""
    if ranks is None:
        return config
    if config.initializations is None:
        return dataclasses.replace(config, initializations=ranks.size)
    if config.initializations < ranks.size:
        raise ValueError(f"initializations={config.initializations} cannot be shared out among {ranks.size} processes")
    return config


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r} needs a GPU and a CUDA build of torch, and torch finds none here")
    return found


def _check_start(start: Sequence[SyntheticDataset], problem: OuterProblem) -> None:
    if not start:
        raise ValueError("a distillation starts from at least one synthetic set, got none")
    expected = (len(start[0]), problem.observations.shape[1], problem.targets.shape[1])
    for one in start:
        got = (len(one), one.observations.shape[1], one.actions.shape[1])
        if got != expected:
            raise ValueError(f"the starting sets must all have (pairs, states, actions) {expected}, got {got}")
        if (one.units.states, one.units.actions) != (problem.units.states, problem.units.actions):
            raise ValueError("the starting set is in other units than the problem: choose it from the same dataset")
