"""Distillation over ranks: the steps of one process, a folder of the first rank's, and going on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks

import sdw_fast as sdw
from sdw_fast import DistillConfig, Distiller, evaluation, outer_problem, real_pairs
from sdw_fast.evaluation import Evaluation
from sdw_fast.folder import load_checkpoint, read_metrics

TINY = {"objective": "dbc", "size": 8, "hidden": (16,), "inner_steps": 5, "batch_size": 32, "steps": 12}
TINY |= {"checkpoint_every": 4}


@pytest.fixture
def data() -> sdw.TransitionDataset:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(300, 5)).astype(np.float32)
    actions = np.tanh(states @ rng.normal(size=(5, 2))).astype(np.float32)
    ends = np.arange(300) % 50 == 49
    return sdw.load_dataset(
        {
            "observations": states,
            "actions": actions,
            "rewards": np.ones(300),
            "terminations": ends,
            "truncations": np.zeros(300, bool),
        }
    )


def distiller(data: sdw.TransitionDataset, **settings: object) -> Distiller:
    config = DistillConfig(**{**TINY, **settings})
    return Distiller(outer_problem(data, None, config), real_pairs(data, config.size), config)


def test_the_mean_of_several_initializations_is_that_of_their_hypergradients(data) -> None:
    """One step of plain SGD from each initialization alone, and from three together."""
    plain = {"optimizer": "sgd", "lr": 1.0, "momentum": 0.0, "schedule": "constant", "average": 0.0, "clip_norm": 1e9}
    together = distiller(data, **plain, initializations=3)
    start = together.observations.detach().clone()
    together.step()
    moves = []
    for number in range(3):
        alone = distiller(data, **plain)
        draw = alone._draws.draw
        alone._draws.draw = lambda _, step, number=number, draw=draw: draw([number], step)  # type: ignore[method-assign]
        alone.step()
        moves.append(alone.observations.detach() - start)
    torch.testing.assert_close(together.observations.detach() - start, torch.stack(moves).mean(0))
    assert not torch.equal(moves[0], moves[1])


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_take_the_steps_of_one_process(tmp_path: Path, data, size: int) -> None:
    one = distiller(data, initializations=3)
    losses = [one.step()["loss"] for _ in range(6)]

    def work(rank: int) -> tuple[np.ndarray, list[float]]:
        shared = distiller(data, initializations=3)
        return [shared.step()["loss"] for _ in range(6)], shared.synthetic.observations

    found = on_ranks(size, tmp_path, work)
    for figures, observations in found:
        np.testing.assert_allclose(figures, losses, rtol=1e-5)
        np.testing.assert_allclose(observations, one.synthetic.observations, atol=1e-4)
        assert np.array_equal(observations, found[0][1])


def test_the_first_rank_owns_the_folder_and_all_return_its_set(tmp_path: Path, data) -> None:
    """Started again, the ranks go on from its checkpoint to the bits of a run that was never stopped."""

    def work(rank: int, out: str, steps: int) -> np.ndarray:
        def stop(distilling: Distiller, metrics: dict) -> None:
            if distilling.iteration == steps:
                raise KeyError("stopped")

        try:
            syn = sdw.distill(data, out=tmp_path / out, callback=stop, progress=False, **TINY)
        except (KeyError, RuntimeError):  # the second rank hears of it from the connection
            return np.zeros(0)
        return syn.observations

    whole = on_ranks(2, tmp_path, work, "whole", 99)
    on_ranks(2, tmp_path, work, "parts", 10)
    assert load_checkpoint(tmp_path / "parts/checkpoint")["distiller"]["iteration"] == 8
    assert load_checkpoint(tmp_path / "parts/checkpoint")["distiller"]["config"]["initializations"] == 2
    parts = on_ranks(2, tmp_path, work, "parts", 99)
    for one in (*whole, *parts):
        assert np.array_equal(one, whole[0])
    assert np.array_equal(sdw.SyntheticDataset.load(tmp_path / "parts/best.npz").observations, whole[0])
    assert [step["step"] for step in read_metrics(tmp_path / "parts")] == list(range(1, 13))


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_out_the_policies_that_are_evaluated(tmp_path: Path, data, monkeypatch, size: int) -> None:
    """Each runs some, and the figures are those of one process that runs all."""
    cloned: list[int] = []

    def clone(synthetic: sdw.SyntheticDataset, *, ensemble: int, seed: int) -> int:
        cloned.append(seed)
        return seed

    def run(policy: int, env: str, *, episodes: int, seed: int, progress: bool) -> Evaluation:
        returns = np.arange(seed, seed + episodes) % 7 + policy % 3.0
        return Evaluation(env, seed, returns, np.ones(episodes, np.int64), None)

    monkeypatch.setattr("sdw_fast.environments.check_environment", lambda units, env: "Any-v0")
    monkeypatch.setattr(evaluation, "behavior_clone", clone)
    monkeypatch.setattr(evaluation, "evaluate", run)
    settings = {**TINY, "eval_every": 6, "eval_clones": 5, "eval_episodes": 9, "initializations": 3}

    def work(rank: int, out: str) -> list[int]:
        cloned.clear()
        sdw.distill(data, out=tmp_path / out, progress=False, **settings)
        return list(cloned)

    every = work(0, "one")
    assert len(every) == 10  # 5 policies after step 6, 5 after step 12
    shares = on_ranks(size, tmp_path, work, "ranks")
    assert sorted(seed for share in shares for seed in share) == sorted(every)
    assert max(map(len, shares)) == 2 * -(-5 // size)
    for one, other in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "ranks"), strict=True):
        assert (one.get("return"), one.get("score_std")) == (other.get("return"), other.get("score_std"))


def test_what_fails_in_an_evaluation_is_raised_on_every_rank(tmp_path: Path, data, monkeypatch) -> None:
    def clone(synthetic: sdw.SyntheticDataset, *, ensemble: int, seed: int) -> None:
        if seed % 2:
            raise ValueError("no such robot")

    monkeypatch.setattr("sdw_fast.environments.check_environment", lambda units, env: "Any-v0")
    monkeypatch.setattr(evaluation, "behavior_clone", clone)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: None)

    def work(rank: int) -> str:
        with pytest.raises(ValueError, match="no such robot") as error:
            sdw.distill(data, progress=False, **{**TINY, "eval_every": 6, "eval_clones": 2})
        return str(error.value)

    assert on_ranks(2, tmp_path, work) == ["rank 1: no such robot", "no such robot"]


def test_an_interrupt_of_any_rank_stops_all_after_the_same_step(tmp_path: Path, data, monkeypatch) -> None:
    """Ctrl-C that reaches the second rank alone, in its fifth step; the first keeps a checkpoint."""

    def work(rank: int) -> str:
        step = Distiller.advance

        def advance(self: Distiller) -> torch.Tensor:
            if rank == 1 and self.iteration == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self)

        monkeypatch.setattr(Distiller, "advance", advance)
        with pytest.raises(KeyboardInterrupt) as error:
            sdw.distill(data, out=tmp_path / "run", progress=False, **TINY)
        return str(error.value)

    first, second = on_ranks(2, tmp_path, work)
    assert first.startswith("stopped after outer step 6; ")
    assert second == "stopped after outer step 6"
    assert load_checkpoint(tmp_path / "run/checkpoint")["distiller"]["iteration"] == 6


def test_more_ranks_than_initializations_are_refused(tmp_path: Path, data) -> None:
    def work(rank: int) -> str:
        with pytest.raises(ValueError, match="cannot be shared out among 3 processes") as error:
            distiller(data, initializations=2)
        return str(error.value)

    assert on_ranks(3, tmp_path, work)[0] == "initializations=2 cannot be shared out among 3 processes"


def test_torchrun_starts_the_command(tmp_path: Path, data) -> None:
    arrays = {name: getattr(data, name) for name in ("observations", "actions", "rewards", "terminations")}
    np.savez(tmp_path / "data.npz", truncations=data.truncations, **arrays)
    options = ["--objective", "dbc", "--size", "8", "--hidden", "16", "--inner-steps", "5", "--steps", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sdw_fast"]
    command += ["distill", tmp_path / "data.npz", *options, "--out", tmp_path / "run", "--json"]
    folder = os.pathsep.join(filter(None, [str(Path(sdw.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"steps": 4') == 1  # one of the two says it
    assert json.loads((tmp_path / "run/config.json").read_text())["config"]["initializations"] == 2
    assert len(read_metrics(tmp_path / "run")) == 4
