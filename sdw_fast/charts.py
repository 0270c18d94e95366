"""Charts as inline SVG, for pages that work without a network: lines, histogram, scatter. Marks carry `data-tip`."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

COLORS = ("#0b6fc2", "#d9480f", "#2b8a3e", "#7b2cbf", "#c2255c", "#0c8599", "#a07000", "#495057")
_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 30, 40  # margins
_POINTS = 200  # of a curve: more cannot be told apart


@dataclass(frozen=True)
class Curve:
    """A curve: x ascending (n,), y (n,), and where known the half-width of its spread (n,). `fine`: mark each point."""

    x: NDArray[np.floating]
    y: NDArray[np.floating]
    spread: NDArray[np.floating] | None = None
    color: str = COLORS[0]


@dataclass
class _Axes:
    """The frame of a chart: maps numbers to positions, and gathers the marks."""

    title: str
    labels: tuple[str, str]
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    marks: list[str] = field(default_factory=list)

    def across(self, x: float) -> str:
        low, high = self.x
        return f"{_LEFT + (x - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT):.1f}"

    def up(self, y: float) -> str:
        low, high, value = (math.log10(v) if self.log else v for v in (*self.y, y))
        return f"{_HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    def dot(self, x: float, y: float, *, radius: float, tip: str, kind: str = "", fill: str = "") -> None:
        style = f' fill="{fill}"' if fill else ""
        self.marks.append(
            f'<circle class="{kind}" cx="{self.across(x)}" cy="{self.up(y)}" r="{radius}"{style} '
            f'data-tip="{html.escape(tip)}"/>'
        )

    def svg(self) -> str:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        frame = [f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>']
        for value in _ticks(*self.x):
            at = self.across(value)
            frame.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{_short(value)}</text>')
        for value in _powers(*self.y) if self.log else _ticks(*self.y):
            at = self.up(value)
            frame.append(f'<path class="grid" d="M{_LEFT} {at}H{right}"/>')
            frame.append(f'<text x="{_LEFT - 6}" y="{at}" dy="4" text-anchor="end">{_short(value)}</text>')
        middle = (_LEFT + right) / 2
        return (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(self.title)}">'
            f'<text class="title" x="{middle}" y="18" text-anchor="middle">{html.escape(self.title)}</text>'
            f"{''.join(frame)}"
            f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(self.labels[0])}</text>'
            f'<text transform="translate(13 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
            f"{html.escape(self.labels[1])}</text>{''.join(self.marks)}</svg>"
        )


def lines(title: str, curves: Mapping[str, Curve], labels: tuple[str, str], *, log: bool = False) -> str:
    """Curves over one axis, with bars where a curve has a spread; on a logarithmic axis what is not positive is left
    out, as is what is not finite."""
    kept = {name: _drawable(curve, log) for name, curve in curves.items()}
    kept = {name: curve for name, curve in kept.items() if len(curve.x)}
    if not kept:
        return ""
    spreads = [0 * curve.y if curve.spread is None else curve.spread for curve in kept.values()]
    tops, bottoms = ([c.y + s * sign for c, s in zip(kept.values(), spreads, strict=True)] for sign in (1, -1))
    y = _range(np.concatenate([*tops, *([c.y for c in kept.values()] if log else bottoms)]), log)
    axes = _Axes(title, labels, _range(np.concatenate([c.x for c in kept.values()])), y, log)
    for (name, curve), spread in zip(kept.items(), spreads, strict=True):
        points = [f"{axes.across(a)},{axes.up(b)}" for a, b in zip(curve.x.tolist(), curve.y.tolist(), strict=True)]
        axes.marks.append(f'<polyline class="line" stroke="{curve.color}" points="{" ".join(points)}"/>')
        measured = curve.spread is not None
        for a, b, s in zip(curve.x.tolist(), curve.y.tolist(), spread.tolist(), strict=True):
            text = f"{name}: {_short(b)}{f' ± {_short(s)}' if measured else ''} at {_short(a)}"
            if measured:
                bar = f"M{axes.across(a)} {axes.up(b - s)}V{axes.up(b + s)}"
                axes.marks.append(f'<path class="bar" stroke="{curve.color}" d="{bar}"/>')
            axes.dot(a, b, radius=4, tip=text, kind="" if measured else "hidden", fill=curve.color)
    return axes.svg()


def histogram(title: str, values: np.ndarray, labels: tuple[str, str], *, color: str = COLORS[0]) -> str:
    """A histogram of finite values in 30 bars."""
    low, high = _range(values)
    counts, edges = np.histogram(values, bins=30, range=(low, high))
    axes = _Axes(title, labels, (low, high), (0.0, max(float(counts.max()) * 1.05, 1.0)))
    base = float(axes.up(0))
    for count, left, right in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        start, top = axes.across(left), axes.up(count)
        width = max(float(axes.across(right)) - float(start) - 1, 0.5)
        axes.marks.append(
            f'<rect x="{start}" y="{top}" width="{width:.1f}" height="{max(base - float(top), 0):.1f}" fill="{color}" '
            f'data-tip="{count} from {_short(left)} to {_short(right)}"/>'
        )
    return axes.svg()


def scatter(
    title: str,
    layers: Sequence[tuple[np.ndarray, Sequence[str], str, float]],
    labels: tuple[str, str],
) -> str:
    """Points over points: each layer is its positions (n, 2), what hovering shows (n), a color and a radius."""
    everything = np.concatenate([positions for positions, *_ in layers])
    axes = _Axes(title, labels, _range(everything[:, 0]), _range(everything[:, 1]))
    for positions, tips, color, radius in layers:
        for (x, y), tip in zip(positions.tolist(), tips, strict=True):
            axes.dot(x, y, radius=radius, tip=tip, kind="point", fill=color)
    return axes.svg()


def _drawable(curve: Curve, log: bool) -> Curve:
    """A curve's finite points (on a logarithmic axis, the positive ones), at most so many, evenly spread."""
    rows = np.flatnonzero(np.isfinite(curve.y) & ((curve.y > 0) | (not log)))
    rows = rows[np.unique(np.linspace(0, max(len(rows) - 1, 0), _POINTS).astype(int))] if len(rows) else rows
    spread = None if curve.spread is None else np.nan_to_num(curve.spread[rows])
    return Curve(curve.x[rows], curve.y[rows], spread, curve.color)


def _range(values: np.ndarray, log: bool = False) -> tuple[float, float]:
    """The range of finite values, a little wider."""
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.2, high * 1.2
    room = 0.04 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers in a range."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - raw))
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten in a range, and where there are fewer than two, twos and fives too."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    whole = [10.0**e for e in exponents if low <= 10.0**e <= high]
    step = len(whole) // 6 + 1
    if len(whole) > 2:
        return whole[::step]
    return [f * 10.0**e for e in exponents for f in (1, 2, 5) if low <= f * 10.0**e <= high]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and abs(value) < 1e6 else f"{value:.3g}"
