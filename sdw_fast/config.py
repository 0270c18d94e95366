"""Every setting once: name, type, default and the sentence that explains it, in Python, in config.json and in `--help`.

A setting is a field of a dataclass; the second part of its `Annotated` type is its help. The command line makes its
options from these fields (`sdw_fast.options`), so that a new field is a new option.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Annotated, Any, get_args, get_type_hints

import numpy as np

from sdw_fast.cards import Card, Shown

OBJECTIVES = ("dbc", "pbc", "av-pbc", "sdw")
DENSITY_METHODS = ("knn", "flow")
INITIALIZATIONS = ("random", "kmeans++", "top-q")
VALUE_WEIGHTS = ("shifted", "paper")
OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine")
TAPES = ("full", "recompute")
SELECTIONS = ("held-out", "return", "last")
PRECISIONS = ("tf32", "ieee")
ALGORITHMS = ("td3bc", "iql")


@dataclass(frozen=True, repr=False)
class DistillConfig(Shown):
    """The settings of a distillation. `DistillConfig.preset` gives those that have a name.

    Numbers of NumPy become Python's, which is what files hold.

    Raises:
        TypeError: a value is of another kind than its setting.
        ValueError: a value is out of range; the message says which and what is allowed.
    """

    # the outer problem
    objective: Annotated[str, "dbc, pbc, av-pbc or sdw: targets and weights, see sdw_fast.objectives."] = "sdw"
    value_weights: Annotated[str, "Of av-pbc and sdw: shifted, whatever Q's scale and zero; or paper: beta * Q."] = (
        "shifted"
    )
    beta: Annotated[float | None, "Scale of Q with value_weights=paper; default: 0.02."] = None
    density: Annotated[bool | None, "Weights carry d(s)^(-tau); default: as the objective says."] = None
    density_method: Annotated[str, "Estimator of the density: knn, or flow (the paper's, slower)."] = "knn"
    k: Annotated[int, "Neighbors of the k-NN density."] = 10
    tau: Annotated[float | None, "Exponent of the density; default: set by ess."] = None
    ess: Annotated[float, "Effective sample size of the density weights, a share of the dataset, if tau is none."] = 0.5
    clip: Annotated[float, "Quantile at which the density weights are clipped."] = 0.99
    state_noise: Annotated[
        float,
        "Noise on a second copy of the states, of which the teacher is asked too: its standard deviation, a share of "
        "each dimension's; 0: no copy.",
    ] = 0.0

    # the synthetic set
    size: Annotated[int, "Synthetic pairs, N."] = 256
    init: Annotated[str, "Real pairs to start from: random, kmeans++ or top-q."] = "random"

    # the inner loop: behavior cloning on the synthetic set
    hidden: Annotated[tuple[int, ...], "Hidden widths of the policies cloned on the set."] = (256, 256, 256)
    inner_width: Annotated[int | None, "Hidden widths while distilling are at most this; none: those of hidden."] = 64
    gain: Annotated[float, "Gain of the orthogonal initialization."] = 1.0
    fixed_initialization: Annotated[
        int | None,
        "Seed of the one initialization, inner_width wide, that a set is distilled for and cloned from; none: any.",
    ] = None
    inner_steps: Annotated[int, "Steps of behavior cloning, T."] = 100
    inner_lr: Annotated[float, "Step size of behavior cloning."] = 0.1
    inner_momentum: Annotated[float, "Momentum of behavior cloning; 0 is plain SGD, which wants a larger step."] = 0.9
    adapt_inner_lr: Annotated[bool, "Lower inner_lr where inner training is unstable, see sdw_fast.stability."] = True
    window: Annotated[int | None, "Differentiate the last so many inner steps only; default: all."] = None
    tape: Annotated[str, "full, or recompute: less memory, a third more time, the same bits."] = "full"
    precision: Annotated[str, "Of the products on a GPU: tf32 or ieee (float32)."] = "tf32"

    # the outer loop
    steps: Annotated[int, "Outer steps."] = 5_000
    batch_size: Annotated[int, "States an outer step, for each initialization."] = 2_560
    initializations: Annotated[
        int | None, "Policies an outer step starts from, whose hypergradients are averaged; none: one a process."
    ] = None
    optimizer: Annotated[str, "Outer optimizer: adam or sgd."] = "adam"
    lr: Annotated[float, "Outer step size."] = 0.03
    schedule: Annotated[str, "Of the outer step size: constant, or cosine down to 0."] = "cosine"
    momentum: Annotated[float, "Of the outer SGD; the first decay of Adam."] = 0.9
    average: Annotated[float, "Decay of the moving average that is the synthetic set; 0: the last iterate."] = 0.9
    clip_norm: Annotated[float, "Bound on the norm of the hypergradient; SGD, which it slows down, wants more."] = 0.02

    # the run
    select: Annotated[
        str | None,
        "The set returned: held-out (lowest loss on a tenth of the states, which is not learned from), "
        "return (needs eval_every) or last; default: return with eval_every, else held-out.",
    ] = None
    seed: Annotated[int, "Seed of every random draw."] = 0
    eval_every: Annotated[int, "Outer steps between evaluations in the environment; 0: never."] = 0
    eval_clones: Annotated[int, "Policies cloned for an evaluation, from different initializations."] = 5
    eval_episodes: Annotated[int, "Episodes of an evaluation, in all."] = 10
    checkpoint_every: Annotated[int, "Outer steps between checkpoints, if the run has a folder."] = 100

    def __post_init__(self) -> None:
        _make_plain(self)
        _check_choices(
            self,
            objective=OBJECTIVES,
            density_method=DENSITY_METHODS,
            value_weights=VALUE_WEIGHTS,
            init=INITIALIZATIONS,
            optimizer=OPTIMIZERS,
            schedule=SCHEDULES,
            tape=TAPES,
            precision=PRECISIONS,
        )
        _check_at_least_one(self, "size", "inner_steps", "steps", "batch_size", "eval_clones", "checkpoint_every", "k")
        _check_positive(self, "lr", "inner_lr", "clip_norm", "gain")
        checked_seed("seed", self.seed)
        if self.fixed_initialization is not None:
            checked_seed("fixed_initialization", self.fixed_initialization)
        if self.initializations is not None:
            _check_at_least_one(self, "initializations")
        if self.beta is not None:
            _check_positive(self, "beta")
            if self.value_weights != "paper":
                raise ValueError(f"beta={self.beta} is the scale of value_weights='paper' and means nothing without it")
        if self.tau is not None and not 0 <= self.tau < math.inf:
            raise ValueError(f"tau must be 0 or more and finite, or None to be set by ess, got {self.tau}")
        if not 0 <= self.state_noise < math.inf:
            raise ValueError(f"state_noise must be 0 (none) or more and finite, got {self.state_noise}")
        if self.state_noise and self.objective == "dbc":
            raise ValueError("state_noise asks the teacher about states beside the data's, and objective dbc has none")
        for name in ("ess", "clip"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if self.select is not None and self.select not in SELECTIONS:
            raise ValueError(f"select must be one of {list(SELECTIONS)} or None, got {self.select!r}")
        if self.select == "return" and not self.eval_every:
            raise ValueError("select='return' chooses by evaluations in the environment: set eval_every")
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be 0 (never) or more, got {self.eval_every}")
        if self.eval_episodes < self.eval_clones:
            raise ValueError(f"eval_episodes={self.eval_episodes} must be at least eval_clones={self.eval_clones}")
        for name in ("momentum", "inner_momentum", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.window is not None and not 1 <= self.window <= self.inner_steps:
            raise ValueError(f"window must be between 1 and inner_steps={self.inner_steps}, got {self.window}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden widths must be at least 1, got {self.hidden}")
        if self.inner_width is not None and self.inner_width < 1:
            raise ValueError(f"inner_width must be at least 1, or None for those of hidden, got {self.inner_width}")

    @property
    def unrolled_hidden(self) -> tuple[int, ...]:
        """Hidden widths of the policies that a distillation unrolls."""
        return tuple(min(width, self.inner_width or width) for width in self.hidden)

    @property
    def selected_by(self) -> str:
        """What the returned set is chosen by: held-out, return or last."""
        return self.select or ("return" if self.eval_every else "held-out")

    @classmethod
    def preset(cls, name: str, **settings: Any) -> DistillConfig:
        """The settings that go by a name, with some of them replaced.

        Args:
            name: "default": those of this class, two minutes of one core for 2,000 steps.
                "published": one setting whose policies pass all six numbers published for SDW (docs/results.md); four
                to nine minutes a set.
                "paper": those of the papers' public code: 50,000 outer steps of SGD at 0.1 with momentum 0.9 on
                256-unit policies; hours.
            **settings: Fields to replace.

        Raises:
            ValueError: there is no such preset or setting.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {list(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], **settings})

    def unused(self) -> dict[str, str]:
        """The settings that have no effect beside the others, and why."""
        weighted = self.objective == "sdw" if self.density is None else self.density
        reasons: dict[str, str] = {}
        if not weighted:
            names = ("density_method", "k", "tau", "ess", "clip")
            reasons |= dict.fromkeys(names, f"objective {self.objective} has no density weights here")
        elif self.density_method == "flow":
            reasons["k"] = "density_method flow has no neighbors"
        if self.tau is not None:
            reasons.setdefault("ess", "tau is given, which it would set")
        if self.objective in ("dbc", "pbc"):
            reasons |= dict.fromkeys(("value_weights", "beta"), f"objective {self.objective} has no value weights")
        if not self.eval_every:
            reasons |= dict.fromkeys(("eval_clones", "eval_episodes"), "eval_every is 0, never")
        elif self.fixed_initialization is not None:
            reasons["eval_clones"] = "a set for one initialization gives one policy"
        return reasons

    def card(self) -> Card:
        """The settings that are not the defaults; `to_dict` gives all."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        return Card("DistillConfig", {name: _word(getattr(self, name)) for name in changed})

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {**asdict(self), "hidden": list(self.hidden)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DistillConfig:
        """Inverse of `to_dict`. Raises ValueError for a name that is not a setting."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown settings {unknown}; the settings are {sorted(known)}")
        return cls(**values)


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "published": {"value_weights": "paper", "inner_width": 128, "k": 100, "clip": 0.9, "ess": 0.95, "select": "last"},
    "paper": {
        "value_weights": "paper",
        "inner_width": None,
        "adapt_inner_lr": False,
        "gain": math.sqrt(2),
        "inner_momentum": 0.0,
        "steps": 50_000,
        "optimizer": "sgd",
        "lr": 0.1,
        "schedule": "constant",
        "average": 0.0,
        "clip_norm": 2.0,
    },
}


