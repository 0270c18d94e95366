"""Figures say what the numbers say, and are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdw_fast import plots
from sdw_fast.density import density_weights, knn_log_density


@pytest.fixture
def states() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((500, 3)) * [3, 2, 0.1]).astype(np.float32)


def test_principal_components(states: np.ndarray) -> None:
    mean, axes, share = plots.principal_components(states)
    np.testing.assert_allclose(mean, states.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(axes, np.eye(3)[:, :2], atol=0.1)
    np.testing.assert_allclose(share, [9 / 13, 4 / 13], atol=0.05)
    _, axes, share = plots.principal_components(states[:, :1])
    np.testing.assert_array_equal(axes, [[1, 0]])
    np.testing.assert_allclose(share, [1, 0])


@pytest.mark.parametrize("columns", [1, 3])
def test_plot_density(states: np.ndarray, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "POINTS", 200)
    states = states[:, :columns]
    logd = knn_log_density(states)
    weights = density_weights(logd, ess=0.5)
    figure = plots.plot_density(states, logd, weights)
    histogram, against, scatter = figure.axes[:3]
    assert "effective sample size 50.0%" in against.get_title()
    heights = np.array([patch.get_height() for patch in histogram.patches[:79]])
    assert heights.sum() == 500
    x, y = against.lines[0].get_data()
    assert len(x) == 500
    assert (np.diff(x) >= 0).all()
    assert (np.diff(y) <= 0).all()
    points = scatter.collections[0]
    assert len(points.get_offsets()) == 200
    assert (np.diff(points.get_array()) <= 0).all()  # the rarest are drawn last
    plots.save(figure, tmp_path / "density.png")
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_plot_density_of_equal_densities(states: np.ndarray, tmp_path: Path) -> None:
    logd = np.zeros(500)
    plots.save(plots.plot_density(states, logd, density_weights(logd, tau=1)), tmp_path / "equal.pdf")


def test_plot_tau(states: np.ndarray, tmp_path: Path) -> None:
    logd = knn_log_density(states)
    chosen = density_weights(logd, ess=0.4).tau
    figure = plots.plot_tau(logd, chosen=chosen)
    taus, reached = figure.axes[0].lines[0].get_data()
    assert np.interp(chosen, taus, reached) == pytest.approx(0.4, abs=0.02)
    assert (np.diff(reached) < 0).all()
    assert taus[0] < chosen < taus[-1]
    plots.save(figure, tmp_path / "tau.svg")
    wide = plots.plot_tau(logd, chosen=100.0).axes[0].lines[0].get_xdata()
    assert wide[-1] == pytest.approx(100)
    with pytest.raises(ValueError, match="all log-densities are equal"):
        plots.plot_tau(np.zeros(9))


def test_failed_save_leaves_the_old_figure(states: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "figure.png"
    file.write_text("old")
    figure = plots.plot_tau(knn_log_density(states))
    figure.axes[0].set_title("$\\frac{$")  # not a formula: drawing fails
    with pytest.raises(ValueError, match="frac"):
        plots.save(figure, file)
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    assert file.read_text() == "old"


def test_a_step_that_was_left_out_does_not_show() -> None:
    metrics = [{"step": step, "loss": np.nan if step == 7 else float(step)} for step in range(1, 101)]
    steps, values = plots.plot_metrics({"run": metrics}).axes[0].lines[0].get_data()
    assert set(range(1, 101)) - set(steps) == {7}
    np.testing.assert_array_equal(values, steps)


def test_losses_are_smoothed_and_scores_are_not() -> None:
    """A window of a 50th of 200 steps is 4: each point is the mean of the last four; scores stay as measured."""
    metrics = [{"step": step, "loss": float(step % 4), "score": float(step % 4)} for step in range(1, 201)]
    loss, score = plots.plot_metrics({"run": metrics}).axes
    steps, values = loss.lines[0].get_data()
    np.testing.assert_array_equal(steps, range(4, 201))
    np.testing.assert_allclose(values, 1.5)
    np.testing.assert_array_equal(score.lines[0].get_data(), [range(1, 201), np.arange(1, 201) % 4])
    assert loss.get_yscale() == "log"
    assert score.get_yscale() == "linear"


def test_runs_are_told_apart_and_panels_without_figures_left_out(tmp_path: Path) -> None:
    runs = {
        "first": [{"step": 1, "loss": 1.0, "gradient_norm": 0.1}],
        "second": [{"step": 1, "loss": 2.0}],
    }
    figure = plots.plot_metrics(runs)
    assert [axes.get_title() for axes in figure.axes] == ["outer loss", "hypergradient norm"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["first", "second"]
    plots.save(plots.plot_metrics({"empty": []}), tmp_path / "folder" / "empty.png")


def test_plot_report(states: np.ndarray, tmp_path: Path) -> None:
    logd = knn_log_density(states)
    runs = {
        name: [{"step": 10 * i, "score": scale * i} for i in range(1, 6)] for name, scale in (("a", 1.0), ("b", 2.0))
    }
    synthetic = {"a": states[:5], "b": states[5:12]}
    figure = plots.plot_report(runs, {"teacher": 90.0}, states, logd, density_weights(logd, ess=0.5), synthetic)
    curves, histogram, scatter = figure.axes
    np.testing.assert_array_equal(curves.lines[1].get_data(), [[10, 20, 30, 40, 50], [2, 4, 6, 8, 10]])
    assert curves.lines[2].get_ydata()[0] == 90
    assert histogram.get_title() == "500 states"
    assert [len(points.get_offsets()) for points in scatter.collections] == [500, 5, 7]
    mean, axes, _ = plots.principal_components(states)
    np.testing.assert_allclose(scatter.collections[2].get_offsets(), (states[5:12] - mean) @ axes, rtol=1e-6)
    plots.save(figure, tmp_path / "report.png")


def test_a_report_of_few_scores_marks_nothing_that_was_not_measured(states: np.ndarray) -> None:
    logd = np.zeros(500)
    weights = density_weights(logd, tau=1)
    figure = plots.plot_report({"a": [{"step": 1, "loss": 3.0}]}, {}, states, logd, weights, {})
    assert not figure.axes[0].lines
