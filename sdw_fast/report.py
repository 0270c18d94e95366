"""One self-contained HTML page about runs: the settings, the course, the result, and what to do about a bad one."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from sdw_fast import charts
from sdw_fast.config import DistillConfig
from sdw_fast.diagnosis import diagnose
from sdw_fast.files import check_sum, read_npz, reading, unsealed, write_text
from sdw_fast.folder import find_runs, read_metrics
from sdw_fast.plots import PANELS, principal_components, smoothed
from sdw_fast.synthetic import SyntheticDataset
from sdw_fast.version import __version__

Metrics = dict[str, float]
_NUMBERS = 24  # of a state that hovering shows


@dataclass(frozen=True)
class Run:
    """What a run's folder holds, as a report needs it.

    Attributes:
        name: What tells the run from the others.
        content: config.json.
        config: Its settings.
        metrics: One dict an outer step.
        synthetic: best.npz, else last.npz; None before the first checkpoint.
        states: A sample of the outer problem, arrays observations, targets (environment units) and weights; empty
            where the folder has none.
    """

    name: str
    content: dict[str, Any]
    config: DistillConfig
    metrics: list[Metrics]
    synthetic: SyntheticDataset | None
    states: dict[str, np.ndarray]

    @classmethod
    def read(cls, name: str, folder: Path) -> Run:
        """Reads a run. Raises ValueError or FileNotFoundError where a file is damaged or missing."""
        shared = folder if (folder / "config.json").exists() else folder.parent  # of several sets: one for all
        path = shared / "config.json"
        with reading(path, "configuration of a run"):
            content = unsealed(json.loads(path.read_text(encoding="utf-8")))
            config = DistillConfig.from_dict(content["config"])
            for part in ("dataset", "objective"):
                if not isinstance(content[part], dict):
                    raise ValueError(f"its {part} is {content[part]!r}")
        sets = [folder / file for file in ("best.npz", "last.npz") if (folder / file).exists()]
        sample = shared / "states.npz"
        states: dict[str, np.ndarray] = {}
        if sample.exists():
            with reading(sample, "sample of states"):
                check_sum(sample)
                states = read_npz(sample)
        synthetic = SyntheticDataset.load(sets[0]) if sets else None
        return cls(name, content, config, read_metrics(folder), synthetic, states)

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a figure, where it was measured and finite."""
        points = [(step["step"], step[name]) for step in self.metrics if math.isfinite(step.get(name, math.nan))]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        return steps, values


def write_report(folders: Sequence[str | Path], out: str | Path) -> None:
    """Writes one HTML page about runs, which needs no network and no other file.

    Args:
        folders: Folders of runs; of several sets, all of them are shown.
        out: The page, replaced whole.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: a file of a run is damaged.
    """
    runs = [Run.read(name, folder) for name, folder in find_runs(folders).items()]
    write_text(out, page(runs))


def page(runs: Sequence[Run]) -> str:
    """The page as text."""
    colors = {run.name: charts.COLORS[i % len(charts.COLORS)] for i, run in enumerate(runs)}
    curves = "".join(f"<figure>{_curves(runs, name, title, colors)}</figure>" for name, title in PANELS.items())
    title = "Distillation report: " + ", ".join(run.name for run in runs[:4]) + (" …" if len(runs) > 4 else "")
    style, script = (files("sdw_fast").joinpath(f"assets/report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{_legend(colors)}</p>"
        f"<section><h2>Result and diagnosis</h2><div class='cards'>{''.join(map(_summary, runs))}</div></section>"
        f"<section><h2>Curves</h2><p>Bars at the score: standard deviation over episodes of several policies.</p>"
        f"<div class='grid'>{curves.replace('<figure></figure>', '')}</div></section>"
        "<section><h2>States</h2><p>Real states (gray, a sample) and synthetic ones in the two principal components of "
        "the real ones. Hover or tap a synthetic state for its pair, in the environment's units.</p>"
        f"<div class='grid'>{''.join(_states(run, colors[run.name]) for run in runs)}</div></section>"
        "<section><h2>Weights</h2><p>w(s) of the outer loss, value and density together, mean 1 when divided by the "
        f"mean.</p><div class='grid'>{''.join(_weights(run, colors[run.name]) for run in runs)}</div></section>"
        f"<section><h2>Settings</h2>{_settings(runs)}</section>"
        f"<footer>sdw_fast {__version__}</footer><div id='tip' hidden></div><script>{script}</script></body></html>\n"
    )


def _legend(colors: dict[str, str]) -> str:
    return " ".join(f"<b class='run' style='color:{c}'>● {html.escape(name)}</b>" for name, c in colors.items())


def _summary(run: Run) -> str:
    data, steps = run.content["dataset"], len(run.metrics)
    seconds = math.fsum(step.get("seconds", 0.0) for step in run.metrics)
    facts = {
        "environment": run.synthetic.env_id if run.synthetic else None,
        "dataset": data.get("name"),
        "pairs": run.config.size,
        "outer steps": f"{steps:,} of {run.config.steps:,}",
        "seconds": round(seconds, 1),
        **{name.replace("_", " "): value for name, value in _figures(run.content["objective"]).items()},
    }
    at, score = run.column("score")
    spread = dict(zip(*run.column("score_std"), strict=True))
    if len(score):
        best = int(np.argmax(score))
        text = f"{score[best]:.1f}" + (f" ± {spread[at[best]]:.1f}" if at[best] in spread else "")
        facts["best normalized return"] = f"{text} at step {at[best]:.0f}"
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(f'{v:,}' if isinstance(v, int) else str(v))}</td></tr>"
        for name, v in facts.items()
        if v is not None
    )
    findings = "".join(
        f"<li class='{'bad' if finding.bad else 'good'}'>{html.escape(finding.text)}</li>"
        for finding in diagnose(run.config, run.content["objective"], run.metrics)
    )
    return f"<article><h3>{html.escape(run.name)}</h3><ul>{findings}</ul><table>{rows}</table></article>"