@dataclass(frozen=True)
class TeacherConfig:
    """The settings of a teacher's training.

    Raises:
        TypeError: a value is of another kind than its setting.
        ValueError: a value is out of range.
    """

    algorithm: Annotated[str, "td3bc (Fujimoto and Gu 2021) or iql (Kostrikov et al. 2022)."] = "td3bc"
    steps: Annotated[int, "Gradient steps of the critics."] = 100_000
    alpha: Annotated[float, "td3bc: weight of Q against cloning; larger trusts the critics more."] = 2.5
    expectile: Annotated[float, "iql: the expectile of V, in [0.5, 1); larger is more optimistic."] = 0.7
    temperature: Annotated[float, "iql: inverse temperature of the advantage weights."] = 3.0
    seed: Annotated[int, "Seed of every random draw."] = 0

    def unused(self) -> dict[str, str]:
        """The settings that have no effect beside the others, and why."""
        names = ("alpha",) if self.algorithm == "iql" else ("expectile", "temperature")
        return dict.fromkeys(names, f"algorithm {self.algorithm} has none")

    def __post_init__(self) -> None:
        _make_plain(self)
        checked_seed("seed", self.seed)
        _check_choices(self, algorithm=ALGORITHMS)
        _check_at_least_one(self, "steps")
        _check_positive(self, "alpha", "temperature")
        if not 0.5 <= self.expectile < 1:
            raise ValueError(f"expectile must be in [0.5, 1), got {self.expectile}")


