"""Which set is returned: by the loss on states held out, by episodes, or the last; and what is held out."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast import run as run_module
from sdw_fast import selection
from sdw_fast.batches import OuterBatches
from sdw_fast.evaluation import SELECTION_SEED
from sdw_fast.folder import load_checkpoint, read_metrics
from sdw_fast.run import new_distiller
from sdw_fast.selection import HeldOut

TINY = {"size": 12, "hidden": (16, 16), "inner_steps": 5, "batch_size": 64, "steps": 12, "checkpoint_every": 4}


def make(
    data: sdw.TransitionDataset, teacher: sdw.Teacher, n_runs: int | None = None, **settings: Any
) -> sdw.Distiller:
    return new_distiller(data, teacher, sdw.DistillConfig(**{**TINY, **settings}), n_runs=n_runs)


# --- what is held out -------------------------------------------------------------------------------------------------


def test_a_tenth_of_the_states_is_never_learned_from(small_data, small_teacher) -> None:
    """Targets of the held-out states that are NaN do no harm to any step."""
    distiller = make(small_data, small_teacher)
    train, held = distiller.problem.split()
    assert len(held) == 40
    assert sorted([*train, *held]) == list(range(400))
    targets = distiller.problem.targets.copy()
    targets[held] = np.nan
    problem = dataclasses.replace(distiller.problem, targets=targets)
    poisoned = sdw.Distiller(problem, sdw.real_pairs(small_data, 12), distiller.config)
    for _ in range(12):
        assert poisoned.step() == distiller.step()
    assert poisoned.synthetic == distiller.synthetic


def test_every_state_is_learned_from_where_the_last_set_is_wanted(small_data, small_teacher) -> None:
    distiller = make(small_data, small_teacher, select="last", batch_size=2000)
    batch = distiller._draws.draw([0], 0)[1][0][0]
    assert len(torch.unique(batch, dim=0)) > 390
    batch = make(small_data, small_teacher, batch_size=2000)._draws.draw([0], 0)[1][0][0]
    assert len(torch.unique(batch, dim=0)) <= 360


@pytest.mark.parametrize(("rows", "held"), [(19, 0), (20, 2), (400, 40)])
def test_tiny_datasets_keep_all_rows(small_data, small_teacher, rows: int, held: int) -> None:
    data = small_data.subset(np.arange(rows))
    result = sdw.distill(data, **TINY, objective="dbc", progress=False)
    assert len(sdw.outer_problem(data, None, sdw.DistillConfig(objective="dbc")).split()[1]) == held
    assert result.config["selected"]["by"] == ("held-out loss" if held else "last")
    assert result.config["iteration"] == 12


def test_the_held_out_loss_by_hand(small_data, small_teacher) -> None:
    """Mean over policies cloned as an outer step clones them, on the states held out; measuring changes nothing."""
    distiller = make(small_data, small_teacher, n_runs=2)
    for _ in range(3):
        distiller.step()
    before = distiller.state_dict()
    found = HeldOut(distiller).losses()
    rows = torch.from_numpy(distiller.problem.split()[1])
    states, targets, weights = OuterBatches(distiller.problem, torch.device("cpu")).take(rows)
    for run, (seed, synthetic) in enumerate(zip(distiller.seeds, distiller.sets, strict=True)):
        generator = torch.Generator().manual_seed(SELECTION_SEED + seed)
        losses = []
        for _ in range(selection.POLICIES):
            initial = [p[0] for p in distiller.inner_loop.initial([generator])]
            pairs = map(torch.from_numpy, synthetic.normalized())
            final = sdw.ops.unrolled_bc(*pairs, initial, steps=5, lr=0.1, momentum=0.9)
            losses.append(float(sdw.ops.behavior_matching(final, states, targets, weights)))
        assert found[run] == pytest.approx(np.mean(losses), rel=1e-4)
    after = distiller.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(before["generators"], after["generators"], strict=True))
    assert torch.equal(before["observations"], after["observations"])


# --- what is returned -------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out losses by step, looked at every third: lowest at 6 for run 0, at 9 for run 1, never after."""
    losses = {3: (0.5, 0.5), 6: (0.2, 0.4), 9: (0.3, 0.3), 12: (0.2, np.nan)}
    monkeypatch.setattr(run_module, "HELD_OUT_EVERY", 3)
    monkeypatch.setattr(
        HeldOut, "losses", lambda self: np.array(losses[self._distiller.iteration][: self._distiller.n_runs])
    )


