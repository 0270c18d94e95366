"""The report of runs: one page that needs nothing else, shows what the folders hold, and says what is wrong."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdw_fast as sdw
from sdw_fast import charts
from sdw_fast.diagnosis import diagnose
from sdw_fast.files import read_npz, sealed, to_json, unsealed
from sdw_fast.folder import read_metrics
from sdw_fast.report import write_report

VOID = {"meta", "path", "circle", "rect", "polyline"}
TINY: dict[str, Any] = {"size": 6, "hidden": (8,), "inner_steps": 2, "batch_size": 16, "steps": 3, "progress": False}


class Page(HTMLParser):
    """What a page holds; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def tips(self) -> list[str]:
        return [attrs["data-tip"] or "" for _, attrs in self.tags if "data-tip" in attrs]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, toy_env: str) -> Path:
    """Runs "one", evaluated, and "two", of two sets."""
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(300, 11)),
        "actions": rng.uniform(-1, 1, size=(300, 3)),
        "rewards": rng.normal(size=300),
        "terminations": np.zeros(300, bool),
        "truncations": np.arange(300) % 20 == 19,
    }
    data = sdw.load_dataset(arrays, env_id=toy_env)
    folder = tmp_path_factory.mktemp("runs")
    evaluated = {"eval_every": 1, "eval_clones": 1, "eval_episodes": 2}
    sdw.distill(data, objective="dbc", out=folder / "one", **evaluated, **TINY)
    sdw.distill(data, objective="dbc", out=folder / "two", n_runs=2, lr=0.07, **TINY)
    return folder


def transitions(run: Path) -> int:
    return json.loads((run / "config.json").read_text())["dataset"]["transitions"]


def read(folders: list[Path], out: Path) -> Page:
    write_report(folders, out)
    return Page(out.read_text(encoding="utf-8"))


