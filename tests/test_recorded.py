"""What a dataset recorded of its environment: kept as data, recreated here, and told where it cannot be."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import ClipAction, FlattenObservation, RescaleAction, TimeLimit
from toys import one, registered, units  # noqa: F401

import sdw_fast as sdw
from sdw_fast.environments import make_env, recorded, specification
from sdw_fast.units import Units


class Doubled(gym.RewardWrapper):
    """A wrapper of the user's that does not record its arguments."""

    def reward(self, reward: Any) -> float:
        return 2 * float(reward)


def units_of(env: gym.Env, **changes: Any) -> Units:
    """Units that name an environment as a dataset that was recorded in it."""
    return units(env_id=env.spec.id, env_spec=specification(env.spec), **changes)


def run_once(env: Any) -> tuple[float, int]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(no time limit|without its wrapper)")
        result = sdw.evaluate(one, env, episodes=1)
    return result.returns[0], result.lengths[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: gym.make("Steps-v0"),
        lambda: gym.make("Steps-v0", bonus=7.0),
        lambda: gym.make("Steps-v0", max_episode_steps=2),
        lambda: TimeLimit(gym.make("Steps-v0", length=None), 7),
        lambda: RescaleAction(gym.make("Steps-v0"), -1.0, 1.0),
        lambda: RescaleAction(gym.make("Steps-v0"), np.float32(-1), np.array([1], np.float32)),
        lambda: ClipAction(RescaleAction(gym.make("Steps-v0", bonus=1.0), -3.0, 3.0)),
        lambda: FlattenObservation(gym.make("Steps-v0")),
    ],
)
def test_the_recorded_environment_is_recreated(make: Any) -> None:
    env = make()
    text = specification(env.spec)
    assert 'entry_point": null' in text
    back = recorded(Units.from_dict(json.loads(json.dumps(units_of(env).to_dict()))))
    assert make_env(back).action_space == env.action_space
    assert run_once(back) == run_once(env)


def test_a_wrapper_that_is_not_in_the_record_is_told() -> None:
    env = Doubled(gym.make("Steps-v0", length=3))
    with pytest.warns(UserWarning, match=r"Steps-v0, is used without its wrapper Doubled \(its arguments are not"):
        back = recorded(units_of(env))
    assert run_once(back) == (9, 3)
    env = gym.wrappers.NormalizeObservation(gym.make("Steps-v0"))
    with pytest.warns(UserWarning, match=r"without its wrapper NormalizeObservation \(the statistics"):
        recorded(units_of(env))


@pytest.mark.filterwarnings("error")
def test_what_only_watches_is_left_out() -> None:
    env = gym.make("Steps-v0", length=3)
    spec = dataclasses.replace(env.spec, kwargs={**env.spec.kwargs, "render_mode": "human"})
    spec.additional_wrappers += (gym.wrappers.RecordVideo.wrapper_spec(video_folder="/nowhere"),)
    back = recorded(units(env_id="Steps-v0", env_spec=specification(spec)))
    assert (back.kwargs, back.additional_wrappers) == ({"length": 3}, ())


def test_arguments_that_make_no_environment_here_are_told() -> None:
    spec = dataclasses.replace(gym.spec("Steps-v0"), kwargs={"speed": 3})
    with pytest.warns(UserWarning, match=r"cannot be made here, and the one registered as Steps-v0 is used .*speed"):
        assert run_once(recorded(units(env_id="Steps-v0", env_spec=specification(spec)))) == (14, 4)


def test_arguments_that_are_no_json_are_told() -> None:
    with pytest.warns(UserWarning, match="environment Steps-v0 cannot be kept .*float32.* is neither number nor"):
        assert specification(gym.make("Steps-v0", bonus=np.float32).spec) is None


def test_a_record_of_any_version_of_gymnasium_is_read() -> None:
    """Keys that came and went; modules of wrappers that were renamed."""
    old = json.loads(specification(RescaleAction(gym.make("Steps-v0", bonus=1.0), -1.0, 1.0).spec))
    old |= {"apply_api_compatibility": False, "autoreset": False, "entry_point": "gymnasium.envs.old:Steps"}
    del old["disable_env_checker"], old["vector_entry_point"]
    old["additional_wrappers"][0]["entry_point"] = "gymnasium.wrappers.rescale_action:RescaleAction"
    back = recorded(units(env_id="Steps-v0", env_spec=specification(json.dumps(old))))
    assert run_once(back) == (4 * 2 + 10 + 4, 4)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"id": 3}', '{"id": "A-v0", "additional_wrappers": [3]}'])
def test_a_damaged_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="specification of the environment is damaged"):
        specification(text)


@pytest.mark.parametrize(
    "entry_point",
    [
        "os:system",
        "subprocess:Popen",
        "sdw_never_imported:Wrapper",
        "gymnasium.wrappers:gym",
        "gymnasium:make",
        "json",
        "",
    ],
)
def test_a_record_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry_point: str) -> None:
    (tmp_path / "sdw_never_imported.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    values = json.loads(specification(gym.make("Steps-v0").spec))
    values["entry_point"] = "sdw_never_imported:Steps"
    values["additional_wrappers"] = [{"name": "W", "entry_point": entry_point, "kwargs": {"args": ["false"]}}]
    with pytest.warns(UserWarning, match="is no wrapper of Gymnasium's or of a module imported here"):
        back = recorded(units(env_id="Steps-v0", env_spec=json.dumps(values)))
    assert run_once(back) == (14, 4)
    values |= {"id": "Unknown-v0", "additional_wrappers": []}
    with pytest.raises(ValueError, match="no environment 'Unknown-v0' here, because no imported package"):
        recorded(units(env_id="Unknown-v0", env_spec=json.dumps(values)))
