"""Cards: what an object is, in a few facts: as a line (`repr`), as a table (notebooks), in Markdown (dataset cards)."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_DIGITS = 8  # of a hash that people compare by eye


@dataclass(frozen=True)
class Card:
    """The facts about an object, in the order in which they are shown; what is None is left out.

    Attributes:
        title: The object's kind.
        facts: Name → value, plain values.
    """

    title: str
    facts: Mapping[str, Any]

    def known(self) -> dict[str, str]:
        """The facts that are known, as text."""
        return {name: _text(value) for name, value in self.facts.items() if value is not None}

    def __str__(self) -> str:
        return f"{self.title}({', '.join(f'{name}={value}' for name, value in self.known().items())})"

    def html(self) -> str:
        """A table for notebooks."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:left'>"
            f"{html.escape(value)}</td></tr>"
            for name, value in self.known().items()
        )
        return f"<table><caption>{html.escape(self.title)}</caption>{rows}</table>"

    def markdown(self) -> str:
        """A table for pages in Markdown."""
        rows = "".join(f"| {name} | {value.replace('|', '&#124;')} |\n" for name, value in self.known().items())
        return f"| {self.title} | |\n| --- | --- |\n{rows}"


class Shown:
    """An object that shows itself by its card."""

    def card(self) -> Card:
        """What the object is, for people."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self.card())

    def _repr_html_(self) -> str:
        return self.card().html()


def short_hash(*arrays: np.ndarray) -> str:
    """The first digits of a BLAKE2b hash of arrays, shapes included."""
    digest = hashlib.blake2b()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.hexdigest()[:_DIGITS]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
