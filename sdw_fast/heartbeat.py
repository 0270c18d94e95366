"""Who of a process group has not been heard of: PyTorch waits for a rank that froze or was cut off without a word."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

BEAT_SECONDS = 10.0  # between two signs of life
SILENT_SECONDS = 45.0  # without one, after which a rank is reported
_ENDED = 1 << 40  # added to a rank's count when it leaves


@contextlib.contextmanager
def heartbeat(name: str, rank: int, size: int, address: tuple[str, int]) -> Iterator[None]:
    """While it is open, a thread counts in the group's store, and says on standard error which other rank does not.

    The first rank watches all others, they the first, so that a beat costs a question a rank. It reports and ends
    nothing: a rank that died is noticed by its closed connection at once, and one that comes back may go on; for one
    that does not, PyTorch's own timeout of the group ends the wait.

    Args:
        name: of this start of the group, which no other has.
        rank, size: of this process in it.
        address: host and port of the store. The thread has a connection of its own, for a call that waits holds one.
    """
    ended = threading.Event()

    def beat() -> None:
        client = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        store = dist.PrefixStore(name, client)
        counts = dict.fromkeys(range(1, size) if rank == 0 else [0], 0)
        heard = dict.fromkeys(counts, time.monotonic())
        reported: set[int] = set()
        while True:
            leaving = ended.wait(BEAT_SECONDS)
            store.add(f"alive/{rank}", _ENDED if leaving else 1)
            if leaving:
                return
            for other, before in list(counts.items()):
                counts[other] = store.add(f"alive/{other}", 0)
                if counts[other] != before:
                    heard[other] = time.monotonic()
                    if other in reported:
                        reported.remove(other)
                        say(f"rank {other} is heard of again")
                silent = time.monotonic() - heard[other]
                if silent > SILENT_SECONDS and counts[other] < _ENDED and other not in reported:
                    reported.add(other)
                    say(
                        f"rank {other} of {size} has not been heard of for {silent:.0f} s: its process or host is "
                        "frozen, cut off or overloaded, and the others wait for it"
                    )

    def run() -> None:
        try:
            beat()
        except (dist.DistError, RuntimeError) as error:
            say(f"rank {rank} cannot reach the store at {':'.join(map(str, address))} any more: {error}")

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=BEAT_SECONDS)


def say(words: str) -> None:
    """Puts a line about the ranks on standard error."""
    print(f"sdw_fast: {words}", file=sys.stderr, flush=True)
