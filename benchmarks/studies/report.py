"""How studies show their results: tables in Markdown, on the page for people, and pictures of few colors."""

from __future__ import annotations

import io
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.table import ROOT

DOCS = ROOT / "docs"
PAGE = DOCS / "results.md"
README = ROOT / "README.md"

Pair = tuple[Sequence[float], Sequence[float]]  # returns of a method's seeds, and of its rival's


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def fill(name: str, text: str, page: Path | None = None) -> None:
    """Puts a table onto a page, between the lines <!-- name --> and <!-- /name -->.

    Raises:
        ValueError: the page has no such lines.
    """
    page = page or PAGE
    pattern = re.compile(f"(<!-- {name} -->\n\n).*?(\n\n<!-- /{name} -->)", re.DOTALL)
    content, found = pattern.subn(lambda lines: lines[1] + text + lines[2], page.read_text())
    if found != 1:
        raise ValueError(f"{page} has no lines <!-- {name} --> and <!-- /{name} --> to put the table between")
    write(page, content)


def write(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def stages_table(columns: Mapping[str, Sequence[float]], stages: Sequence[int]) -> str:
    """Numbers along an episode: a line a stage, which is from each of `stages` to the next."""
    lines = [
        [f"{first} to {last - 1}", *(f"{values[number]:.3f}" for values in columns.values())]
        for number, (first, last) in enumerate(itertools.pairwise(stages))
    ]
    return markdown(["steps into the episode", *columns], lines)


def save_picture(figure: Figure, path: Path, dpi: int = 120, colors: int = 128) -> None:
    """Draws a figure as a PNG with a palette, which is a fifth of its size in full color."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    palette = Image.open(drawn).convert("RGB").quantize(colors, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Of the mean of values; NaN of one."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.nan


def deviation(values: Sequence[float] | np.ndarray) -> str:
    """Standard deviation; of fewer than two values it is missing."""
    return f"{np.std(values, ddof=1):.1f}" if len(values) > 1 else "missing"


def mean_and_error(values: Sequence[float], expected: int) -> str:
    """Mean ± standard error; in brackets the number of values where it is not the expected one."""
    if not values:
        return "missing"
    error = f" ± {standard_error(values):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{error}" + (f" ({len(values)})" if len(values) < expected else "")


# What `policy_and_ensemble` gives.
POLICY_AND_ENSEMBLE = ("one policy", "ensemble of ten")


def of_methods(names: Iterable[str]) -> list[str]:
    """The titles of the columns that `policy_and_ensemble` fills for methods of these names."""
    return [f"{name}, {what}" for name in names for what in POLICY_AND_ENSEMBLE]


def policy_and_ensemble(rows: Sequence[Mapping[str, Any]], expected: int) -> list[str]:
    """Over rows of `work.returns_of_set`, one a seed: returns of single policies, and of ensembles."""
    of_policies, of_ensembles = [float(np.mean(row["policies"])) for row in rows], [row["ensemble"] for row in rows]
    return [mean_and_error(of_policies, expected), mean_and_error(of_ensembles, expected)]


def of_each_seed(
    found: Mapping[tuple[int, str, str], Mapping[str, Any]], seeds: Iterable[int], task: str, kind: str
) -> dict[int, float]:
    """What single policies of a kind return on average, of every seed that has a row; keys are (seed, task, kind)."""
    rows = {seed: found.get((seed, task, kind)) for seed in seeds}
    return {seed: float(np.mean(row["policies"])) for seed, row in rows.items() if row}


def rows_of(
    found: Mapping[tuple[int, str, str], Mapping[str, Any]], seeds: Iterable[int], task: str, kind: str
) -> list[Mapping[str, Any]]:
    """The row of every seed that has one; keys are (seed, task, kind)."""
    return [found[seed, task, kind] for seed in seeds if (seed, task, kind) in found]


def seed_by_seed(values: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """One minus the other, of every seed that has both."""
    return [value - others[seed] for seed, value in values.items() if seed in others]


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """Difference of two means ± its standard error, where both have one."""
    return mean_difference([(values, others)])


def mean_difference(pairs: Sequence[Pair]) -> str:
    """Mean over the pairs of the difference of their two means ± its standard error, where all have one."""
    text = f"{np.mean([np.mean(values) - np.mean(others) for values, others in pairs]):+.1f}"
    error = math.hypot(*(standard_error(values) for pair in pairs for values in pair)) / len(pairs)
    return text if math.isnan(error) else f"{text} ± {error:.1f}"
