"""The teacher (π*, Q) that gives every objective but `dbc` its targets and value weights: act, value, save, load."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from sdw_fast import adapters, shipped
from sdw_fast.answers import actions_of, refuse_dead, some_of, tell_of_habits, tell_of_units, values_of
from sdw_fast.cards import Card, Shown, short_hash
from sdw_fast.corl import parts_of_corl
from sdw_fast.networks import MLP, MinCritic, ask, evaluating
from sdw_fast.teacher_file import read_teacher, write_teacher
from sdw_fast.units import Affine, Discrete, Units

Array = TypeVar("Array", np.ndarray, Tensor)

BATCH_ROWS = 16_384  # rows per forward pass: 256-wide activations stay near 16 MB however many states are asked for


class Teacher(Shown):
    """A near-optimal policy π* and its value function Q, in the environment's own units.

    Args:
        actor: any callable (nn.Module, function) from states (B, D) to deterministic actions (B, A), float32 tensors;
            of a torch distribution its mean is taken, of a dict or TensorDict "action", of a tuple the first.
            Actor and critic, where they are modules, are asked in evaluation mode and put back as they were.
        critic: any callable from states (B, D) and actions (B, A) to values (B,) or (B, 1); of a tuple (twin critics)
            the smallest is taken. None leaves a teacher that serves `pbc`; `av-pbc` and `sdw` weight by Q and need one.
            In an environment with n discrete actions the actor returns their probabilities (B, n), or action numbers
            (B,) of an integer dtype, and the critic takes action numbers (B,) int64; numbers are the environment's.
        units: those that the callables compute in: normalized states and, where the action bounds are known, actions
            in [−1, 1]. None: the environment's own.
        provenance: where the teacher came from, any JSON-serializable dict; kept in the saved file.

    Raises:
        TypeError: actor or critic is not callable on tensors.
    """

    def __init__(
        self,
        actor: Callable[[Tensor], Tensor],
        critic: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        units: Units | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        for name, function in (("actor", actor), ("critic", critic)):
            if not callable(function) and not (name == "critic" and function is None):
                raise TypeError(
                    f"{name} must be a callable on tensors, got {type(function).__name__}; models of stable-baselines3 "
                    "and d3rlpy are taken by Teacher.from_sb3 and Teacher.from_d3rlpy"
                )
            if hasattr(function, "in_keys"):
                raise TypeError(f"{name} is a module on TensorDicts: use Teacher.from_torchrl(actor, critic)")
        self.actor = actor
        self.critic = critic
        self.units = units
        self.provenance = dict(provenance or {})

    @property
    def _states(self) -> Affine | None:
        return None if self.units is None else self.units.states

    @property
    def _actions(self) -> Affine | None:
        actions = None if self.units is None else self.units.actions
        return actions if isinstance(actions, Affine) else None

    def actions(self, observations: Array) -> Array:
        """Returns the deterministic actions π*(s).

        Args:
            observations: (M, D) in the environment's units, a NumPy array or a tensor; any M, worked through in
                batches.

        Returns:
            (M, A) float32 actions in the environment's units: an array for an array, a tensor on the observations'
            device for a tensor. Of discrete actions what the actor returns, (M, n) probabilities or (M,) numbers.

        Raises:
            ValueError: the observations are not a finite (M, D) array, or the teacher is dead: its actions are not
                finite, or 100 and more different states all get the same action.
        """
        actions = _label(self, _tensor(observations), None, values=False)[0]
        return _as(observations, actions if self._actions is None else self._actions.denormalize(actions))

    def values(self, observations: Array, actions: Array) -> Array:
        """Returns Q(s, a), the smaller of the two values where the teacher has twin critics.

        Args:
            observations: (M, D) in the environment's units, a NumPy array or a tensor; any M, worked through in
                batches.
            actions: (M, A) actions in the environment's units, of the same kind as the observations; discrete ones are
                numbers (M,).

        Returns:
            (M,) float32 values in the units of the rewards that the critic was trained on: an array for an array, a
            tensor on the observations' device for a tensor.

        Raises:
            ValueError: the teacher has no critic, the inputs are not finite matrices of as many rows, or the teacher is
                dead: its values are not finite, or 100 and more different pairs all get the same value.
        """
        if len(observations) != len(actions):
            raise ValueError(
                f"observations and actions must have as many rows, got {len(observations)} and {len(actions)}"
            )
        q = _label(self, _tensor(observations), _tensor(actions), values=True)[1]
        return _as(observations, cast("Tensor", q))

    @torch.no_grad()
    def label(
        self, observations: NDArray[np.float32], units: Units, *, values: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Labels states with π*(s), normalized by `units`, and, if wanted, with Q(s, π*(s)).

        The actor's output goes to the critic as it is, and is the target as it is where the action bounds are the
        teacher's own. A few states are asked twice, and what cannot be meant is told in a warning: an actor that
        samples, actions beyond the bounds or never scaled to them, a tuple of which a part is taken.

        Returns:
            (M, A) and (M,) float32 arrays; None in place of values that are not wanted. Discrete actions are labeled
            with probabilities (M, n), and valued at the most probable.

        Raises:
            ValueError: as `actions` and `values`, the action bounds are not known, or discrete actions are labeled with
                something else than probabilities or numbers.
        """
        wanted = units.require_actions()
        discrete = wanted if isinstance(wanted, Discrete) else None
        targets, q = _label(self, _tensor(observations), None, values=values, discrete=discrete)
        critic = _of_numbers(self.critic, discrete) if values else None
        with evaluating(self.actor, self.critic):
            tell_of_habits(self.actor, critic, _batch(some_of(_tensor(observations)), self._states))
        if isinstance(wanted, Discrete):
            return wanted.normalize(targets.cpu().numpy()), None if q is None else q.cpu().numpy()
        if self._actions != wanted:
            targets = wanted.normalize(targets if self._actions is None else self._actions.denormalize(targets))
        tell_of_units(targets, self._actions, wanted)
        return targets.cpu().numpy(), None if q is None else q.cpu().numpy()

    def card(self) -> Card:
        """What the teacher is, for people."""
        networks = [self.actor, self.critic]
        known = [x.detach().cpu().numpy() for n in networks if isinstance(n, Module) for x in n.state_dict().values()]
        return Card(
            "Teacher",
            {
                "environment": self.units and self.units.env_id,
                "actor": _described(self.actor),
                "critic": "none" if self.critic is None else _described(self.critic),
                **{name: self.provenance.get(name) for name in ("algorithm", "dataset", "source")},
                "hash": short_hash(*known) if known else None,
            },
        )

    def save(self, path: str | os.PathLike[str], *, half: bool = False) -> None:
        """Writes the networks as `.safetensors`, with architecture, units and provenance in the metadata.

        The file appears whole or not at all. `half` stores 16-bit weights, which halves the file; the teacher that is
        loaded from it computes in float32 with the rounded weights. Of modules that are not the package's own, the
        state dicts are written; `load` then needs a function that makes such modules.

        Raises:
            TypeError: the actor or critic is no torch module; an arbitrary callable has no file format.
        """
        write_teacher(path, self, half=half)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, factory: Callable[[], Teacher] | None = None) -> Teacher:
        """Reads a teacher that `save` wrote; nothing is unpickled.

        Args:
            path: the `.safetensors` file.
            factory: for a file of modules that are not the package's own: a function that returns a teacher of such
                modules, into which the file's weights are put. Units and provenance are the file's.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, is not a `.safetensors` file, or holds something other than a teacher with
                finite weights; a factory is needed, or makes other modules.
        """
        return cls(**read_teacher(path, factory))

    @classmethod
    def pretrained(cls, name: str) -> Teacher:
        """Loads a teacher that comes with the package, by its dataset of the locomotion suite: "hopper/medium".

        Raises:
            ValueError: there is none for that dataset; the message lists those that there are.
        """
        return cls.load(shipped.path("teacher", name, "use train_teacher"))

    @classmethod
    def from_corl(cls, path: str | os.PathLike[str], mean: Sequence[float], std: Sequence[float]) -> Teacher:
        """Reads a checkpoint of CORL's TD3+BC, IQL, CQL or Cal-QL, the format of the OBD authors' own teachers.

        Only tensors and plain containers are unpickled. The action is tanh(μ(s)), for environments whose actions lie in
        [−1, 1], the value the minimum over the file's critics; a file without one gives a teacher for `pbc` only.

        Args:
            path: the `.pt` file.
            mean, std: (D,) of the training dataset's states, which the file does not hold; its networks see
                (s − mean) / (std + 1e-3).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, would run code, has no actor of a known layout, holds weights that are not
                finite, or mean and std do not fit its networks.
        """
        return cls(**parts_of_corl(path, mean, std))

    @classmethod
    def from_sb3(cls, model: Any) -> Teacher:
        """Takes a stable-baselines3 model (SAC, TD3, PPO, DQN, …; `SAC.load(path)`) as it acts without exploration.

        Actions are the deterministic ones, in the environment's bounds; values the smallest of the model's critics. PPO
        and A2C have no Q(s, a): such a teacher serves `pbc`. Where actions are discrete, DQN teaches the number of the
        one that it values most, PPO and A2C the probabilities of all. If the model was trained in a VecNormalize, set
        it on the model (`SAC.load(path, env=normalized)`): its statistics are used, and its values are of normalized
        rewards.

        Raises:
            TypeError: something else was given.
            ValueError: its observations are not a one-dimensional Box space, or its actions neither one nor Discrete.
        """
        return cls(**adapters.parts_of_sb3(model))

    @classmethod
    def from_d3rlpy(cls, algo: Any) -> Teacher:
        """Takes a d3rlpy algorithm (`d3rlpy.load_learnable(path)`) by its greedy actions and its smallest critic.

        Its observation and action scalers are applied; a reward scaler is not undone, so that values are of scaled
        rewards. Behavior cloning has no critic.

        Raises:
            TypeError: something else was given.
            ValueError: it was never built, or its actions are discrete.
        """
        return cls(**adapters.parts_of_d3rlpy(algo))

    @classmethod
    def from_torchrl(cls, actor: Any, critic: Any = None) -> Teacher:
        """Takes TorchRL modules: an actor from one key to "action", a critic (or a list of them) to its value.

        The actor is asked for its distribution's deterministic action, as `ExplorationType.DETERMINISTIC` defines it.
        Observations are given as they are: the transforms of a TorchRL environment are not part of its modules.

        Raises:
            TypeError: something else was given.
        """
        return cls(**adapters.parts_of_torchrl(actor, critic))


