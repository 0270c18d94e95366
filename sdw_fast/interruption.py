"""Ctrl-C, put off until the step under way is finished and what it reached is saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag, so that a step is never cut in two; the second acts at once.

    Python delivers signals to the main thread only; elsewhere nothing changes. Nor does it where the handler is not
    Python's, which could not be put back.
    """
    flag = False

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal flag
        flag = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.getsignal(signal.SIGINT)
    if previous is None or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: flag
    finally:
        signal.signal(signal.SIGINT, previous)
