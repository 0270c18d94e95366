"""Teachers at the command line: trained there, read from a file, or made by a function of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_cli import OTHER_TEACHER, TINY, as_options, run

import sdw_fast as sdw

TEACHERS = """
import torch
from torch import nn

from sdw_fast import Teacher


def make():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Teacher(nn.Sequential(nn.Linear(11, 3), nn.Tanh()))


def nothing():
    return 3
"""


def test_every_setting_reaches_the_training(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchrl")
    teacher = tmp_path / "teacher.safetensors"
    for algorithm, others in (("td3bc", ["alpha"]), ("iql", ["expectile", "temperature"])):
        given = {name: OTHER_TEACHER[name] for name in ("steps", "seed", *others)} | {"algorithm": algorithm}
        result = run("train-teacher", dataset, *as_options(given), "--out", teacher)
        assert result.exit_code == 0, result.output
        provenance = sdw.Teacher.load(teacher).provenance
        assert {name: provenance[name] for name in given} == given
    assert sdw.Teacher.load(teacher).actions(np.zeros((1, 11), np.float32)).shape == (1, 3)
    result = run("distill", dataset, *TINY, "--objective", "pbc", "--teacher", teacher, "--steps", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "config.json").read_text())["source"]["teacher"] == str(teacher)


def test_a_function_of_the_users_makes_the_teacher(dataset: Path, tmp_path: Path, monkeypatch) -> None:
    """Alone, or for the weights of a file; a run that is resumed needs it again, for no file says which code to run."""
    (tmp_path / "teachers_of_mine.py").write_text(TEACHERS)
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "--objective", "pbc", "--steps", 2]
    factory = ["--teacher-factory", "teachers_of_mine:make"]
    result = run("distill", dataset, *options, *factory, "--out", "made")
    assert result.exit_code == 0, result.output
    import teachers_of_mine

    teachers_of_mine.make().save("teacher.safetensors")
    refused = run("distill", dataset, *options, "--teacher", "teacher.safetensors", "--out", "refused")
    assert (refused.exit_code, "--teacher-factory module:function" in refused.output) == (1, True)
    result = run("distill", dataset, *options, "--teacher", "teacher.safetensors", *factory, "--out", "filled")
    assert result.exit_code == 0, result.output
    for name in ("made", "filled"):
        assert "teachers_of_mine" not in (tmp_path / name / "config.json").read_text()
        assert run("distill", "--resume", name).exit_code == 1
        assert run("distill", "--resume", name, *factory).exit_code == 0
    first, second = (sdw.SyntheticDataset.load(tmp_path / name / "last.npz") for name in ("made", "filled"))
    np.testing.assert_array_equal(first.observations, second.observations)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("teachers_of_mine:absent", "must be module:function, got 'teachers_of_mine:absent'"),
        ("no_such_module:make", "must be module:function, got 'no_such_module:make': No module named"),
        ("teachers_of_mine", "must be module:function, got 'teachers_of_mine'"),
        (":make", "must be module:function, got ':make'"),
        ("teachers_of_mine:nothing", "must return a sdw_fast.Teacher, got int"),
    ],
)
def test_names_of_no_function_are_refused(dataset: Path, tmp_path: Path, monkeypatch, name: str, message: str) -> None:
    (tmp_path / "teachers_of_mine.py").write_text(TEACHERS)
    monkeypatch.chdir(tmp_path)
    result = run("distill", dataset, *TINY, "--teacher-factory", name, "--out", "run")
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "run").exists()
