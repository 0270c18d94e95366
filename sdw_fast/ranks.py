"""The processes of a `torch.distributed` group, and what they say to each other. `torchrun` starts them."""

from __future__ import annotations

import contextlib
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

MEETING_SECONDS = 300  # within which all processes of a start must have begun; importing PyTorch takes a few of them


def ranked() -> bool:
    """Whether a process group is initialized, in this process and others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def process_group() -> Iterator[bool]:
    """The process group that `torchrun` asks for, if it started this process; gives whether this is the first rank.

    Unlike one of PyTorch's own `init_process_group`, it also meets after `torchrun --max-restarts` has started the
    processes again. Where there is a group, or none is asked for, nothing is opened and nothing closed.

    Raises:
        TimeoutError, torch.distributed.DistError: not all processes have started within MEETING_SECONDS.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not dist.is_available() or dist.is_initialized():
        yield not ranked() or dist.get_rank() == 0
        return
    dist.init_process_group(**_meeting())
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _meeting() -> dict[str, Any]:
    """What `init_process_group` takes: a store under a name that the processes of this start have agreed on.

    The store is `torchrun`'s, and after a restart it still holds the addresses of the processes that are gone: gloo
    would take them for those of now, and wait for ever. So every process asks the first under a name that nobody used
    before, and the first answers until all have confirmed. The number of restarts in the environment would not do: the
    hosts of one run may count differently.
    """
    store, rank, size = next(dist.rendezvous("env://"))
    if rank == 0:
        start, deadline = uuid.uuid4().hex, time.monotonic() + MEETING_SECONDS
        while store.add(f"{start}/confirmed", 0) < size - 1:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all of the {size} processes have started within {MEETING_SECONDS} s")
            for other in range(1, size):
                if store.check([f"asks/{other}"]):
                    store.set(f"answer/{store.get(f'asks/{other}').decode()}", start)
            time.sleep(0.02)
    else:
        own = uuid.uuid4().hex
        store.set(f"asks/{rank}", own)
        store.wait([f"answer/{own}"], timedelta(seconds=MEETING_SECONDS))
        start = store.get(f"answer/{own}").decode()
        store.add(f"{start}/confirmed", 1)
    return {"store": dist.PrefixStore(start, store), "rank": rank, "world_size": size}


class Ranks:
    """The ranks of a process group, and what they say to each other. Every method is called on all of them."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "no process group: start the script with torchrun and call torch.distributed.init_process_group() first"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0  # bytes that went to other ranks

    def together(self, work: Callable[[], T]) -> T:
        """Does `work`, which talks to nobody, and raises on all ranks what it raised on one."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        said = self.gather(None if failure is None else (type(failure).__name__, str(failure)))
        if failure is not None:
            raise failure
        for rank, words in enumerate(said):
            if words is not None:
                kind = {"TypeError": TypeError, "ValueError": ValueError}.get(words[0], RuntimeError)
                raise kind(f"rank {rank}: {words[1]}")
        return result  # type: ignore[return-value]

    def any_of(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """A function that says whether `flag` holds on any rank, to be called on all of them."""
        return lambda: bool(self.reduce(torch.tensor(float(flag())), "max"))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small value, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def reduce(self, values: Tensor, operation: str) -> Tensor:
        """The "sum", "min" or "max" of every rank's tensor, on all ranks."""
        values = values.clone()
        dist.all_reduce(values, getattr(dist.ReduceOp, operation.upper()), group=self.group)
        return values

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors of one dtype by their sums over all ranks, in one message."""
        total = self.reduce(torch.cat([tensor.flatten() for tensor in tensors]), "sum")
        for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def exchange(self, tensors: list[Tensor], counts: list[int]) -> tuple[list[Tensor], list[int]]:
        """Sends the first counts[0] rows of each tensor to rank 0, the next counts[1] to rank 1, …

        Returns:
            the rows received, by the rank they came from, and how many came from each.
        """
        received = self.gather(counts)
        incoming = [row[self.rank] for row in received]
        results = []
        for tensor in tensors:
            result = tensor.new_empty((sum(incoming), *tensor.shape[1:]))
            dist.all_to_all_single(result, tensor.contiguous(), incoming, counts, group=self.group)
            row_bytes = tensor.element_size() * math.prod(tensor.shape[1:])
            self.sent += row_bytes * (sum(counts) - counts[self.rank])
            results.append(result)
        return results, incoming