@torch.no_grad()
def _label(
    teacher: Teacher, observations: Tensor, actions: Tensor | None, *, values: bool, discrete: Discrete | None = None
) -> tuple[Tensor, Tensor | None]:
    """Actions in the networks' units (the actor's if none are given) and, if wanted, values, batch by batch."""
    critic = _of_numbers(teacher.critic, discrete) if values else None
    if values and critic is None:
        raise ValueError(
            "this teacher has no critic, so it has no values Q(s, a). The objectives 'av-pbc' and 'sdw' weight "
            "states by Q: give them a teacher with one (Teacher(actor=..., critic=...), train_teacher, or a CORL "
            "checkpoint that holds critic1 or critic_1), or use objective 'pbc', which needs actions only."
        )
    numbers = actions is not None and actions.ndim == 1 and not actions.is_floating_point()
    for tensor in (observations, *([] if actions is None or numbers else [actions])):
        if tensor.ndim != 2:
            raise ValueError(f"expected matrices (rows, dimensions), got shape {tuple(tensor.shape)}")
    size = _width(teacher.actor, teacher._states)
    if size is not None and observations.shape[1] != size:
        raise ValueError(f"this teacher takes states of {size} dimensions, got {observations.shape[1]}")
    chosen: Tensor | None = None
    q: Tensor | None = None
    with evaluating(teacher.actor, teacher.critic):
        for start in range(0, max(len(observations), 1), BATCH_ROWS):  # no rows: one batch of none
            rows = slice(start, start + BATCH_ROWS)
            states = _batch(observations[rows], teacher._states)
            if actions is None:
                some = actions_of(teacher.actor, states)
            else:
                some = actions[rows].long() if numbers else _batch(actions[rows], teacher._actions)
            chosen = _put(chosen, rows, some, observations)
            if critic is not None:
                q = _put(q, rows, values_of(critic, states, some), observations)
    assert chosen is not None  # there is a batch
    if actions is None:
        refuse_dead(chosen, [observations], "actions")
    if q is not None:
        refuse_dead(q, [observations, chosen], "values")
    return chosen, q


