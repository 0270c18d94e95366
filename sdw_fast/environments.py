"""Environments: the ways to name one, those that datasets recorded, what is known of one, and the check before a run.

Imports gymnasium; nothing imports it at start-up.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, WrapperSpec

from sdw_fast.units import Affine, Discrete, Units

# An id ("Hopper-v5"), one whose module is imported first ("module:Env-v0"), a specification, a function without
# arguments that makes a new environment at each call (a class is one), or an environment.
Environment: TypeAlias = str | EnvSpec | Callable[[], gym.Env] | gym.Env

MAX_EPISODE_STEPS = 10_000  # of an environment that sets no time limit of its own

_WATCHING = ("RecordVideo", "HumanRendering", "RenderCollection")  # wrappers that change no episode
_LEARNING = ("NormalizeObservation", "NormalizeReward")  # wrappers whose statistics no specification holds


def make_env(env: Environment) -> gym.Env:
    """Makes an environment; one that is given as an object is returned as it is.

    MuJoCo's notes that Gymnasium's own model files use deprecated attributes are left out: it prints them to standard
    error and to a file in the working directory, and a user can do nothing about them. Its other warnings pass.

    Raises:
        ImportError: a package that the environment needs is not installed.
        ValueError: there is no environment of that id, it cannot be made, or `env` is not one of the ways to name one.
    """
    if isinstance(env, gym.Env):
        return env
    with _without_deprecation_notes():
        if isinstance(env, (str, EnvSpec)):
            return _make(env)
        made = env() if callable(env) else env
    if not isinstance(made, gym.Env):
        got = f"{env!r}" if made is env else f"a function that returns {type(made).__name__}"
        raise ValueError(
            "an environment is given as a Gymnasium id, an EnvSpec, a gymnasium.Env, or a function without arguments "
            f"that makes one, got {got}"
        )
    return made


def name_of(env: gym.Env) -> str:
    """The id that an environment was registered under, or the name of its class."""
    return type(env.unwrapped).__name__ if env.spec is None else env.spec.id


def limited(env: gym.Env) -> gym.Env:
    """An environment whose episodes end: by a time limit of its own, or after 10,000 steps, with a warning."""
    inner: Any = env
    while isinstance(inner, gym.Wrapper) and not isinstance(inner, gym.wrappers.TimeLimit):
        inner = inner.env
    if isinstance(inner, gym.wrappers.TimeLimit):
        return env
    warnings.warn(
        f"{name_of(env)} sets no time limit: episodes are cut after {MAX_EPISODE_STEPS:,} steps. Register it with "
        "max_episode_steps, or wrap it in gymnasium.wrappers.TimeLimit, to choose another",
        stacklevel=1,
    )
    return gym.wrappers.TimeLimit(env, MAX_EPISODE_STEPS)


def check_environment(units: Units, env: Environment | None = None) -> Environment:
    """Checks, before the first step, that policies in these units can act in an environment.

    It exists, its observations are vectors as wide as the units' states, its actions vectors as wide as the units'
    actions, or numbers of classes (Discrete) where the units know no bounds. Warns where the action bounds differ, and
    where it sets no time limit, in which case episodes are cut after 10,000 steps.

    Args:
        units: of the set or the policy.
        env: the environment; None: the one that the units name, see `recorded`.

    Returns:
        The environment, to be made by `make_env`.

    Raises:
        ImportError: a package that the environment needs is not installed.
        ValueError: no environment is known, it cannot be made, or it does not fit.
    """
    env = recorded(units) if env is None else env
    with _borrowed(env) as made:
        check_spaces(made)
        name, space = name_of(made), made.action_space
        mine, own = units.actions, actions_of(made)
        widths = [("observations", units.states, made.observation_space)]
        if isinstance(mine, Affine):
            widths.append(("actions", mine, space))
        for kind, map_, there in widths:
            if there.shape != map_.offset.shape:
                raise ValueError(
                    f"{name} does not fit: its {kind} are {there}, and those of the data vectors of "
                    f"{len(map_.offset)} numbers. Were they recorded in another version of it, or with other arguments "
                    "or wrappers?"
                )
        if isinstance(mine, Discrete) and mine != own:
            raise ValueError(
                f"{name} does not fit: its actions are {space}, and those of the data {mine.n} discrete ones, numbered "
                f"from {mine.start}. Were they recorded in another version of it, or with other arguments or wrappers?"
            )
        _compare_bounds(name, own, mine)
        limited(made)
    return env


def check_spaces(env: gym.Env) -> None:
    """Raises ValueError unless observations are vectors, and actions vectors or numbers of classes."""
    for kind, space in (("observation", env.observation_space), ("action", env.action_space)):
        vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        if not vector and not (kind == "action" and isinstance(space, gym.spaces.Discrete)):
            raise ValueError(
                f"{name_of(env)} has {kind} space {space}; observations must be a one-dimensional Box, and actions "
                "one, or Discrete (gymnasium.wrappers.FlattenObservation makes a vector of a Dict)"
            )


def actions_of(env: gym.Env) -> Affine | Discrete | None:
    """The map of an environment's actions: bounds to −1 and 1, or discrete ones; None where a vector is not bounded.

    ClipAction takes every number, and clips it to the bounds of the environment inside.
    """
    while isinstance(env, gym.Wrapper) and (
        isinstance(env, gym.wrappers.ClipAction) or env.action_space == env.env.action_space
    ):
        env = env.env
    space = env.action_space
    if isinstance(space, gym.spaces.Discrete):
        return Discrete(int(space.n), int(space.start))
    bounded = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.is_bounded()
    return Affine.between(space.low, space.high) if bounded else None  # type: ignore[attr-defined]


def place(units: Units, width: int, env: Environment | None = None) -> Units:
    """Units in their environment: with its id, its specification, and its action bounds where they are known.

    The environment's bounds replace others, with a warning where they differ.

    Args:
        units: the units, whose environment may be known.
        width: of the actions, A, or 0 of discrete ones; bounds of another width are not taken.
        env: the environment, in place of the one that the units name.

    Raises:
        ImportError, ValueError: as `make_env` and `recorded`.
    """
    with _borrowed(recorded(units) if env is None else env) as made:
        if env is not None:
            env_id = env if isinstance(env, str) else made.spec.id if made.spec else None
            env_spec = None if isinstance(env, str) else specification(made.spec)
            returns = units.returns if units.env_id is None else units.returns_in(name_of(made))
            units = dataclasses.replace(units, env_id=env_id, env_spec=env_spec, returns=returns)
        own = actions_of(made)
        if own is None or (isinstance(own, Affine) and own.width != width):
            return units
        _compare_bounds(name_of(made), own, units.actions)
        return dataclasses.replace(units, actions=own)


def specification(spec: EnvSpec | str | None) -> str | None:
    """What is kept of an environment with a dataset: Gymnasium's JSON of its EnvSpec, without the entry points.

    Args:
        spec: the EnvSpec, or JSON of one as any version of Gymnasium wrote it.

    Returns:
        The JSON, or None, with a warning, where an argument cannot be written as JSON.

    Raises:
        ValueError: the JSON is damaged.
    """
    if spec is None:
        return None
    spec = dataclasses.replace(_parse(spec) if isinstance(spec, str) else spec, entry_point=None)
    spec.vector_entry_point = None
    try:
        values = dataclasses.asdict(spec)
        for derived in ("namespace", "name", "version"):
            del values[derived]
        for wrapper in values["additional_wrappers"]:  # Gymnasium's versions have them in modules of different names
            wrapper["entry_point"] = re.sub(r"^gymnasium\.[^:]*", "gymnasium.wrappers", wrapper["entry_point"])
        return json.dumps(values, default=_plain)
    except Exception as error:  # an argument of any type may refuse in its own way
        warnings.warn(
            f"the arguments of the environment {spec.id} cannot be kept with the data ({error}): its id alone is kept",
            stacklevel=1,
        )
        return None


def recorded(units: Units) -> str | EnvSpec:
    """The environment that units name: as it was recorded, with its arguments, wrappers and time limit.

    What a file says of an environment is data and never names code to run. The id must be registered here, and the
    environment is made by the entry point registered for it. A wrapper must be one of Gymnasium's, or a subclass of
    gymnasium.Wrapper in a module that is imported already; those that change no episode (RecordVideo, rendering) are
    left out. A warning tells what else is left out, and where the recorded arguments do not make an environment here:
    then the one registered under the id is used.

    Raises:
        ValueError: the units name no environment, the one named is not registered here, or its record is damaged.
    """
    if units.env_id is None:
        raise ValueError(
            "the dataset names no environment: pass env, such as 'Hopper-v5' (--env at the shell), or set eval_every=0"
        )
    module, _, env_id = units.env_id.rpartition(":")
    if (module and module not in sys.modules) or (units.env_spec and env_id not in gym.registry):
        raise ValueError(
            f"there is no environment {units.env_id!r} here, because no imported package registers it: import that "
            f"package, or name it, env='package:{env_id}' (--env at the shell)"
        )
    if units.env_spec is None:
        return units.env_id
    spec, registered = _parse(units.env_spec), gym.registry[env_id]
    wrappers = [wrapper for wrapper in spec.additional_wrappers if wrapper.name not in _WATCHING]
    obstacles = {wrapper.name: obstacle for wrapper in wrappers if (obstacle := _obstacle(wrapper))}
    if obstacles:
        told = ", ".join(f"{name} ({obstacle})" for name, obstacle in obstacles.items())
        warnings.warn(f"the recorded environment, {env_id}, is used without its wrapper {told}", stacklevel=1)
    spec = dataclasses.replace(
        spec,
        entry_point=registered.entry_point,
        kwargs={name: value for name, value in spec.kwargs.items() if name != "render_mode"},
        additional_wrappers=tuple(wrapper for wrapper in wrappers if wrapper.name not in obstacles),
    )
    try:
        make_env(spec).close()
    except ValueError as error:
        warnings.warn(
            f"the recorded environment cannot be made here, and the one registered as {env_id} is used ({error})",
            stacklevel=1,
        )
        return env_id
    return spec


def _parse(text: str) -> EnvSpec:
    """An EnvSpec of JSON that any version of Gymnasium wrote, without its entry points."""
    try:
        values = json.loads(text)
        fields = {field.name for field in dataclasses.fields(EnvSpec) if field.init} - {"additional_wrappers"}
        known = {name: values[name] for name in fields & set(values)}
        wrappers = tuple(WrapperSpec(**wrapper) for wrapper in values.get("additional_wrappers") or ())
        for wrapper in wrappers:
            arguments = wrapper.kwargs or {}
            for name, value in arguments.items():
                if isinstance(value, list) and all(isinstance(x, float) for x in value):
                    arguments[name] = np.array(value)  # JSON has no arrays
        spec = EnvSpec(**known | {"entry_point": None, "vector_entry_point": None}, additional_wrappers=wrappers)
        if not isinstance(spec.kwargs, dict):
            raise TypeError(f"arguments must be a dict, got {spec.kwargs!r}")
        return spec
    except (TypeError, ValueError, AttributeError, KeyError, gym.error.Error) as error:
        raise ValueError(f"the recorded specification of the environment is damaged: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{value!r} is neither number nor text")


def _obstacle(wrapper: WrapperSpec) -> str | None:
    """Why a recorded wrapper is not applied, or None."""
    if wrapper.name in _LEARNING:
        return "the statistics it had learned are not in the record"
    if wrapper.kwargs is None:
        return "its arguments are not in the record"
    module, _, name = wrapper.entry_point.partition(":")
    kind = vars(sys.modules.get(module, object)).get(name)
    if not (isinstance(kind, type) and issubclass(kind, gym.Wrapper)):
        return f"{wrapper.entry_point} is no wrapper of Gymnasium's or of a module imported here"
    return None


def _compare_bounds(name: str, own: Affine | Discrete | None, stated: Affine | Discrete | None) -> None:
    if not (isinstance(own, Affine) and isinstance(stated, Affine)) or own.width != stated.width:
        return
    (low, high), (stated_low, stated_high) = own.bounds, stated.bounds
    if not np.allclose([low, high], [stated_low, stated_high], rtol=1e-4, atol=1e-6):
        warnings.warn(
            f"{name} takes actions from {low} to {high}, where the data or the policy say {stated_low} to "
            f"{stated_high}: is it the environment they were made for, with its arguments and wrappers?",
            stacklevel=1,
        )


@contextmanager
def _borrowed(env: Environment) -> Iterator[gym.Env]:
    """An environment to look at: closed again, unless it is the caller's object."""
    made = make_env(env)
    try:
        yield made
    finally:
        if made is not env:
            made.close()


def _make(env: str | EnvSpec) -> gym.Env:
    name = env if isinstance(env, str) else env.id
    try:
        return gym.make(env)
    except gym.error.DependencyNotInstalled as error:
        if "mujoco" in str(error).lower():
            raise ImportError(f'{name} needs MuJoCo: pip install "sdw_fast[mujoco]" ({error})') from error
        raise ImportError(f"{name} needs a package that is not installed: {error}") from error
    except (gym.error.Error, ModuleNotFoundError) as error:  # an unknown name or version, a malformed id
        raise ValueError(f"there is no environment {name!r} here: {error}") from error
    except Exception as error:  # arguments that it does not take: each environment raises its own
        raise ValueError(f"the environment {name!r} cannot be made: {error}") from error


@contextmanager
def _without_deprecation_notes() -> Iterator[None]:
    if importlib.util.find_spec("mujoco") is None:
        yield
        return
    import mujoco

    previous = mujoco.get_mju_user_warning()

    def forward(message: str) -> None:
        if "deprecated" not in message:
            (previous or warnings.warn)(message)

    mujoco.set_mju_user_warning(forward)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(previous)