def checked_integer(name: str, value: Any) -> int:
    """A Python integer of what is one, NumPy's included. Raises TypeError of anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def checked_seed(name: str, value: Any) -> int:
    """The same of a seed. Raises ValueError outside of 0 … 2^63 − 1."""
    seed = checked_integer(name, value)
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"{name} must be between 0 and 2**63 - 1, got {value}")
    return seed


@functools.cache
def _kinds(config: type) -> dict[str, Any]:
    """What the settings of a class are declared as."""
    return get_type_hints(config)


def _make_plain(config: Any) -> None:
    """Makes every value what its setting is declared as. A JSON file would refuse NumPy's at the end of a run."""
    for name, kind in _kinds(config.__class__).items():
        object.__setattr__(config, name, _plain(name, kind, getattr(config, name)))


def _plain(name: str, kind: Any, value: Any) -> Any:
    types = get_args(kind) or (kind,)
    if value is None and type(None) in types:
        return None
    if ... in types:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise TypeError(f"{name} must be integers, got {value!r}")
        return tuple(checked_integer(name, width) for width in value)
    if types[0] is int:
        return checked_integer(name, value)
    if types[0] is float and isinstance(value, Real):
        return float(value)
    if types[0] is bool and isinstance(value, np.bool_):
        return bool(value)
    if not isinstance(value, types[0]):
        raise TypeError(f"{name} must be a {types[0].__name__}, got {value!r}")
    return value


def _word(value: Any) -> Any:
    return "none" if value is None else value


def _check_choices(config: Any, **choices: tuple[str, ...]) -> None:
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(config, name)!r}")


def _check_at_least_one(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")
