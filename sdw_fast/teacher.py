"""The teacher (π*, Q) that gives every objective but `dbc` its targets and value weights: act, value, save, load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdw_fast.files import read_safetensors, reading, to_json, write_safetensors
from sdw_fast.networks import MLP, MinCritic, ask, below, evaluating, refuse_non_finite
from sdw_fast.units import Affine, Discrete, Units

Array = TypeVar("Array", np.ndarray, Tensor)

FORMAT = "sdw_fast.teacher/2"
BATCH_ROWS = 16_384  # rows per forward pass: 256-wide activations stay near 16 MB however many states are asked for
_CORL_HINT = " A CORL checkpoint is read by Teacher.from_corl(path, mean, std)"
DEAD_ROWS = 100  # from this many rows on, outputs that are all the same are taken for a fault, not for a coincidence


class Teacher:
    """A near-optimal policy π* and its value function Q, in the environment's own units.

    Args:
        actor: any callable (nn.Module, function) from states (B, D) to deterministic actions (B, A), float32 tensors.
            Actor and critic, where they are modules, are asked in evaluation mode and put back as they were.
        critic: any callable from states (B, D) and actions (B, A) to values (B,) or (B, 1): min over twin critics if
            there are two. None leaves a teacher that serves `pbc`; `av-pbc` and `sdw` weight by Q and need one.
            In an environment with n discrete actions the actor returns their probabilities (B, n) or action numbers
            (B,) of an integer dtype, and the critic takes action numbers (B,) int64; numbers are the environment's.
        units: those that the callables compute in: normalized states and, where the action bounds are known, actions
            in [−1, 1]. None: the environment's own.
        provenance: where the teacher came from, any JSON-serializable dict; kept in the saved file.

    Raises:
        TypeError: actor or critic is not callable.
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
                raise TypeError(f"{name} must be a callable on tensors, got {type(function).__name__}")
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
        actions = self._label(_tensor(observations), None, values=False)[0]
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
        q = self._label(_tensor(observations), _tensor(actions), values=True)[1]
        return _as(observations, cast("Tensor", q))

    def label(
        self, observations: NDArray[np.float32], units: Units, *, values: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Labels states with π*(s), normalized by `units`, and, if wanted, with Q(s, π*(s)).

        The actor's output goes to the critic as it is, and is the target as it is where the action bounds are the
        teacher's own.

        Returns:
            (M, A) and (M,) float32 arrays; None in place of values that are not wanted. Discrete actions are labeled
            with probabilities (M, n), and valued at the most probable.

        Raises:
            ValueError: as `actions` and `values`, the action bounds are not known, or discrete actions are labeled with
                something else than probabilities or numbers.
        """
        wanted = units.require_actions()
        discrete = wanted if isinstance(wanted, Discrete) else None
        targets, q = self._label(_tensor(observations), None, values=values, discrete=discrete)
        if isinstance(wanted, Discrete):
            return wanted.normalize(targets.cpu().numpy()), None if q is None else q.cpu().numpy()
        if self._actions != wanted:
            targets = wanted.normalize(targets if self._actions is None else self._actions.denormalize(targets))
        return targets.cpu().numpy(), None if q is None else q.cpu().numpy()

    @torch.no_grad()
    def _label(
        self, observations: Tensor, actions: Tensor | None, *, values: bool, discrete: Discrete | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Actions in the networks' units (the actor's if none are given) and, if wanted, values, batch by batch."""
        critic = self.critic if values else None
        if values and critic is None:
            raise ValueError(
                "this teacher has no critic, so it has no values Q(s, a). The objectives 'av-pbc' and 'sdw' weight "
                "states by Q: give them a teacher with one (Teacher(actor=..., critic=...), train_teacher, or a CORL "
                "checkpoint that holds critic1 or critic_1), or use objective 'pbc', which needs actions only."
            )
        for tensor in (observations, *([] if actions is None or _numbers(actions) else [actions])):
            if tensor.ndim != 2:
                raise ValueError(f"expected matrices (rows, dimensions), got shape {tuple(tensor.shape)}")
        size = self._state_size()
        if size is not None and observations.shape[1] != size:
            raise ValueError(f"this teacher takes states of {size} dimensions, got {observations.shape[1]}")
        found: list[tuple[Tensor, Tensor | None]] = []
        with evaluating(self.actor, critic):
            for start in range(0, max(len(observations), 1), BATCH_ROWS):  # no rows: one batch of none
                rows = slice(start, start + BATCH_ROWS)
                states = _batch(observations[rows], self._states)
                if actions is None:
                    chosen = _shaped(ask(self.actor, states), "actions", len(states))
                else:
                    chosen = actions[rows].long() if _numbers(actions) else _batch(actions[rows], self._actions)
                valued = discrete.chosen(chosen) if discrete else chosen
                q = None if critic is None else _shaped(ask(critic, states, valued), "values", len(states))
                found.append((chosen.to(observations.device), None if q is None else q.to(observations.device)))
        chosen = torch.cat([a for a, _ in found])
        if actions is None:
            _refuse_dead(chosen, [observations], "actions")
        if not values:
            return chosen, None
        q = torch.cat([value for _, value in found if value is not None])
        _refuse_dead(q, [observations, chosen], "values")
        return chosen, q

    def _state_size(self) -> int | None:
        if isinstance(self.actor, MLP):
            return self.actor.sizes[0]
        return None if self._states is None else len(self._states.offset)

    def save(self, path: str | os.PathLike[str], *, half: bool = False) -> None:
        """Writes the networks as `.safetensors`, with architecture, units and provenance in the metadata.

        The file appears whole or not at all. `half` stores 16-bit weights, which halves the file; the teacher that is
        loaded from it computes in float32 with the rounded weights.

        Raises:
            TypeError: the actor or critic is not one of the package's networks (as made by `train_teacher`, `load` or
                `from_corl`); an arbitrary callable has no file format.
        """
        if not isinstance(self.actor, MLP) or not isinstance(self.critic, MinCritic | None):
            raise TypeError(
                "only networks made by train_teacher, Teacher.load or Teacher.from_corl can be saved; this teacher's "
                f"actor is {type(self.actor).__name__} and its critic {type(self.critic).__name__}"
            )
        critics = [] if self.critic is None else [cast("MLP", network) for network in self.critic.networks]
        networks = {"actor": self.actor, **{f"critic{i}": network for i, network in enumerate(critics, start=1)}}
        tensors = {
            f"{name}.{key}": tensor.detach().to("cpu", torch.float16 if half else torch.float32).contiguous()
            for name, network in networks.items()
            for key, tensor in network.state_dict().items()
        }
        description = {
            "format": FORMAT,
            "networks": {name: network.sizes for name, network in networks.items()},
            "activations": {"hidden": "relu", "actor_output": "tanh", "critic_output": "linear"},
            "units": self.units and self.units.to_dict(),
            "provenance": self.provenance,
        }
        write_safetensors(path, tensors, {"teacher": to_json(description)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Teacher:
        """Reads a teacher that `save` wrote; nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, is not a `.safetensors` file, or holds something other than a teacher with
                finite weights.
        """
        path = Path(path)
        with reading(path, "teacher file", hint=_CORL_HINT):
            tensors, metadata = read_safetensors(path)
            if "teacher" not in metadata:
                raise ValueError(f"it holds no teacher as Teacher.save writes it ({FORMAT})")
            description = json.loads(metadata["teacher"])
            if description["format"] != FORMAT:
                raise ValueError(f"its format is {description['format']!r}")
            weights = {key: tensor.float() for key, tensor in tensors.items()}
            networks = {
                name: MLP.from_state(sizes, below(weights, name), tanh=name == "actor").requires_grad_(False)
                for name, sizes in description["networks"].items()
            }
            refuse_non_finite(networks)
            actor = networks.pop("actor")
            units = description["units"] and Units.from_dict(description["units"])
            provenance = description["provenance"]
        return cls(actor, MinCritic(list(networks.values())) if networks else None, units=units, provenance=provenance)

    @classmethod
    def pretrained(cls, name: str) -> Teacher:
        """Loads a teacher that comes with the package, by its dataset of the locomotion suite: "hopper/medium".

        Raises:
            ValueError: there is none for that dataset; the message lists those that there are.
        """
        folder = Path(__file__).parent / "assets"
        path = folder / f"{name.removeprefix('sdw/').removesuffix('-v0').replace('/', '-')}-teacher.safetensors"
        if not path.is_file():
            shipped = sorted(p.name.removesuffix("-teacher.safetensors") for p in folder.glob("*-teacher.safetensors"))
            names = [f"{env}/{quality}" for env, _, quality in (stem.partition("-") for stem in shipped)]
            raise ValueError(f"no teacher for {name!r} comes with the package; there are {names}, or use train_teacher")
        return cls.load(path)

    @classmethod
    def from_corl(cls, path: str | os.PathLike[str], mean: Sequence[float], std: Sequence[float]) -> Teacher:
        """Reads a checkpoint of CORL's TD3+BC, IQL, CQL or Cal-QL, the format of the OBD authors' own teachers.

        Args:
            path: the `.pt` file. Only tensors and plain containers are unpickled (`weights_only=True`), and the
                one-number module `Scalar` of CQL, for which an empty stand-in is allowed.
            mean: (D,) mean of the training dataset's states, which the file does not hold.
            std: (D,) standard deviation of the same; the networks see (s − mean) / (std + 1e-3), as CORL does.

        Returns:
            A teacher that takes observations in the environment's units. Its action is the mean action tanh(μ(s)), for
            environments whose actions lie in [−1, 1]; its value is the minimum over the critics in the file. A file
            with no critic gives a teacher that serves `pbc` only.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, would run code of its own, has no actor of a known layout, holds weights
                that are not finite, or mean and std do not fit its networks.
        """
        from sdw_fast.corl import load_networks, state_map

        actor, critics = load_networks(path)
        units = Units(states=state_map(mean, std, actor.sizes[0], Path(path).name))
        provenance = {"source": "CORL checkpoint", "file": Path(path).name}
        return cls(actor, MinCritic(critics) if critics else None, units=units, provenance=provenance)


def _tensor(x: Array) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(np.require(x, requirements=["C", "W"]))


def _as(given: Array, output: Tensor) -> Array:
    return output if isinstance(given, Tensor) else output.cpu().numpy()


def _batch(given: Tensor, units: Affine | None) -> Tensor:
    """Rows in environment units as the networks take them."""
    batch = given.to(torch.float32)
    if not batch.isfinite().all():
        raise ValueError("the teacher was given states or actions with NaN or infinite numbers")
    return batch if units is None else units.normalize(batch)


def _numbers(actions: Tensor) -> bool:
    """Whether they are numbers of discrete actions."""
    return actions.ndim == 1 and not actions.is_floating_point()


def _shaped(output: Tensor, what: str, rows: int) -> Tensor:
    """Holds a callable to its contract: (rows, A) actions; (rows,) or (rows, 1) values, which become (rows,).

    Numbers of discrete actions, (rows,), are taken as they are.
    """
    if what == "actions" and _numbers(output) and len(output) == rows:
        return output.long()
    output = output.to(torch.float32)
    if what == "values" and output.shape == (rows, 1):
        output = output.squeeze(1)
    if output.ndim != (1 if what == "values" else 2) or len(output) != rows:
        wanted = f"({rows},)" if what == "values" else f"({rows}, action dimensions)"
        raise ValueError(f"the teacher's {what} for {rows} states must have shape {wanted}, got {tuple(output.shape)}")
    return output


def _refuse_dead(output: Tensor, inputs: Sequence[Tensor], what: str) -> None:
    """Raises on outputs that are not finite, or the same for many different inputs."""
    finite = output.isfinite()
    if not finite.all():
        bad = int((~finite).reshape(len(output), -1).any(dim=1).sum())
        raise ValueError(f"dead teacher: its {what} are NaN or infinite for {bad} of {len(output)} states")
    if len(output) < DEAD_ROWS or all((x == x[0]).all() for x in inputs):
        return
    spread = (output.amax(dim=0) - output.amin(dim=0)).max()
    if spread <= 1e-6 * output.abs().max():
        raise ValueError(
            f"dead teacher: its {what} are the same ({output[0].tolist()}) for all {len(output)} states. Was it "
            "trained, and are the states in the environment's own units?"
        )
