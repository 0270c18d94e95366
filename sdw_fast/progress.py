"""The progress bar of all long work: tqdm where there is a terminal, a line a minute in a log, nothing if unwanted."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

_LOG_EVERY = 60.0  # seconds between two lines where standard error is a file or a pipe


def progress_bar(iterable: Iterable[Any] | None = None, *, show: bool, **options: Any) -> Any:
    """A context manager with tqdm's `update`, `set_postfix` and `n`, iterable if given something to iterate over.

    Args:
        iterable: What to iterate over.
        show: Whether anything is shown; if not, tqdm is not needed.
        **options: tqdm's: total, desc, unit, …
    """
    if not show:
        return _Silent(iterable)
    from tqdm.auto import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(iterable, mininterval=0.1 if terminal else _LOG_EVERY, dynamic_ncols=terminal, **options)


class _Silent:
    """Stands for a bar that is not shown."""

    n = 0

    def __init__(self, iterable: Iterable[Any] | None) -> None:
        self._iterable = iterable

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable or ():
            yield item
            self.n += 1

    def update(self, n: int = 1) -> None:
        self.n += n

    def set_postfix(self, *_: Any, **__: Any) -> None:
        pass
