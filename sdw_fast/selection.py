"""Which of a run's sets is returned: by the loss on states held out, by returns in the environment, or the last."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sdw_fast.distiller import Distiller, Metrics
from sdw_fast.evaluation import SELECTION_SEED, Evaluation, evaluate_synthetic
from sdw_fast.folder import RunFolder
from sdw_fast.synthetic import SyntheticDataset

if TYPE_CHECKING:
    from sdw_fast.environments import Environment

HELD_OUT_EVERY = 50  # outer steps between two looks at the held-out loss; with those below, 3 % of the time
POLICIES = 4  # θ_0 it is the mean over, the same at every look
ROWS = 2_560  # held-out states looked at, at most


class HeldOut:
    """The outer loss on states that no step draws, of policies cloned as a distillation's own.

    Args:
        distiller: Whose sets are measured. Nothing of it is changed, its generators included.
    """

    def __init__(self, distiller: Distiller) -> None:
        rows = torch.from_numpy(distiller.held_out)
        self._distiller = distiller
        self._batch: list[Tensor] | None = None  # states, targets and weights, the same for each set
        if len(rows):
            chosen = torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)), dtype=torch.float64).long()
            batch = distiller.batches.take(rows[chosen].to(distiller.batches.device))
            self._batch = [x.expand(distiller.n_runs, *x.shape).contiguous() for x in batch]
        generators = [torch.Generator(distiller.device).manual_seed(SELECTION_SEED + s) for s in distiller.seeds]
        self._initials = distiller.inner_loop.initials(generators, POLICIES)

    def losses(self) -> np.ndarray:
        """H of each set on the held-out states, mean over the policies, (R,); NaN where there are none."""
        distiller, loop = self._distiller, self._distiller.inner_loop
        if self._batch is None:
            return np.full(distiller.n_runs, np.nan)
        rates = torch.tensor(distiller.inner_lr, device=distiller.device)
        with torch.no_grad():
            finals = (loop.unroll(*distiller.normalized, initial, rates) for initial in self._initials)
            losses = [loop.match(final, *self._batch) for final in finals]
        return torch.stack(losses).mean(0).cpu().numpy()


def evaluate_sets(distiller: Distiller, env: Environment | None) -> list[Evaluation]:
    """Returns of policies cloned on every run's set as it stands; the ranks, if any, share them out."""
    options: dict[str, Any] = {"clones": distiller.config.eval_clones, "episodes": distiller.config.eval_episodes}
    return [
        evaluate_synthetic(one, env, **options, seed=seed, ranks=distiller.ranks)
        for one, seed in zip(distiller.sets, _seeds(distiller), strict=True)
    ]


def _seeds(distiller: Distiller) -> list[int]:
    """Of the policies and episodes by which the set of each run is chosen."""
    return [SELECTION_SEED + 1_000 * (seed % 1_000_000) for seed in distiller.seeds]


class Best:
    """The best set so far of every run, and its score, higher is better.

    Attributes:
        by: What sets are chosen by, see `DistillConfig.selected_by`.
        scores: The best so far of each run, −inf before the first.
    """

    def __init__(self, distiller: Distiller, folder: RunFolder | None) -> None:
        self.by = distiller.config.selected_by
        self.scores = [-math.inf] * distiller.n_runs
        self._distiller, self._folder = distiller, folder
        self._held_out = HeldOut(distiller) if distiller.config.select != "last" else None
        self._sets: dict[int, SyntheticDataset] = {}
        if folder and folder.best_by == self.by:
            self.scores, self._sets = list(folder.best_scores), dict(folder.best_sets)

    def look(self) -> Metrics:
        """Measures the held-out loss, if any states are held out, and keeps the sets that beat all before."""
        if self._held_out is None:
            return {}
        losses = self._held_out.losses()
        if self.by == "held-out":
            self._compare(-losses, [{"loss": float(loss)} for loss in losses])
        return {"held_out_loss": self._distiller.of_runs(losses)}

    def evaluate(self, env: Environment | None = None) -> Metrics:
        """Clones policies on every run's set and runs them in the environment; keeps the sets that beat all before."""
        distiller, config = self._distiller, self._distiller.config
        results = evaluate_sets(distiller, env)
        scores = [result.mean if result.normalized_mean is None else result.normalized_mean for result in results]
        spread = [result.std if result.normalized_std is None else result.normalized_std for result in results]
        if self.by == "return":
            by = {"clones": config.eval_clones, "episodes": config.eval_episodes}
            shown = [
                {"score": score, **by, "seed": seed} for score, seed in zip(scores, _seeds(distiller), strict=True)
            ]
            self._compare(np.array(scores), shown)
        return {
            "return": distiller.of_runs(np.array([result.mean for result in results])),
            "score": distiller.of_runs(np.array(scores)),
            "score_std": distiller.of_runs(np.array(spread)),
        }

    def final(self) -> list[SyntheticDataset]:
        """The best sets; of a run where none was measured, or the last is wanted, the last."""
        for number in range(self._distiller.n_runs):
            if number not in self._sets:
                self._keep(number, {})
        return [self._sets[number] for number in range(self._distiller.n_runs)]

    def _compare(self, scores: np.ndarray, figures: list[dict[str, Any]]) -> None:
        for number, (score, shown) in enumerate(zip(scores.tolist(), figures, strict=True)):
            if score > self.scores[number]:
                self.scores[number] = score
                self._keep(number, shown)

    def _keep(self, number: int, figures: dict[str, Any]) -> None:
        """Keeps a set as it stands, with a word in its configuration on what it was chosen by."""
        one = self._distiller.sets[number]
        by = {"held-out": "held-out loss", "return": "selected by these episodes"}[self.by] if figures else "last"
        one = dataclasses.replace(one, config={**one.config, "selected": {"by": by, **figures}})
        self._sets[number] = one
        if self._folder:
            self._folder.save_best(number, one)