@pytest.mark.parametrize("n_runs", [None, 2])
def test_the_set_of_the_lowest_held_out_loss_is_returned(small_data, small_teacher, tmp_path, scripted, n_runs) -> None:
    seen: dict[int, list[sdw.SyntheticDataset]] = {}
    settings = {**TINY, "n_runs": n_runs, "progress": False}
    result = sdw.distill(
        small_data, small_teacher, **settings, out=tmp_path, callback=lambda d, m: seen.update({d.iteration: d.sets})
    )
    for run, (best, step) in enumerate(zip([result] if n_runs is None else result, [6, 9], strict=False)):
        assert best == seen[step][run]
        assert best != seen[12][run]
        folder = tmp_path if n_runs is None else tmp_path / f"run-00{run}"
        kept = sdw.SyntheticDataset.load(folder / "best.npz")
        assert kept == best
        assert (kept.config["iteration"], kept.config["selected"]["by"]) == (step, "held-out loss")
        assert kept.config["selected"]["loss"] == [0.2, 0.3][run]
        assert sdw.SyntheticDataset.load(folder / "last.npz") == seen[12][run]
        logged = {m["step"]: m["held_out_loss"] for m in read_metrics(folder) if "held_out_loss" in m}
        assert list(logged) == [3, 6, 9, 12]


def test_the_last_set_is_returned_where_asked(small_data, small_teacher, tmp_path, scripted) -> None:
    settings = {**TINY, "progress": False}
    result = sdw.distill(small_data, small_teacher, **settings, select="last", out=tmp_path)
    assert (result.config["iteration"], result.config["selected"]) == (12, {"by": "last"})
    assert sdw.SyntheticDataset.load(tmp_path / "best.npz") == result
    assert not [m for m in read_metrics(tmp_path) if "held_out_loss" in m]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("n_runs", [None, 2])
def test_a_run_cut_after_its_best_step_still_returns_it(small_data, small_teacher, tmp_path, scripted, n_runs) -> None:
    settings = {**TINY, "n_runs": n_runs, "progress": False}
    whole = sdw.distill(small_data, small_teacher, **settings, out=tmp_path / "whole")

    def stop(distiller: sdw.Distiller, metrics: dict) -> None:
        if distiller.iteration == 11:
            raise Stopped

    with pytest.raises(Stopped):
        sdw.distill(small_data, small_teacher, **settings, out=tmp_path / "parts", callback=stop)
    parts = sdw.distill(small_data, small_teacher, **settings, out=tmp_path / "parts")
    for one, other in zip([whole] if n_runs is None else whole, [parts] if n_runs is None else parts, strict=True):
        assert one == other
        assert one.config == other.config
    assert load_checkpoint(tmp_path / "parts" / "checkpoint")["best_by"] == "held-out"


def test_a_run_that_goes_on_with_evaluations_chooses_by_them(small_data, small_teacher, tmp_path, toy_env) -> None:
    """What was best by another measure is no longer; episodes that choose are none that anything else runs."""
    data = dataclasses.replace(small_data, units=dataclasses.replace(small_data.units, env_id=toy_env))
    settings = {**TINY, "schedule": "constant", "out": tmp_path, "progress": False}
    first = sdw.distill(data, small_teacher, **settings)
    assert first.config["selected"]["by"] == "held-out loss"
    evaluated = {"eval_every": 5, "eval_clones": 2, "eval_episodes": 4}
    second = sdw.distill(data, small_teacher, **{**settings, **evaluated, "steps": 20})
    assert set(second.config["selected"]) == {"by", "score", "clones", "episodes", "seed"}
    assert second.config["selected"]["by"] == "selected by these episodes"
    assert second.config["selected"]["seed"] == SELECTION_SEED
    assert second.config["iteration"] in (15, 20)
    metrics = read_metrics(tmp_path)
    assert [m["step"] for m in metrics if "score" in m] == [15, 20]
    assert metrics[-1]["held_out_loss"] > 0  # told all the same
