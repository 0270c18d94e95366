"""What Ctrl-C, an error or a full disk leave of a teacher's training: the same call goes on to the same bits."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import episodes

from sdw_fast import training
from sdw_fast.data import TransitionDataset
from sdw_fast.disk import locked
from sdw_fast.teacher import Teacher
from sdw_fast.training import train_teacher

pytest.importorskip("torchrl")
STEPS = 12


@pytest.fixture
def data() -> TransitionDataset:
    return episodes()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Has something happen as a step begins; checkpoints are kept every 5 steps."""
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 5)
    plain = {learner: learner.update for learner in (training.Td3Bc, training.Iql)}

    def happen(number: int, event: Callable[[], None]) -> None:
        for learner, update in plain.items():

            def eventful(self: Any, batch: Any, step: int, update: Callable = update) -> Any:
                if step == number:
                    event()
                return update(self, batch, step)

            monkeypatch.setattr(learner, "update", eventful)

    return happen


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def train(data: TransitionDataset, algorithm: str = "td3bc", **options: Any) -> Teacher:
    return train_teacher(data, algorithm, **{"steps": STEPS, "progress": False, **options})


def assert_same(first: Teacher, second: Teacher, data: TransitionDataset) -> None:
    actions = first.actions(data.observations)
    np.testing.assert_array_equal(second.actions(data.observations), actions)
    np.testing.assert_array_equal(second.values(data.observations, actions), first.values(data.observations, actions))
    assert first.provenance == second.provenance


@pytest.mark.parametrize("algorithm", ["td3bc", "iql"])
def test_an_interrupted_training_goes_on_to_the_same_bits(data, algorithm: str, tmp_path: Path, at) -> None:
    """Ctrl-C is saved where it came, an error leaves the last checkpoint; the files end as if nothing had happened."""
    whole = train(data, algorithm)
    out = tmp_path / "new" / "teacher.safetensors"
    before, state = signal.getsignal(signal.SIGINT), torch.random.get_rng_state()
    at(3, ctrl_c)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 12; the same call goes on to the same result"):
        train(data, algorithm, out=out)
    at(12, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(data, algorithm, out=out)
    assert os.listdir(out.parent) == ["teacher.safetensors.checkpoint"]
    at(10, lambda: pytest.fail("a step was taken again"))
    assert_same(train(data, algorithm, out=out), whole, data)
    assert os.listdir(out.parent) == ["teacher.safetensors"]
    assert_same(Teacher.load(out), whole, data)
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_ctrl_c_without_a_file_says_what_would_have_kept_it(data, at) -> None:
    at(3, ctrl_c)
    with pytest.raises(KeyboardInterrupt, match=r"after step 3 of 12; nothing was kept: give it a file .* \(out\)"):
        train(data)


def test_ctrl_c_in_the_last_step_leaves_the_teacher(data, tmp_path: Path, at) -> None:
    whole = train(data)
    at(STEPS, ctrl_c)
    out = tmp_path / "teacher.safetensors"
    with pytest.raises(KeyboardInterrupt, match=r"after the last step; the teacher is in .*teacher.safetensors"):
        train(data, out=out)
    assert os.listdir(tmp_path) == [out.name]
    assert_same(Teacher.load(out), whole, data)


def test_a_checkpoint_of_another_training_is_refused(data, tmp_path: Path, at, monkeypatch) -> None:
    out = tmp_path / "teacher.safetensors"
    at(3, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        train(data, out=out)
    for other, message in (
        ({"seed": 1, "steps": 13}, "steps, seed differ"),
        ({"algorithm": "iql"}, "algorithm differ"),
    ):
        with pytest.raises(
            ValueError, match=rf"checkpoint is of another training: {message}. .* delete the checkpoint"
        ):
            train(data, out=out, **other)
    with pytest.raises(ValueError, match="dataset_hash differ"):
        train(replace(data, rewards=data.rewards + 1), out=out)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.warns(UserWarning, match=f"threads {threads}, now {threads + 1}: the last bits will differ"):
        train(data, out=out)


def test_a_damaged_checkpoint_is_refused(data, tmp_path: Path, at) -> None:
    out, checkpoint = tmp_path / "t.safetensors", tmp_path / "t.safetensors.checkpoint"
    at(3, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        train(data, out=out)
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, content[:1000], b""):
        checkpoint.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t.safetensors.checkpoint is not a readable checkpoint"):
            train(data, out=out)


def test_a_path_that_cannot_be_written_is_found_before_the_first_step(data, tmp_path: Path, at) -> None:
    at(1, lambda: pytest.fail("a step was taken"))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "file" / "teacher.safetensors", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=out.name[:20] if out.name[0] == "x" else str(tmp_path)):
            train(data, out=out)
    with (
        locked(tmp_path / "t.safetensors"),
        pytest.raises(BlockingIOError, match=r"t.safetensors is in use by process"),
    ):
        train(data, out=tmp_path / "t.safetensors")


def test_a_full_disk_says_so_and_the_training_goes_on_later(data, tmp_path: Path, at) -> None:
    whole, out = train(data), tmp_path / "teacher.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard)))
    try:
        with pytest.raises(OSError, match=r"File too large: .*teacher.safetensors.checkpoint"):
            train(data, out=out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    at(1, lambda: pytest.fail("started anew"))
    assert_same(train(data, out=out), whole, data)
