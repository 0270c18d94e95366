"""What is shown of the installation, and the number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import sdw_fast as sdw
from sdw_fast.version import __version__


@pytest.fixture
def _threads() -> Iterator[None]:
    before = sdw.get_num_threads()
    yield
    sdw.set_num_threads(before)


def test_show_config_prints_what_its_dict_holds(capsys: pytest.CaptureFixture[str]) -> None:
    config = sdw.show_config("dicts")
    assert capsys.readouterr().out == ""
    assert json.loads(json.dumps(config)) == config
    assert config["sdw_fast"] == __version__
    assert config["torch"] == torch.__version__
    assert config["compiled_backends"][0] == "cpu"
    assert config["instruction_set"] in config["instruction_sets_available"]
    assert config["threads"] == sdw.get_num_threads()
    assert sdw.show_config() is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(config)
    assert all(line.endswith(str(value)) for line, value in zip(lines, config.values(), strict=True))
    with pytest.raises(ValueError, match="'stdout' or 'dicts', got 'json'"):
        sdw.show_config("json")


@pytest.mark.usefixtures("_threads")
def test_threads_are_set_and_shown() -> None:
    for threads in (1, 2):
        sdw.set_num_threads(threads)
        assert sdw.get_num_threads() == threads
        assert sdw.show_config("dicts")["threads"] == threads
    with pytest.raises(ValueError, match="0"):
        sdw.set_num_threads(0)
    assert sdw.get_num_threads() == 2


def test_the_kernels_take_pytorchs_number_of_threads() -> None:
    script = "import torch; torch.set_num_threads(3); import sdw_fast; print(sdw_fast.get_num_threads())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout == "3\n"


def test_what_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setitem(sys.modules, "faiss", None)
    config = sdw.show_config("dicts")
    assert (config["torchrl"], config["zuko"], config["mujoco"]) == (None, None, None)
