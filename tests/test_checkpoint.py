"""What a run goes on from: the same bits wherever it was cut, and a sentence for every state that is not its own."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast import selection
from sdw_fast.evaluation import Evaluation
from sdw_fast.files import write_torch
from sdw_fast.folder import RunFolder, load_checkpoint, read_metrics
from sdw_fast.run import new_distiller
from sdw_fast.synthetic import real_pairs
from sdw_fast.units import Affine

TINY = {"size": 12, "hidden": (16, 16), "inner_steps": 5, "batch_size": 64, "steps": 20, "checkpoint_every": 7}


def make(data, teacher, n_runs=None, **settings: Any) -> sdw.Distiller:
    return new_distiller(data, teacher, sdw.DistillConfig(**{**TINY, **settings}), n_runs=n_runs)


class Stopped(Exception):
    pass


def stop_at(step: int) -> Callable[[sdw.Distiller, dict], None]:
    """A callback that ends the run after a step, without a word to the folder, as a kill would."""

    def callback(distiller: sdw.Distiller, metrics: dict) -> None:
        if distiller.iteration == step:
            raise Stopped

    return callback


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_runs", [None, 1, 2])
@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd", "lr": 0.3, "average": 0.0}], ids=str)
def test_a_state_goes_on_to_the_same_bits(small_data, small_teacher, n_runs, settings: dict) -> None:
    """From a file, in another object, twice: nobody's later steps change the state."""
    cut = int(np.random.default_rng().integers(1, 12))
    whole = make(small_data, small_teacher, n_runs, **settings)
    for _ in range(cut):
        whole.step()
    state, file = whole.state_dict(), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    later = [whole.step() for _ in range(4)]
    for given in (torch.load(file, weights_only=True), state, state):
        parts = make(small_data, small_teacher, n_runs, **settings)
        parts.step()
        parts.load_state_dict(given)
        assert parts.iteration == cut
        np.testing.assert_equal([parts.step() for _ in range(4)], later, err_msg=f"cut after step {cut}")
        assert all(a == b for a, b in zip(parts.sets, whole.sets, strict=True)), cut


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, float]]:
    """Evaluations are numbers made of the set's bits, in an environment nobody needs; (step, seed, score) of each."""
    given: list[tuple[int, int, float]] = []

    def evaluate(
        synthetic: sdw.SyntheticDataset, env: None, *, clones: int, episodes: int, seed: int, ranks: None
    ) -> Evaluation:
        score = 1e4 * float(synthetic.observations.sum()) % 100
        given.append((synthetic.config["iteration"], seed, score))
        return Evaluation("Any-v0", seed, np.full(episodes, score), np.ones(episodes, np.int64), None)

    monkeypatch.setattr("sdw_fast.environments.check_environment", lambda units, env: env)
    monkeypatch.setattr(selection, "evaluate_synthetic", evaluate)
    return given


@pytest.mark.parametrize("n_runs", [None, 2])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("eval_every", [0, 3])
def test_a_run_cut_anywhere_goes_on_to_the_same_bits(
    small_data, small_teacher, tmp_path, scores, n_runs, optimizer: str, eval_every: int
) -> None:
    data = dataclasses.replace(small_data, units=dataclasses.replace(small_data.units, env_id="Any-v0"))
    settings = {**TINY, "optimizer": optimizer, "eval_every": eval_every, "n_runs": n_runs, "progress": False}
    cuts = sorted(int(step) for step in np.random.default_rng().choice(np.arange(1, 20), 3, replace=False))
    whole = sdw.distill(data, small_teacher, **settings, out=tmp_path / "whole")
    expected, scores[:] = list(scores), []
    for cut in cuts:
        with pytest.raises(Stopped):
            sdw.distill(data, small_teacher, **settings, out=tmp_path / "parts", callback=stop_at(cut))
    parts = sdw.distill(data, small_teacher, **settings, out=tmp_path / "parts")
    assert {score[:2]: score for score in scores} == {score[:2]: score for score in expected}, cuts
    for one, other in zip([whole] if n_runs is None else whole, [parts] if n_runs is None else parts, strict=True):
        assert one == other, cuts
    folders = [Path(".")] if n_runs is None else [Path("run-000"), Path("run-001")]
    for folder, name in itertools.product(folders, ("best.npz", "last.npz")):
        first, second = (sdw.SyntheticDataset.load(tmp_path / run / folder / name) for run in ("whole", "parts"))
        assert first == second, cuts
        assert first.config == second.config
    for folder in folders:
        first, second = ([{**m, "seconds": 0} for m in read_metrics(tmp_path / r / folder)] for r in ("whole", "parts"))
        assert first == second
        assert [m["step"] for m in first] == list(range(1, 21))


