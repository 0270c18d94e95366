"""What Ctrl-C, a kill or a full disk leave of a run: it goes on to the same bits."""

from __future__ import annotations

import inspect
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sdw_fast as sdw
from sdw_fast import run as module
from sdw_fast.folder import load_checkpoint, read_metrics
from sdw_fast.run import new_distiller

TINY = {"size": 12, "hidden": (16, 16), "inner_steps": 5, "batch_size": 64, "steps": 30, "checkpoint_every": 7}


@pytest.mark.parametrize("n_runs", [None, 2])
def test_ctrl_c_finishes_the_step_and_goes_on_to_the_same_bits(small_data, small_teacher, tmp_path, n_runs) -> None:
    settings = {**TINY, "n_runs": n_runs, "progress": False}
    whole = sdw.distill(small_data, small_teacher, **settings)

    def callback(distiller: sdw.Distiller, metrics: dict) -> None:
        if distiller.iteration == 10:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match=r"after outer step 10; the same call with out=.*/run continues to the"):
        sdw.distill(small_data, small_teacher, **settings, out=out, callback=callback)
    assert signal.getsignal(signal.SIGINT) is before
    assert load_checkpoint(out / "checkpoint")["distiller"]["iteration"] == 10
    assert read_metrics(out if n_runs is None else out / "run-001")[-1]["step"] == 10
    with pytest.raises(KeyboardInterrupt, match="after outer step 10, nothing was kept"):
        sdw.distill(small_data, small_teacher, **settings, callback=callback)
    parts = sdw.distill(small_data, small_teacher, **settings, out=out)
    for one, other in zip([whole] if n_runs is None else whole, [parts] if n_runs is None else parts, strict=True):
        assert one == other
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_names_the_command_of_a_run_that_has_one(small_data, small_teacher, tmp_path) -> None:
    distiller = new_distiller(small_data, small_teacher, sdw.DistillConfig(**TINY))
    with pytest.raises(KeyboardInterrupt, match=rf"`sdw-fast distill --resume {tmp_path}`"):
        module.run(
            distiller,
            tmp_path,
            source={"dataset": "any"},
            callback=lambda *_: os.kill(os.getpid(), signal.SIGINT),
            progress=False,
        )


def test_a_second_ctrl_c_stops_at_once(small_data, small_teacher, tmp_path) -> None:
    def callback(distiller: sdw.Distiller, metrics: dict) -> None:
        if distiller.iteration == 10:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("still there")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        sdw.distill(small_data, small_teacher, **TINY, out=tmp_path, callback=callback, progress=False)
    assert str(stopped.value) == ""
    assert load_checkpoint(tmp_path / "checkpoint")["distiller"]["iteration"] == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_leaves_ctrl_c_as_it_was(small_data, small_teacher) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        sdw.distill(small_data, small_teacher, **TINY, callback=lambda *_: 1 / 0, progress=False)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_cut_off_while_it_is_written_leaves_the_one_before(
    small_data, small_teacher, tmp_path, monkeypatch
) -> None:
    settings = {**TINY, "out": tmp_path, "progress": False}
    whole = sdw.distill(small_data, small_teacher, **TINY, progress=False)
    write, left = Path.write_bytes, 2

    def full_disk(path: Path, content: Any) -> int:
        nonlocal left
        left -= "checkpoint" in path.name
        if not left:
            write(path, b"PK half a checkpoint")
            raise OSError("no space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        sdw.distill(small_data, small_teacher, **settings)
    monkeypatch.setattr(Path, "write_bytes", write)
    assert load_checkpoint(tmp_path / "checkpoint")["distiller"]["iteration"] == 7
    assert sdw.distill(small_data, small_teacher, **settings) == whole
    assert {p.name for p in tmp_path.iterdir()} == {
        ".lock",
        "checkpoint",
        "config.json",
        "metrics.jsonl",
        "states.npz",
        "best.npz",
        "last.npz",
    }


def distill_slowly(out: str, pause: float) -> None:
    """What is run here, and, by its source, in a process that is sent a signal."""
    import time

    import numpy as np

    import sdw_fast as sdw

    observations = np.random.default_rng(0).normal(size=(400, 11)).astype(np.float32)
    ends = np.arange(400) % 20 == 19
    data = {"observations": observations, "actions": np.tanh(observations[:, :3]), "rewards": np.zeros(400)}
    data |= {"terminations": np.zeros(400, bool), "truncations": ends}

    def callback(distiller: sdw.Distiller, metrics: dict) -> None:
        time.sleep(pause)
        if distiller.iteration == 9:  # past the first checkpoint, at step 7
            print("started", flush=True)

    settings = {"size": 12, "hidden": (16, 16), "inner_steps": 5, "batch_size": 64, "steps": 40, "checkpoint_every": 7}
    sdw.distill(sdw.load_dataset(data), objective="dbc", **settings, out=out, callback=callback)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_resumes_to_the_same_bits(tmp_path: Path, signum: signal.Signals) -> None:
    code = f"{inspect.getsource(distill_slowly)}\ndistill_slowly({str(tmp_path / 'cut')!r}, 0.05)\nprint('finished')"
    process = subprocess.Popen(
        [sys.executable, "-c", "from __future__ import annotations\n" + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(sdw.get_num_threads())},
    )
    distill_slowly(str(tmp_path / "whole"), 0.0)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signum)
    output, errors = process.communicate(timeout=250)
    assert "finished" not in output
    reached = load_checkpoint(tmp_path / "cut" / "checkpoint")["distiller"]["iteration"]
    if signum == signal.SIGINT:
        assert "the same call with out" in errors
        assert reached == read_metrics(tmp_path / "cut")[-1]["step"]
    else:
        assert reached % 7 == 0
    assert 7 <= reached < 40
    distill_slowly(str(tmp_path / "cut"), 0.0)
    for name in ("last.npz", "best.npz"):
        whole, cut = (sdw.SyntheticDataset.load(tmp_path / run / name) for run in ("whole", "cut"))
        assert whole == cut
    assert [m["step"] for m in read_metrics(tmp_path / "cut")] == list(range(1, 41))


