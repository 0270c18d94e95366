"""Batches of an outer problem, gathered and normalized where they are drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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