def test_a_run_with_more_steps_goes_on(small_data, small_teacher, tmp_path) -> None:
    """With a constant step size the number of steps is open; on a cosine it is not."""
    settings = {**TINY, "schedule": "constant", "progress": False}
    whole = sdw.distill(small_data, small_teacher, **settings)
    sdw.distill(small_data, small_teacher, **{**settings, "steps": 13}, out=tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint")["distiller"]["iteration"] == 13
    assert sdw.distill(small_data, small_teacher, **settings, out=tmp_path) == whole
    cosine = make(small_data, small_teacher)
    with pytest.raises(ValueError, match=r"other settings of \['steps'\]; schedule=.constant. leaves"):
        make(small_data, small_teacher, steps=21).load_state_dict(cosine.state_dict())


# --- whose state it is ------------------------------------------------------------------------------------------------


def other_problem(data: sdw.TransitionDataset, teacher: sdw.Teacher, part: str) -> sdw.OuterProblem:
    """A problem that differs in one part from that of objective "av-pbc"."""
    actor, critic, units = teacher.actor, teacher.critic, data.units
    if part == "observations":
        observations = data.observations.copy()
        observations[7, 3] += 1e-3  # neither actor nor critic looks there
        data = dataclasses.replace(data, observations=observations)
    elif part == "targets":
        teacher = sdw.Teacher(lambda states: actor(states).roll(1, dims=1), critic)
    elif part == "weights":
        teacher = sdw.Teacher(actor, lambda states, actions: critic(states, actions) ** 2)
    elif part == "bounds":
        units = dataclasses.replace(units, actions=Affine.between([-1, -1, -1], [1, 1, 2]))
    elif part == "env_id":
        units = dataclasses.replace(units, env_id="Hopper-v5")
    elif part == "returns":
        units = dataclasses.replace(units, returns=Affine.scores(0, 1))
    data = dataclasses.replace(data, units=units)
    return sdw.outer_problem(data, teacher, sdw.DistillConfig(objective="av-pbc"))


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("observations", "observations"),
        ("targets", "targets"),
        ("weights", "weights"),
        ("bounds", "targets, units"),
        ("env_id", "units"),
        ("returns", "units"),
    ],
)
def test_a_state_of_another_problem_is_refused(small_data, small_teacher, part: str, named: str) -> None:
    config = sdw.DistillConfig(**{**TINY, "objective": "av-pbc"})
    own = new_distiller(small_data, small_teacher, config)
    before, problem = own.synthetic, other_problem(small_data, small_teacher, part)
    start = dataclasses.replace(before, units=problem.units)
    with pytest.raises(ValueError, match=rf"belongs to another problem: its {named} differ\. "):
        own.load_state_dict(sdw.Distiller(problem, start, config).state_dict())
    assert own.synthetic == before


def test_a_state_goes_on_with_what_does_not_matter(small_data, small_teacher) -> None:
    """Rewards that an objective does not read, the name of the data: the problem is the same."""
    state = make(small_data, small_teacher).state_dict()
    renamed = dataclasses.replace(small_data, rewards=small_data.rewards + 1, name="renamed")
    make(renamed, small_teacher).load_state_dict(state)


OTHER: dict[str, Any] = {
    "objective": "av-pbc", "value_weights": "paper", "beta": 0.04, "density": True, "density_method": "flow", "k": 11,
    "tau": 0.1, "ess": 0.9, "clip": 0.8, "state_noise": 0.5, "size": 13, "init": "kmeans++", "hidden": (16, 8),
    "inner_width": 8, "gain": 1.3, "fixed_initialization": 3, "inner_steps": 6, "inner_lr": 0.2, "inner_momentum": 0.5,
    "adapt_inner_lr": False, "window": 2,
    "precision": "ieee", "steps": 21, "batch_size": 65, "initializations": 2, "optimizer": "sgd", "lr": 0.02,
    "schedule": "constant", "momentum": 0.5, "average": 0.5, "clip_norm": 1e-3, "select": "last", "seed": 1,
}  # fmt: skip
FREE = {"tape": "recompute", "eval_every": 5, "eval_clones": 1, "eval_episodes": 11, "checkpoint_every": 3}


def test_every_setting_is_refused_or_free() -> None:
    assert OTHER.keys() | FREE == {field.name for field in dataclasses.fields(sdw.DistillConfig)}