def test_a_report_needs_nothing_else(folders: Path, tmp_path: Path) -> None:
    page = read([folders / "one"], tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=|url\(|@import|https?:", text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_a_report_shows_pairs_returns_and_settings(folders: Path, tmp_path: Path) -> None:
    page = read([folders / "one"], tmp_path / "report.html")
    synthetic = sdw.SyntheticDataset.load(folders / "one/best.npz")
    pairs = [tip for tip in page.tips if tip.startswith("pair ")]
    assert len(pairs) == len(synthetic)
    first = ", ".join(f"{x:.3g}" for x in synthetic.observations[0].tolist())
    assert f"state {first}\n" in pairs[0]
    score = next(step for step in read_metrics(folders / "one") if "score" in step)
    assert f"one: {score['score']:.3g} ± {score['score_std']:.3g} at 1" in page.tips
    assert sum(tip.startswith("real state") for tip in page.tips) == transitions(folders / "one")
    assert "objective" in page.text
    assert "dbc" in page.text


def test_several_runs_stand_side_by_side(folders: Path, tmp_path: Path) -> None:
    page = read([folders / "one", folders / "two"], tmp_path / "report.html")
    for name in ("one", "run-000", "run-001"):
        assert page.text.count(name) >= 4  # the legend, the card, states, weights, settings
    changed = [attrs for tag, attrs in page.tags if tag == "tr" and attrs.get("class") == "differs"]
    assert len(changed) == 4  # eval_every, eval_clones, eval_episodes, lr
    assert {tip.split(":")[0] for tip in page.tips if " at 3" in tip} == {"one", "run-000", "run-001"}


def test_what_a_folder_lacks_is_left_out(folders: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (old / name).write_bytes((folders / "one" / name).read_bytes())
    assert "holds no sample of its states" in read([old], tmp_path / "report.html").text
    with pytest.raises(FileNotFoundError, match="holds no run"):
        write_report([tmp_path], tmp_path / "none.html")
    (old / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is not a readable configuration"):
        write_report([old], tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_names_from_files_are_escaped(folders: Path, tmp_path: Path) -> None:
    run = tmp_path / "<b>run"
    run.mkdir()
    content = unsealed(json.loads((folders / "one/config.json").read_text()))
    content["dataset"]["name"] = "<script>alert(1)</script>"
    (run / "config.json").write_text(to_json(sealed(content)))
    (run / "metrics.jsonl").write_bytes((folders / "one/metrics.jsonl").read_bytes())
    text = (read([run], tmp_path / "report.html"), (tmp_path / "report.html").read_text())[1]
    assert "<script>alert" not in text
    assert "<b>run" not in text


def test_the_sample_of_states_is_of_the_problem(folders: Path) -> None:
    sample, rows = read_npz(folders / "one/states.npz"), transitions(folders / "one")
    assert {name: array.shape for name, array in sample.items()} == {
        "observations": (rows, 11),
        "targets": (rows, 3),
        "weights": (rows,),
    }
    assert (sample["weights"] == 1).all()


# --- diagnosis -------------------------------------------------------------------------------------------------------


def steps(n: int = 100, **columns: Any) -> list[dict[str, float]]:
    rows = [{"step": i + 1, "loss": 1 / (i + 1), "adjoint_growth": 1.0} for i in range(n)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


@pytest.mark.parametrize(
    ("objective", "metrics", "words", "bad"),
    [
        ({}, steps(), "Nothing looks wrong", False),
        ({}, steps(), "Not evaluated", False),
        ({}, steps(60), "Unfinished: 60 of 100 outer steps", False),
        ({}, steps(loss=[1.0] * 100), "The outer loss did not fall", True),
        (
            {},
            steps(loss=[1 / (i + 1) if i % 10 else np.nan for i in range(100)]),
            "10 of 100 outer steps were left",
            True,
        ),
        ({}, steps(adjoint_growth=[1.0] * 80 + [2000.0] * 20), "Diverging: the unroll amplifies", True),
        ({"states": 1000, "weights_floored": 400}, steps(), "40% of the states have weight 0", True),
        ({"effective_sample_size": 0.05}, steps(), "effective sample size is 5%", True),
        ({"teacher_agreement": -0.2}, steps(), "acts unlike the dataset (R² = -0.20", True),
        ({"teacher_agreement": 0.2}, steps(), "Nothing looks wrong", False),
        ({}, steps(score=[90.0] * 50 + [40.0] * 50), "The return fell from 90.0 at step 1 to 40.0", True),
        ({}, steps(score=[50.0] * 100, score_std=[30.0] * 100), "Episodes differ by 30 points", False),
    ],
)
def test_signs_are_put_into_words(objective: dict, metrics: list, words: str, bad: bool) -> None:
    findings = diagnose(sdw.DistillConfig(steps=100), objective, metrics)
    assert [finding.bad for finding in findings if words in finding.text] == [bad]
    assert any(finding.bad for finding in findings) == bad


# --- charts ----------------------------------------------------------------------------------------------------------


def test_lines_by_hand() -> None:
    curve = charts.Curve(np.array([0.0, 1.0, 2.0]), np.array([1.0, np.nan, 3.0]), np.array([0.5, 0.5, 0.25]))
    page = Page(charts.lines("a & b", {"x": curve}, ("step", "")))
    assert page.tips == ["x: 1 ± 0.5 at 0", "x: 3 ± 0.25 at 2"]
    assert "a & b" in page.text
    high, low = (float(attrs["cy"] or 0) for tag, attrs in page.tags if tag == "circle")
    assert low < high  # 3 stands above 1


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0], [], [np.nan, np.inf], [-1.0, 1e-30, 1e30], [5.0, 5.0]])
def test_any_figures_can_be_drawn(values: list[float], log: bool) -> None:
    curve = charts.Curve(np.arange(float(len(values))), np.array(values))
    text = charts.lines("t", {"x": curve}, ("", ""), log=log)
    assert not re.search(r"nan|inf", text)
    Page(text)


def test_a_histogram_counts_every_value() -> None:
    page = Page(charts.histogram("h", np.array([1.0] * 7 + [2.0] * 3), ("", "")))
    counts = [int(tip.split()[0]) for tip in page.tips]
    assert sum(counts) == 10
    assert sorted(counts)[-2:] == [3, 7]
    Page(charts.histogram("h", np.zeros(5), ("", "")))
