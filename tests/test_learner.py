"""medium-replay: all that a learner saw, in order, until a return; the same bits again, stopped in between or not."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest
import torch

from sdw_fast import learner, suite
from sdw_fast.disk import locked
from sdw_fast.environments import make_env
from sdw_fast.readers import load_dataset
from sdw_fast.suite import Snapshots, collect

NAME = "hopper/medium-replay"
STEPS = 40


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the dataset of Hopper appears; 25 random steps, checkpoints every 12, looks every 15."""
    pytest.importorskip("torchrl")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(learner, "RANDOM_STEPS", 25)
    monkeypatch.setattr(learner, "CHECKPOINT_EVERY", 12)
    monkeypatch.setattr(learner, "LOOK_EVERY", 15)
    monkeypatch.setattr(learner, "EPISODES", 1)
    monkeypatch.setattr(learner, "BATCH_SIZE", 16)
    return tmp_path / "sdw" / "hopper"


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Has something happen as a step begins."""
    plain = learner._step

    def happen(number: int, event: Callable[[], None]) -> None:
        def eventful(envs: Any, sac: Any, history: learner.History) -> None:
            if len(history) + 1 == number:
                event()
            plain(envs, sac, history)

        monkeypatch.setattr(learner, "_step", eventful)

    return happen


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def quick(steps: int | None = STEPS, **options: Any) -> str:
    return collect(NAME, steps=steps, progress=False, **options)


def contents(folder: Path) -> bytes:
    return (folder / "medium-replay-v0/data/main_data.hdf5").read_bytes()


def until(monkeypatch: pytest.MonkeyPatch, medium_return: float) -> None:
    hopper = Snapshots("Hopper-v5", (20_000, 50_000), 70_000, 110_000, medium_return)
    monkeypatch.setitem(suite.SUITE, "hopper", hopper)


def test_same_seed_same_bits_and_another_seed_another(folder: Path) -> None:
    torch.manual_seed(1)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    quick(seed=3)
    first = contents(folder)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    torch.manual_seed(2)
    quick(seed=3, overwrite=True)
    assert contents(folder) == first
    quick(seed=4, overwrite=True)
    assert contents(folder) != first


def test_an_interrupted_learner_goes_on_to_the_same_bits(folder: Path, at) -> None:
    """Ctrl-C is saved where it came, an error leaves the last checkpoint; in both the episode under way goes on."""
    quick()
    whole, metadata = contents(folder), minari.load_dataset(f"sdw/{NAME}-v0").storage.metadata
    (folder / "medium-replay-v0").rename(folder.parent.parent / "aside")
    at(33, ctrl_c)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 33; the same call goes on to the same result"):
        quick()
    at(38, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quick()
    assert set(os.listdir(folder)) == {"namespace_metadata.json", "medium-replay-v0.checkpoint"}
    at(36, lambda: pytest.fail("a step was taken again"))
    assert quick() == f"sdw/{NAME}-v0"
    assert contents(folder) == whole
    assert minari.load_dataset(f"sdw/{NAME}-v0").storage.metadata["sdw_fast"] == metadata["sdw_fast"]
    assert set(os.listdir(folder)) == {"namespace_metadata.json", "medium-replay-v0"}


def test_ctrl_c_in_the_last_step_leaves_the_dataset(folder: Path, at) -> None:
    at(5, ctrl_c)
    with pytest.raises(KeyboardInterrupt, match="stopped after the last step; the dataset is there"):
        quick(5)
    assert set(os.listdir(folder)) == {"namespace_metadata.json", "medium-replay-v0"}
    assert len(load_dataset(NAME)) == 5


def test_a_dataset_that_cannot_be_written_leaves_the_learner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(suite, "reserve", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quick(5)
    monkeypatch.setattr(learner, "_step", lambda *_: pytest.fail("a step was taken again"))
    quick(5)
    assert len(load_dataset(NAME)) == 5


def test_a_checkpoint_alone_is_no_dataset(folder: Path, at) -> None:
    at(3, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        quick()
    assert os.listdir(folder) == ["medium-replay-v0.checkpoint"]
    assert minari.list_local_datasets() == {}
    with pytest.raises(ValueError, match=r"seed differ. .* delete the checkpoint to start anew"):
        quick(seed=1)
    with pytest.raises(ValueError, match=r"steps, until_return differ"):
        quick(None)
    with locked(folder / "medium-replay-v0.checkpoint"), pytest.raises(BlockingIOError, match="is in use by process"):
        quick()


def test_an_environment_that_acts_otherwise_is_noticed(folder: Path, at, monkeypatch: pytest.MonkeyPatch) -> None:
    at(3, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        quick()
    monkeypatch.setattr(learner, "episode_seed", lambda *numbers: 7)
    with pytest.raises(ValueError, match="Hopper-v5 does not repeat the episode under way in the checkpoint"):
        quick()


def test_ends_where_the_mean_action_reaches_the_level(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    until(monkeypatch, -1e9)
    quick(None)
    assert len(load_dataset(NAME)) == 15  # the first look
    origin = minari.load_dataset(f"sdw/{NAME}-v0").storage.metadata["sdw_fast"]
    own = {"env": "hopper", "quality": "medium-replay", "steps": None, "seed": 0}
    assert origin["recipe"] == {**own, "learner": "sac", "until_return": -1e9}
    assert [step for step, _ in origin["returns"]] == [15]
    assert {"torchrl", "tensordict", "torch", "mujoco"} < set(origin["versions"])
    assert quick(None) == f"sdw/{NAME}-v0"  # there already
    means = iter([1.0, 2.0, 99.0])
    monkeypatch.setattr(learner, "evaluate", lambda *_, **__: type("Evaluation", (), {"mean": next(means)}))
    until(monkeypatch, 2.0)
    with pytest.raises(FileExistsError, match=r"'until_return': -1000000000.0.*not .*'until_return': 2.0"):
        quick(None)
    quick(None, overwrite=True)
    assert len(load_dataset(NAME)) == 30


def test_a_learner_that_does_not_get_there_is_given_up(
    folder: Path, at: Callable[[int, Callable[[], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = learner._step
    at(31, lambda: pytest.fail("it goes on, for ever"))
    monkeypatch.setitem(suite.SUITE, "hopper", Snapshots("Hopper-v5", (1, 2), 3, 110_000, 1e9))
    for _ in range(2):  # the same call again finds the same
        with pytest.raises(RuntimeError, match=r"after 30 steps .* best return is \d+, .* reach 1000000000: del"):
            quick(None)
    assert [path.name for path in folder.iterdir() if "lock" not in path.name] == ["medium-replay-v0.checkpoint"]
    (folder / "medium-replay-v0.checkpoint").unlink()
    monkeypatch.setattr(learner, "_step", step)
    quick()
    assert len(load_dataset(NAME)) == STEPS


def test_the_dataset_is_the_history_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each episode replays from its seed, random actions come first, and what the learner drew from is what is kept."""
    seen: list[tuple[np.ndarray, ...]] = []
    plain = learner.History.append

    def noted(self: learner.History, *transition: Any) -> None:
        seen.append(transition)
        plain(self, *transition)

    monkeypatch.setattr(learner.History, "append", noted)
    monkeypatch.setattr(learner, "ROWS", 16)  # the arrays grow
    dataset = minari.load_dataset(quick())
    assert dataset.total_steps == STEPS == len(seen)
    env = make_env("Hopper-v5")
    seeds = [m["seed"] for m in dataset.storage.get_episode_metadata(dataset.episode_indices)]
    assert len(set(seeds)) == len(seeds) > 1
    step = 0
    for seed, episode in zip(seeds, dataset, strict=True):
        np.testing.assert_array_equal(episode.observations[0], env.reset(seed=seed)[0])
        for t, action in enumerate(episode.actions):
            following, reward, terminated, truncated, _ = env.step(action)
            last = step == STEPS - 1
            expected = (episode.observations[t], action, following, reward, terminated, truncated)
            for own, value in zip(seen[step], expected, strict=True):
                np.testing.assert_array_equal(own, value)
            np.testing.assert_array_equal(episode.observations[t + 1], following)
            assert (episode.rewards[t], episode.terminations[t]) == (reward, terminated)
            assert episode.truncations[t] == (truncated or (last and not terminated))
            step += 1
    data = load_dataset(NAME)
    assert len(data) == STEPS
    np.testing.assert_array_equal(data.actions, [action for _, action, *_ in seen])