def _width(actor: Callable[[Tensor], Tensor], states: Affine | None) -> int | None:
    """The width of the states that an actor takes, where it is known."""
    if isinstance(actor, MLP):
        return actor.sizes[0]
    return None if states is None else len(states.offset)


def _of_numbers(critic: Callable[..., Any] | None, discrete: Discrete | None) -> Callable[..., Any] | None:
    """A critic of action numbers, where actions are discrete, as one of what an actor answers."""
    if critic is None or discrete is None:
        return critic
    return lambda states, actions: ask(critic, states, discrete.chosen(actions))


def _described(function: Callable[..., Tensor]) -> str:
    """Of the package's networks the widths, of a user's own function the name."""
    if isinstance(function, MinCritic):
        return f"min of {len(function.networks)} × {_described(cast('MLP', function.networks[0]))}"
    if isinstance(function, MLP):
        return " → ".join(map(str, function.sizes))
    return getattr(function, "__name__", type(function).__name__)


def _tensor(x: Array) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(np.require(x, requirements=["C", "W"]))


def _as(given: Array, output: Tensor) -> Array:
    return output if isinstance(given, Tensor) else output.cpu().numpy()


def _put(whole: Tensor | None, rows: slice, part: Tensor, beside: Tensor) -> Tensor:
    """The answers for all rows, with those of a batch put in; the first batch makes room for all.

    Kept one by one, the small answers would lie between the large activations, and the heap would grow with the rows.
    """
    if whole is None:
        whole = part.new_empty((len(beside), *part.shape[1:]), device=beside.device)
    whole[rows] = part
    return whole


def _batch(given: Tensor, units: Affine | None) -> Tensor:
    """Rows in environment units as the networks take them."""
    batch = given.to(torch.float32)
    if not batch.isfinite().all():
        raise ValueError("the teacher was given states or actions with NaN or infinite numbers")
    return batch if units is None else units.normalize(batch)