@pytest.mark.parametrize("name", OTHER)
def test_a_state_of_other_settings_is_refused(small_data, small_teacher, name: str) -> None:
    own = make(small_data, small_teacher)
    state = own.state_dict()
    other = {**state["config"], name: OTHER[name]}
    with pytest.raises(ValueError, match=rf"made with other settings of \['{name}'\]"):
        own.load_state_dict({**state, "config": other})


def test_settings_that_change_no_step_are_free(small_data, small_teacher) -> None:
    whole, parts = make(small_data, small_teacher), make(small_data, small_teacher, **FREE)
    whole.step()
    parts.load_state_dict(whole.state_dict())
    assert whole.step() == parts.step()
    assert whole.synthetic == parts.synthetic


def test_a_state_of_another_device_number_of_runs_or_version_is_refused(small_data, small_teacher) -> None:
    own, two = make(small_data, small_teacher), make(small_data, small_teacher, n_runs=2)
    state = own.state_dict()
    with pytest.raises(ValueError, match=r"other settings of \['device'\]"):
        own.load_state_dict({**state, "device": "cuda"})
    with pytest.raises(ValueError, match=r"other settings of \['n_runs'\]"):
        own.load_state_dict(two.state_dict())
    with pytest.raises(ValueError, match=r"written by sdw_fast 0\.0\.7, and this is .*: finish that run with"):
        own.load_state_dict({**state, "version": "0.0.7"})
    old = {name: copy.copy(state[name]) for name in ("iteration", "observations", "actions", "optimizer", "config")}
    with pytest.raises(ValueError, match="sdw_fast of an unknown version, and this is"):
        own.load_state_dict({**old, "generator": state["generators"][0], "dataset_hash": small_data.content_hash})


def test_a_folder_of_another_run_is_refused(small_data, small_teacher, tmp_path) -> None:
    settings = {**TINY, "out": tmp_path, "progress": False}
    sdw.distill(small_data, small_teacher, **settings)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")}
    with pytest.raises(ValueError, match="another problem: its observations, targets, weights differ"):
        sdw.distill(small_data.subset(np.arange(300)), small_teacher, **settings)
    with pytest.raises(ValueError, match="inner_lr"):
        sdw.distill(small_data, small_teacher, **settings, inner_lr=0.05)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")} == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "old", "other"])
def test_a_checkpoint_that_is_damaged_or_old_is_an_error(small_data, small_teacher, tmp_path, damage: str) -> None:
    settings = {**TINY, "out": tmp_path, "progress": False}
    sdw.distill(small_data, small_teacher, **settings)
    path = tmp_path / "checkpoint"
    if damage in ("truncated", "empty"):
        path.write_bytes(path.read_bytes()[: 100 if damage == "truncated" else 0])
        message = "not a readable checkpoint"
    else:
        state = load_checkpoint(path)["distiller"]
        old = {**state, "generator": state["generators"][0], "best_returns": [1.0]}
        write_torch(path, old if damage == "old" else [1, 2])
        message = "it is not one of this version of sdw_fast .*finish that run with the version it was started with"
    with pytest.raises(ValueError, match=message):
        sdw.distill(small_data, small_teacher, **settings)


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_threads() -> Iterator[None]:
    before = sdw.get_num_threads()
    sdw.set_num_threads(before + 1)
    yield
    sdw.set_num_threads(before)


def nudged(teacher: sdw.Teacher, by: float) -> sdw.Teacher:
    """A teacher whose every number is off by a share, as another thread count or instruction set makes it."""
    critic = teacher.critic
    return sdw.Teacher(lambda s: teacher.actor(s) * (1 + by), lambda s, a: critic(s, a) * (1 + by))


def test_other_rounding_is_said_in_one_line_and_recorded(small_data, small_teacher, tmp_path, request) -> None:
    settings = {**TINY, "objective": "av-pbc", "out": tmp_path, "progress": False}
    with pytest.raises(Stopped):
        sdw.distill(small_data, small_teacher, **settings, callback=stop_at(8))
    before = sdw.get_num_threads()
    request.getfixturevalue("other_threads")
    line = rf"goes on from step 7 with other rounding \(threads {before} -> {before + 1}\)"
    with pytest.warns(UserWarning, match=line) as said:
        sdw.distill(small_data, nudged(small_teacher, 1e-6), **settings)
    assert len(said) == 1
    recorded = [{"from_step": 7, "threads": [before, before + 1]}]
    assert json.loads((tmp_path / "config.json").read_text())["rounding"] == recorded
    assert load_checkpoint(tmp_path / "checkpoint")["distiller"]["rounding"] == recorded