def test_ctrl_c_while_the_last_checkpoint_is_written_is_not_swallowed(
    small_data, small_teacher, tmp_path, monkeypatch
) -> None:
    settings = {**TINY, "out": tmp_path, "progress": False}
    checkpoint = module.RunFolder.checkpoint

    def pressed(folder: Any, distiller: sdw.Distiller, *best: Any) -> None:
        if distiller.iteration == 30:
            signal.raise_signal(signal.SIGINT)
        checkpoint(folder, distiller, *best)

    with monkeypatch.context() as patch:
        patch.setattr(module.RunFolder, "checkpoint", pressed)
        with pytest.raises(KeyboardInterrupt, match="after outer step 30, the last; the run is complete"):
            sdw.distill(small_data, small_teacher, **settings)
    whole = sdw.distill(small_data, small_teacher, **TINY, progress=False)
    assert sdw.SyntheticDataset.load(tmp_path / "best.npz") == whole


def test_a_handler_that_is_not_python_s_is_left_alone(small_data, small_teacher, monkeypatch) -> None:
    """An embedding program's: Python says None, and could not put it back."""
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda signum: None)
        patch.setattr(signal, "signal", lambda *_: pytest.fail("changed"))
        sdw.distill(small_data, small_teacher, **TINY, progress=False)


def test_a_full_disk_at_a_checkpoint_says_so_and_the_run_goes_on_later(small_data, small_teacher, tmp_path) -> None:
    settings = {**TINY, "out": tmp_path, "progress": False}
    whole = sdw.distill(small_data, small_teacher, **TINY, progress=False)

    def fill(distiller: sdw.Distiller, metrics: dict) -> None:
        if distiller.iteration == 13:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/checkpoint'"):
            sdw.distill(small_data, small_teacher, **settings, callback=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path / "checkpoint")["distiller"]["iteration"] == 7
    assert sdw.distill(small_data, small_teacher, **settings) == whole


def test_a_folder_deleted_under_a_run_says_so(small_data, small_teacher, tmp_path) -> None:
    def delete(distiller: sdw.Distiller, metrics: dict) -> None:
        if distiller.iteration == 3:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/run, was deleted while the run was writing to it"):
        sdw.distill(small_data, small_teacher, **TINY, out=tmp_path / "run", callback=delete, progress=False)
    assert not (tmp_path / "run").exists()
