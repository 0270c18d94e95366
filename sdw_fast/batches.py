"""What an outer step draws: θ_0, and batches of the outer problem, gathered and normalized where they are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdw_fast.inner import InnerLoop
from sdw_fast.objectives import OuterProblem

# Outer states, targets and weights up to this size lie on the device; a larger problem stays in host memory.
RESIDENT_BYTES = 8 << 30


class OuterBatches:
    """Draws batches of an outer problem for a device: from there, or from host memory above RESIDENT_BYTES.

    Args:
        problem: Whose rows are drawn.
        device: Where the batches go.
        rows: Those that are drawn from, int64; None: all.

    Attributes:
        device: Where the rows lie and where the generators that draw them must live.
    """

    def __init__(self, problem: OuterProblem, device: torch.device, rows: np.ndarray | None = None) -> None:
        arrays = (problem.observations, problem.targets, problem.weights)
        resident = sum(array.nbytes for array in arrays) <= RESIDENT_BYTES
        self.device = device if resident else torch.device("cpu")
        self._target = device
        self._rows = None if rows is None else torch.from_numpy(rows).to(self.device)
        writable = (np.require(array, requirements=["C", "W"]) for array in arrays)  # PyTorch wants no others
        self._tensors = [torch.as_tensor(array, device=self.device) for array in writable]
        units = problem.units.states  # on the device once: to send them with every batch would be to wait for it
        self._offset, self._scale = (torch.from_numpy(x).to(device, torch.float32) for x in (units.offset, units.scale))

    def draw(self, size: int, generator: torch.Generator) -> list[Tensor]:
        """Returns the normalized states (B, D), targets (B, A) and weights (B,) of rows drawn with replacement."""
        count = len(self._tensors[0] if self._rows is None else self._rows)
        rows = torch.randint(count, (size,), generator=generator, device=self.device)
        return self.take(rows if self._rows is None else self._rows[rows])

    def take(self, rows: Tensor) -> list[Tensor]:
        """Returns the normalized states (B, D), targets (B, A) and weights (B,) of some rows of the problem."""
        batch = [tensor[rows] for tensor in self._tensors]
        if self.device != self._target:
            batch = [part.pin_memory().to(self._target, non_blocking=True) for part in batch]
        return [(batch[0] - self._offset) / self._scale, *batch[1:]]


class Draws:
    """The random numbers of R runs, each from its own seed.

    Args:
        loop: Whose θ_0 are drawn.
        batches: What the batches are drawn from.
        device: Of θ_0.
        seeds: Of the runs.
        batch_size: B, states of a batch.
    """

    def __init__(
        self, loop: InnerLoop, batches: OuterBatches, device: torch.device, seeds: Sequence[int], batch_size: int
    ) -> None:
        self._loop, self._batches, self._device, self._size = loop, batches, device, batch_size
        self._seeds = list(seeds)
        self._generators = self._seeded(self._seeds)

    def draw(self, initializations: Iterable[int], step: int) -> tuple[list[Tensor], list[Tensor]]:
        """θ_0, and states (J·R, B, D), targets (J·R, B, A) and weights (J·R, B): of R runs for J initializations.

        Number 0 is drawn by generators that go on from step to step. Others have new ones in every step, so that
        nothing of them needs to be kept, and any process can draw them.
        """
        initials, batches = [], []
        for number in initializations:
            streams = [_stream(seed, number, step) for seed in self._seeds]
            of_policies, of_rows = self._seeded(streams) if number else self._generators
            initials.append(self._loop.initial(of_policies))
            batches += [self._batches.draw(self._size, generator) for generator in of_rows]
        initial = [torch.cat(parts) for parts in zip(*initials, strict=True)]
        return initial, [torch.stack(parts) for parts in zip(*batches, strict=True)]

    def _seeded(self, seeds: Sequence[int]) -> tuple[list[torch.Generator], list[torch.Generator]]:
        """Generators of the policies, and of the rows where those lie: the same ones on one device."""
        policies = [torch.Generator(self._device).manual_seed(seed) for seed in seeds]
        if self._batches.device == self._device:
            return policies, policies
        return policies, [torch.Generator(self._batches.device).manual_seed(seed) for seed in seeds]

    def _kept(self) -> list[list[torch.Generator]]:
        policies, rows = self._generators
        return [policies] if rows is policies else [policies, rows]

    def state(self) -> list[Tensor]:
        """What `load` takes: copies of the generators' states, (R, bytes) for each device."""
        return [torch.stack([generator.get_state() for generator in group]) for group in self._kept()]

    def load(self, states: Sequence[Tensor]) -> None:
        """Puts the generators where those of `state` were."""
        for group, kept in zip(self._kept(), states, strict=True):
            for generator, state in zip(group, kept.cpu(), strict=True):
                generator.set_state(state.clone())  # a view into other states is misaligned


def _stream(seed: int, number: int, step: int) -> int:
    """The seed of an initialization's draws in a step, of the run's seed."""
    return int(np.random.SeedSequence([seed, number, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