def test_more_than_rounding_is_another_problem(small_data, small_teacher, request) -> None:
    config = sdw.DistillConfig(**{**TINY, "objective": "av-pbc"})
    state = new_distiller(small_data, small_teacher, config).state_dict()
    with pytest.raises(ValueError, match=r"its targets, weights differ"):  # nothing is different here that would round
        new_distiller(small_data, nudged(small_teacher, 1e-6), config).load_state_dict(state)
    request.getfixturevalue("other_threads")
    with pytest.raises(ValueError, match=r"its targets, weights differ"):
        new_distiller(small_data, nudged(small_teacher, 1e-3), config).load_state_dict(state)
    changed = dataclasses.replace(small_data, observations=small_data.observations * np.float32(1 + 1e-6))
    with pytest.raises(ValueError, match=r"its observations differ"):  # the dataset's own are never rounded
        new_distiller(changed, small_teacher, config).load_state_dict(state)


# --- contents that no step leaves ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"iteration": -(10**9)},
        {"iteration": 2.5},
        {"observations": torch.zeros(1)},
        {"actions": torch.full((1, 12, 3), torch.nan)},
        {"averages": [torch.zeros(1), torch.zeros(1)]},
        {"generators": []},
        {"generators": [torch.zeros(3, dtype=torch.uint8)]},
        {"optimizer": {}},
        {"arithmetic": None},
        {"inner_lr": [0.2]},
        {"inner_lr": [float("nan")]},
        {"inner_lr": []},
        {"rough": torch.zeros(3, 2, dtype=torch.bool)},
        {"rough": None},
    ],
    ids=str,
)
def test_a_state_of_impossible_content_is_refused(small_data, small_teacher, tmp_path, changes: dict) -> None:
    own = make(small_data, small_teacher)
    with pytest.raises(ValueError, match="damaged"):
        own.load_state_dict({**own.state_dict(), **changes})


# --- what is derived from it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_runs", [None, 2])
def test_sets_are_written_anew_from_the_checkpoint(small_data, small_teacher, tmp_path, scores, n_runs) -> None:
    """A kill between the last checkpoint and last.npz; a deleted file; one of a later step than the checkpoint's."""
    data = dataclasses.replace(small_data, units=dataclasses.replace(small_data.units, env_id="Any-v0"))
    settings = {**TINY, "eval_every": 3, "n_runs": n_runs, "out": tmp_path, "progress": False}
    returned = sdw.distill(data, small_teacher, **settings)
    files = sorted([*tmp_path.rglob("last.npz"), *tmp_path.rglob("best.npz")])
    assert len(files) == 2 * (n_runs or 1)
    before = {path: path.read_bytes() for path in files}
    for path in files[: len(files) // 2]:
        path.unlink()
    for path in files[len(files) // 2 :]:
        real_pairs(data, 12).save(path)
    again = sdw.distill(data, small_teacher, **settings)
    assert {path: path.read_bytes() for path in files} == before
    for one, other in zip(
        [returned] if n_runs is None else returned, [again] if n_runs is None else again, strict=True
    ):
        assert one == other


def test_a_run_killed_between_checkpoint_and_set_writes_it_on_the_next_start(
    small_data, small_teacher, tmp_path, monkeypatch
) -> None:
    settings = {**TINY, "select": "last", "out": tmp_path, "progress": False}
    whole = sdw.distill(small_data, small_teacher, **TINY, select="last", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(sdw.SyntheticDataset, "save", lambda *_: 1 / 0)
        for _ in range(3):  # at steps 7, 14, 20
            with pytest.raises(ZeroDivisionError):
                sdw.distill(small_data, small_teacher, **settings)
            patch.setattr(RunFolder, "_write_sets", lambda *_: None)
    assert load_checkpoint(tmp_path / "checkpoint")["distiller"]["iteration"] == 20
    assert not list(tmp_path.glob("[bl]*st.npz"))
    sdw.distill(small_data, small_teacher, **settings)
    assert sdw.SyntheticDataset.load(tmp_path / "last.npz") == whole


def test_two_runs_in_one_folder(small_data, small_teacher, tmp_path) -> None:
    """The second is refused, whatever its seed, and the first goes on undisturbed."""
    settings = {**TINY, "out": tmp_path, "progress": False}

    def intrude(distiller: sdw.Distiller, metrics: dict) -> None:
        if distiller.iteration == 3:
            with pytest.raises(BlockingIOError, match=rf"in use by process {os.getpid()} on .* since"):
                sdw.distill(small_data, small_teacher, **settings, seed=1)

    first = sdw.distill(small_data, small_teacher, **settings, callback=intrude)
    assert first == sdw.distill(small_data, small_teacher, **TINY, progress=False)
