"""Figures say what the numbers say, and are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sdw_fast as sdw
from sdw_fast import plots


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
    logd = sdw.knn_log_density(states)
    weights = sdw.density_weights(logd, ess=0.5)
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
    plots.save(plots.plot_density(states, logd, sdw.density_weights(logd, tau=1)), tmp_path / "equal.pdf")


def test_plot_tau(states: np.ndarray, tmp_path: Path) -> None:
    logd = sdw.knn_log_density(states)
    chosen = sdw.density_weights(logd, ess=0.4).tau
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
    figure = plots.plot_tau(sdw.knn_log_density(states))
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
