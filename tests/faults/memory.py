"""Memory and threads refused at every request of every op: MemoryError or the same answer, and the same afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from campaign import Attack, NoMoreTrials, Trial
from refusals import build, refusing


def refused(op: str) -> Callable[[Path, int], Trial]:
    def prepare(folder: Path, seed: int) -> Trial:
        requests, refuse = refusing(op)

        def trial(number: int) -> None:
            if number >= requests:
                raise NoMoreTrials
            refuse(number + 1)

        return trial

    return prepare


ATTACKS = [
    Attack(
        f"refused requests of {op}", refused(op), 2000, environment=lambda folder: {"LD_PRELOAD": str(build(folder))}
    )
    for op in ("knn", "unrolled_bc", "behavior_matching", "weighted_bc_loss")
]
