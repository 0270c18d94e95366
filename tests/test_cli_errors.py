"""Mistakes and mishaps at the command line: one sentence, a stated exit code, and output that any parser reads."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import sdw_fast as sdw
from sdw_fast.cli import app
from sdw_fast.distiller import Distiller
from sdw_fast.files import sealed, to_json, unsealed, write_text
from sdw_fast.folder import RunFolder, read_metrics

TINY = ["--size", "8", "--inner-steps", "3", "--batch-size", "32", "--objective", "dbc", "--checkpoint-every", "2"]


def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
    options = {"COLUMNS": "300", **(env or {})}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=options)


def assert_one_sentence(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    *bars, sentence = result.stderr.splitlines()
    assert all("step/s" in bar or not bar for bar in bars)
    assert sentence.startswith("error: ")
    assert all(word in sentence for word in words), sentence
    assert isinstance(result.exception, SystemExit)


@pytest.fixture(scope="module")
def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(400, 11)).astype(np.float32)
    return {
        "observations": observations,
        "actions": np.tanh(observations[:, :3]),
        "rewards": rng.normal(size=400),
        "terminals": np.zeros(400, bool),
        "timeouts": np.arange(400) % 20 == 19,
    }


@pytest.fixture(scope="module")
def dataset(arrays: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def finished(dataset: Path, tmp_path: Path) -> Path:
    """The folder of a run of four steps."""
    folder = tmp_path / "finished"
    assert run("distill", dataset, *TINY, "--steps", 4, "--out", folder).exit_code == 0
    return folder


def test_the_exit_codes_are_told() -> None:
    shown = run("--help").stdout
    for word in ("0 done", "1 an error", "2 a wrong command line", "130 interrupted", "SDW_FAST_TRACEBACK"):
        assert word in shown


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("shapes do not\n  match"), "RuntimeError: shapes do not match"),
        (KeyError("teacher"), "KeyError: 'teacher'"),
        (MemoryError(), "out of memory"),
        (OSError(28, "No space left on device", "run/checkpoint"), "No space left on device: 'run/checkpoint'"),
        (OSError(30, "Read-only file system", "run"), "Read-only file system: 'run'"),
        (AssertionError(), "AssertionError"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_errors_of_every_kind_are_one_sentence(dataset: Path, tmp_path: Path, monkeypatch, error, words: str) -> None:
    def fails(_: Distiller) -> None:
        raise error

    monkeypatch.setattr(Distiller, "advance", fails)
    arguments = ["distill", dataset, *TINY, "--steps", 2, "--out", tmp_path / "run"]
    assert_one_sentence(run(*arguments), words)
    assert run(*arguments, env={"SDW_FAST_TRACEBACK": "1"}).exception is error


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta"])
def test_a_device_that_does_not_exist(dataset: Path, tmp_path: Path, device: str) -> None:
    result = run("distill", dataset, *TINY, "--steps", 1, "--device", device, "--out", tmp_path)
    assert_one_sentence(result, f"device must be 'cpu', 'cuda' or 'cuda:N', got '{device}'")


@pytest.mark.parametrize("name", ["Hoper-v5", "Hopper-v99", "not an id", ""])
def test_an_environment_that_does_not_exist(finished: Path, name: str) -> None:
    result = run("evaluate", finished / "best.npz", "--env", name)
    if name:
        assert_one_sentence(result, f"there is no environment '{name}'")
    else:
        assert_one_sentence(result)


@pytest.mark.parametrize("source", [{}, [], "data.npz", {"dataset": None}, {"teacher": None, "device": "cpu"}])
def test_a_source_that_names_no_dataset(finished: Path, source: Any) -> None:
    path = finished / "config.json"
    write_text(path, to_json(sealed({**unsealed(json.loads(path.read_text())), "source": source})))
    assert_one_sentence(run("distill", "--resume", finished), str(path), "source must name a dataset")


def damage_checkpoint(folder: Path) -> None:
    content = bytearray((folder / "checkpoint").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "checkpoint").write_bytes(content)


@pytest.mark.parametrize(
    ("mishap", "words"),
    [
        (damage_checkpoint, "checkpoint is not a readable checkpoint"),
        (lambda folder: (folder / "config.json").write_text('{"source": {}'), "config.json is not a readable"),
        (lambda folder: (folder / "metrics.jsonl").write_text("[1]\n"), "metrics.jsonl is not a readable"),
        (lambda folder: (folder / "config.json").unlink(), "holds no run"),
    ],
)
def test_damage_in_a_run(finished: Path, mishap: Callable[[Path], Any], words: str) -> None:
    mishap(finished)
    assert_one_sentence(run("distill", "--resume", finished), words, str(finished))


def test_damage_inside_an_hdf5_file(arrays: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "data.hdf5"
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            stored = file.create_dataset(name, data=array, compression="gzip")
        place = stored.id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place : place + 8] = bytes(8)
    path.write_bytes(content)
    assert_one_sentence(run("density", path), "data.hdf5 is not a readable HDF5 file")


def test_a_folder_in_use(dataset: Path, finished: Path) -> None:
    sdw_run = sdw.run.new_distiller(sdw.load_dataset(dataset), None, sdw.DistillConfig(objective="dbc", size=8))
    with RunFolder(finished.parent / "other", sdw_run):
        result = run("distill", dataset, *TINY, "--steps", 4, "--out", finished.parent / "other")
    assert_one_sentence(result, f"is in use by process {os.getpid()}")


COMMAND = [sys.executable, "-m", "sdw_fast.cli"]


def test_a_full_disk_in_collect_is_an_error_and_no_crash(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = subprocess.run(
        [*COMMAND, "collect", "hopper/medium", "--steps", "100"],
        env={**os.environ, "MINARI_DATASETS_PATH": str(tmp_path)},
        preexec_fn=limited,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "error: [Errno 27] no room for" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "sdw/hopper").iterdir()] == ["namespace_metadata.json"]


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_all_json_is_json(dataset: Path, tmp_path: Path, monkeypatch) -> None:
    """Figures that are not finite: a step that is left out, and returns before the first evaluation."""
    fetch = Distiller.fetch

    def infinite(distiller: Distiller, steps: Any) -> list[dict[str, Any]]:
        return [{**step, "loss": float("nan"), "adjoint_growth": float("inf")} for step in fetch(distiller, steps)]

    monkeypatch.setattr(Distiller, "fetch", infinite)
    result = run("distill", dataset, *TINY, "--steps", 4, "--out", tmp_path / "run", "--json")
    assert strict(result.stdout)["steps"] == 4
    lines = [strict(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["adjoint_growth"]) for line in lines] == [
        (i, None, None) for i in range(1, 5)
    ]
    strict((tmp_path / "run/config.json").read_text())
    assert all(np.isnan(step["loss"]) for step in read_metrics(tmp_path / "run"))
    assert run("distill", "--resume", tmp_path / "run").exit_code == 0
    assert [strict(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == lines
    assert run("plot", tmp_path / "run").exit_code == 0


def test_other_rounding_is_a_warning_of_one_line(dataset: Path, finished: Path) -> None:
    before = sdw.get_num_threads()
    sdw.set_num_threads(before + 1)
    try:
        result = run("distill", "--resume", finished)
    finally:
        sdw.set_num_threads(before)
    assert result.exit_code == 0
    expected = f"warning: the run goes on from step 4 with other rounding (threads {before} -> {before + 1})"
    assert [line.startswith(expected) for line in result.stderr.splitlines() if "warning" in line] == [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--out", "somewhere"], "give DATASET and --out"),
        (["distill", "--resume", "nowhere"], "holds no run"),
        (["evaluate", "nothing.npz"], "no synthetic set"),
        (["plot", "nowhere"], "no metrics.jsonl"),
        (["density", "absent.npz"], "no dataset file"),
        (["density", "absent.npz", "--ess", "2"], "ess must be in (0, 1]"),
        (["distill", "absent.npz", "--out", "x", "--objective", "best"], "objective must be one of"),
        (["distill", "absent.npz", "--out", "x", "--teacher", "none.safetensors"], "no teacher file"),
        (["train-teacher", "absent.npz", "--out", "x"], "no dataset file"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
