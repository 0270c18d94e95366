"""The processes of a `torch.distributed` group, and what they say to each other. `torchrun` starts them."""

from __future__ import annotations

import contextlib
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sdw_fast.heartbeat import heartbeat, say

T = TypeVar("T")

MEETING_SECONDS = 300.0  # within which all processes of a start must have come to open the group
REPORT_SECONDS = 30.0  # after which those that have not are named


def ranked() -> bool:
    """Whether a process group is initialized, in this process and others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def process_group() -> Iterator[bool]:
    """The process group that `torchrun` asks for, if it started this process; gives whether this is the first rank.

    Unlike one of PyTorch's own `init_process_group`, it also meets after `torchrun --max-restarts` has started the
    processes again, and says within a minute which rank does not come, or has frozen (see `sdw_fast.heartbeat`). Where
    there is a group, or none is asked for, nothing is opened and nothing closed.

    Raises:
        TimeoutError: not all processes have come within MEETING_SECONDS.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not dist.is_available() or dist.is_initialized():
        yield not ranked() or dist.get_rank() == 0
        return
    store, rank, size = next(dist.rendezvous("env://"))
    name = _meeting(store, rank, size)
    dist.init_process_group(store=dist.PrefixStore(name, store), rank=rank, world_size=size)
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        with heartbeat(name, rank, size, address):
            yield rank == 0
    finally:
        close_group()


def close_group() -> None:
    """Closes the process group of all ranks.

    PyTorch's own `destroy_process_group` may wait for ever before 2.8: where the group goes with its last reference, it
    waits for gloo's threads and holds Python's global lock, for which such a thread waits to free a tensor (pytorch
    #154976). The backend alone goes without the lock, so here it is the last to go.
    """
    assert dist.group.WORLD is not None
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    dist.destroy_process_group()
    del backend


def _meeting(store: dist.Store, rank: int, size: int) -> str:
    """A name that the processes of this start have agreed on, and no other start has.

    The store is `torchrun`'s, and after a restart it still holds the addresses of the processes that are gone: gloo
    would take them for those of now, and wait for ever. So every process asks the first under a name that nobody used
    before, and the first answers until all have confirmed. The number of restarts in the environment would not do: the
    hosts of one run may count differently.
    """
    began, reported = time.monotonic(), False

    def wait_for(missing: list[int]) -> None:
        nonlocal reported
        seconds = time.monotonic() - began
        words = f"rank {', '.join(map(str, missing))} of {size} has not opened the process group after {seconds:.0f} s"
        if seconds > MEETING_SECONDS:
            raise TimeoutError(words)
        if seconds > REPORT_SECONDS and not reported:
            reported = True
            say(words)
        time.sleep(0.02)

    own = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", own)
        while not store.check([f"answer/{own}"]):
            wait_for([0])
        name = store.get(f"answer/{own}").decode()
        store.set(f"{name}/here/{rank}", "")
        return name
    while missing := [other for other in range(1, size) if not store.check([f"{own}/here/{other}"])]:
        for other in missing:
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        wait_for(missing)
    return own


class Ranks:
    """The ranks of a process group, and what they say to each other. Every method is called on all of them.

    Attributes:
        group, rank, size: The process group, the number of this rank in it, and of ranks.
        sent: Bytes that went to other ranks in exchanges.
        stop: Whether this rank wishes to stop: every sum carries the wish.
        stopping: Whether any rank did at the last sum.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "no process group: start the script with torchrun and call torch.distributed.init_process_group() first"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0
        self.stop = self.stopping = False

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
        """Replaces tensors of one dtype by their sums over all ranks, in one message, and learns of wishes to stop."""
        wish = tensors[0].new_full((1,), self.stop)
        parts = [*tensors, wish]
        total = self.reduce(torch.cat([part.flatten() for part in parts]), "sum")
        for part, summed in zip(parts, total.split([part.numel() for part in parts]), strict=True):
            part.copy_(summed.view_as(part))
        self.stopping = bool(wish)

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