def _figures(objective: dict[str, Any]) -> dict[str, str]:
    """What is known of the weights; the density weights' figures under names of their own."""
    density = objective.get("density") or {}
    values = {**objective, **{f"density {name}": value for name, value in density.items()}}
    values.pop("objective", None)
    kinds = (int, float, str)
    return {n: f"{v:.4g}" if isinstance(v, float) else str(v) for n, v in values.items() if isinstance(v, kinds)}


def _curves(runs: Sequence[Run], name: str, title: str, colors: dict[str, str]) -> str:
    curves = {}
    for run in runs:
        x, y = run.column(name)
        spread = None
        if name == "score":
            known = dict(zip(*run.column("score_std"), strict=True))
            spread = np.array([known.get(step, 0.0) for step in x])
        elif len(x):
            x, y = smoothed(x, y)
        curves[run.name] = charts.Curve(x, y, spread, colors[run.name])
    return charts.lines(title, curves, ("outer step", ""), log=name != "score")


def _states(run: Run, color: str) -> str:
    if run.synthetic is None:
        return ""
    synthetic, actions = run.synthetic, run.synthetic.actions
    own = synthetic.units.states.normalize(synthetic.observations)
    layers = []
    real = run.states.get("observations", np.empty((0, 0), np.float32))
    basis = synthetic.units.states.normalize(real) if real.shape[1:] == own.shape[1:] and len(real) > 1 else own
    mean, axes, share = principal_components(basis)
    if basis is not own:
        weights = run.states["weights"]
        tips = [
            f"real state, weight {weight:.3g}\nstate {_numbers(s)}" for s, weight in zip(real, weights, strict=True)
        ]
        layers.append(((basis - mean) @ axes, tips, "#8a8f98", 1.6))
    pairs = zip(synthetic.observations, actions, strict=True)
    tips = [f"pair {i}\nstate {_numbers(s)}\naction {_numbers(a)}" for i, (s, a) in enumerate(pairs)]
    layers.append(((own - mean) @ axes, tips, color, 3.4))
    labels = tuple(f"component {i + 1} ({part:.0%} of the variance)" for i, part in enumerate(share))
    return f"<figure>{charts.scatter(run.name, layers, labels)}</figure>"  # type: ignore[arg-type]


def _numbers(values: np.ndarray) -> str:
    more = " …" if len(values) > _NUMBERS else ""
    return ", ".join(f"{value:.3g}" for value in values[:_NUMBERS].tolist()) + more


def _weights(run: Run, color: str) -> str:
    weights = run.states.get("weights")
    if weights is None or not weights.any():
        return "<p>This run's folder holds no sample of its states.</p>"
    chart = charts.histogram(run.name, weights / weights.mean(), ("weight / mean weight", "states"), color=color)
    return f"<figure>{chart}</figure>"


def _settings(runs: Sequence[Run]) -> str:
    """All settings, one column a run; those that differ between runs, or from the defaults, stand out."""
    default = DistillConfig().to_dict()
    columns = [run.config.to_dict() for run in runs]
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = []
    for name, usual in default.items():
        values = [column[name] for column in columns]
        kind = "differs" if any(v != values[0] for v in values) else "changed" if values[0] != usual else ""
        cells = "".join(f"<td>{html.escape(_word(value))}</td>" for value in values)
        rows.append(f"<tr class='{kind}'><th>{name}</th>{cells}<td>{html.escape(_word(usual))}</td></tr>")
    return (
        f"<div class='wide'><table><thead><tr><th>setting</th>{head}<th>default</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)