def test_the_learner_learns_from_the_end_of_the_random_steps_on() -> None:
    """Every part moves: policy, critics, their targets and the temperature."""
    torch.manual_seed(0)
    sac, history = learner.Sac(2, 1), learner.History.empty(2, 1)
    before = {name: value.clone() for name, value in sac.loss.state_dict().items() if value.is_floating_point()}
    policy = sac.policy(torch.ones(1, 2)).item()
    for reward in range(8):
        history.append(np.ones(2), np.zeros(1), np.ones(2), float(reward), False, reward == 7)
    sac.update(history.batch())
    same = [name for name, value in sac.loss.state_dict().items() if name in before and value.equal(before[name])]
    assert not [name for name in same if "_params" in name or name == "log_alpha"]
    assert any(name.startswith("target_qvalue_network_params") for name in before)
    assert sac.policy(torch.ones(1, 2)).item() != policy


def test_a_mixture_of_an_earlier_version_is_not_taken_for_a_history(folder: Path) -> None:
    collect("hopper/mixture", steps=10, progress=False)
    (folder / "mixture-v0").rename(folder / "medium-replay-v0")
    metadata = folder / "medium-replay-v0/data/metadata.json"
    values = json.loads(metadata.read_text())
    values["sdw_fast"]["recipe"]["quality"] = "medium-replay"
    metadata.write_text(json.dumps(values))
    with pytest.raises(FileExistsError, match=r"policies_trained_steps.*medium-replay is now the mixture.*--overwrite"):
        quick()
    quick(5, overwrite=True)
    assert len(load_dataset(NAME)) == 5


def test_without_torchrl_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchrl.objectives", None)
    with pytest.raises(ImportError, match=r'medium-replay needs torchrl: pip install "sdw_fast\[teacher\]"'):
        quick()
    assert not folder.exists()
