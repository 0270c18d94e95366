"""What a user's actor and critic answer: held to their contract, or told in one sentence.

Networks have other habits than to return (B, A) and (B,) tensors: they return distributions, tuples or TensorDicts,
sample where they are asked for the mean, and leave the scaling of their actions to whoever wraps them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdw_fast.networks import ask
from sdw_fast.units import Affine

DEAD_ROWS = 100  # from this many rows on, outputs that are all the same are taken for a fault, not for a coincidence
_PROBED = 32  # states that are asked for twice
_WIDE = 1.5  # bounds from here on are wide enough that an actor which stays within ±1 is told


def actions_of(actor: Callable[..., Any], states: Tensor) -> Tensor:
    """The actor's actions, (B, A) float32: a distribution's mean, a TensorDict's "action", the first of a tuple.

    Discrete actions are probabilities (B, n), a Categorical's too, or numbers (B,) of an integer dtype, int64.

    Raises:
        ValueError: the answer is none of these, or has another shape.
    """
    answer = _entry(ask(actor, states), "action")
    if isinstance(answer, (tuple, list)) and answer:
        answer = answer[0]
    answer = _mean(answer)
    if isinstance(answer, (Tensor, np.ndarray)) and answer.shape == (len(states),) and "int" in str(answer.dtype):
        return torch.as_tensor(answer).long()
    answer = _tensor("actions", answer)
    if answer.ndim != 2 or len(answer) != len(states):
        raise ValueError(_shape_wanted("actions", f"({len(states)}, action dimensions)", answer, len(states)))
    return answer


def values_of(critic: Callable[..., Any], states: Tensor, actions: Tensor) -> Tensor:
    """The critic's values, (B,) float32: (B,) or (B, 1), a TensorDict's "state_action_value", the smallest of a tuple.

    Raises:
        ValueError: the answer is none of these, or has another shape.
    """
    answer = _entry(ask(critic, states, actions), "state_action_value")
    values = []
    for value in answer if isinstance(answer, (tuple, list)) and answer else [answer]:
        value = _tensor("values", value)
        value = value.squeeze(1) if value.shape == (len(states), 1) else value
        if value.shape != (len(states),):
            raise ValueError(_shape_wanted("values", f"({len(states)},)", value, len(states)))
        values.append(value)
    return torch.stack(values).amin(dim=0)


def _entry(answer: Any, key: str) -> Any:
    """The named entry of a dict or TensorDict; anything else as it is."""
    if not isinstance(answer, Mapping) and not (hasattr(answer, "keys") and hasattr(answer, "batch_size")):
        return answer
    if key not in answer.keys():  # noqa: SIM118 (a TensorDict has no other way)
        raise ValueError(f"the teacher's answer holds {sorted(map(str, answer.keys()))}, and no {key!r}")
    return answer[key]


def _mean(answer: Any) -> Any:
    """The deterministic action of a distribution: its mean, before a squashing by tanh where there is one."""
    if isinstance(answer, torch.distributions.TransformedDistribution):
        action = _mean(answer.base_dist)
        for transform in answer.transforms:
            action = transform(action)
        return action
    if isinstance(answer, torch.distributions.Categorical):
        return answer.probs
    return answer.mean if isinstance(answer, torch.distributions.Distribution) else answer


def _tensor(what: str, answer: Any) -> Tensor:
    if isinstance(answer, np.ndarray):
        answer = torch.from_numpy(answer)
    if not isinstance(answer, Tensor):
        raise ValueError(f"the teacher's {what} must be a tensor, got {type(answer).__name__}")
    return answer.to(torch.float32)


def _shape_wanted(what: str, wanted: str, answer: Tensor, rows: int) -> str:
    return f"the teacher's {what} for {rows} states must have shape {wanted}, got {tuple(answer.shape)}"


def refuse_dead(output: Tensor, inputs: Sequence[Tensor], what: str) -> None:
    """Raises ValueError on outputs that are not finite, or the same for many different inputs."""
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


def some_of(rows: Tensor) -> Tensor:
    """A few rows from all over a tensor."""
    return rows[:: max(1, len(rows) // _PROBED)][:_PROBED]


def tell_of_habits(actor: Callable[..., Any], critic: Callable[..., Any] | None, states: Tensor) -> None:
    """Warns of an actor or critic that gives two answers to one question, and of tuples, of which a part is taken.

    The states, a few in the units of the networks, are asked twice. PyTorch's random state on the CPU is left as it
    was.
    """
    if not len(states):
        return
    with torch.random.fork_rng(devices=[]):
        first, second = (actions_of(actor, states) for _ in range(2))
        _tell_of_two_answers("actor", "actions", first, second)
        if isinstance(answer := ask(actor, states), (tuple, list)):
            _tell(f"the teacher's actor returns {len(answer)} things; the first is taken for the action")
        if critic is not None:
            _tell_of_two_answers("critic", "values", *(values_of(critic, states, first) for _ in range(2)))
            if isinstance(answer := ask(critic, states, first), (tuple, list)):
                _tell(f"the teacher's critic returns {len(answer)} values of a pair; the smallest is taken")


def _tell_of_two_answers(who: str, what: str, first: Tensor, second: Tensor) -> None:
    difference = (first - second).abs().max().item()
    if difference > 1e-4 * max(first.abs().max().item(), 1e-6):
        _tell(
            f"the teacher's {who} gives two answers to one question ({what} differ by {difference:.2g}): it samples. "
            "One sample a state is taken; give the mean instead (lambda states: policy(states, deterministic=True))"
        )


def tell_of_units(actions: Tensor, own: Affine | None, wanted: Affine) -> None:
    """Warns of a teacher's actions, (M, A) normalized by the data's bounds `wanted`, that cannot be meant.

    Beyond the bounds; or, where the actor scales by nothing that is known (`own` is None), all within ±1 although the
    bounds are far wider, as an actor's are whose tanh was never scaled.
    """
    low, high = _bounds(wanted)
    if own is not None and own != wanted:
        given = " to ".join(map(str, _bounds(own)))
        _tell(f"the teacher's action bounds are {given}, the data's {low} to {high}; its actions are converted")
    if not len(actions):
        return
    reach = wanted.denormalize(torch.stack([actions.amin(dim=0), actions.amax(dim=0)])).cpu().numpy()
    beyond = (actions.abs() > 1 + 1e-4).any(dim=1).double().mean().item()
    if beyond > 0:
        _tell(
            f"the teacher's actions reach from {reach[0]} to {reach[1]}, beyond the bounds {low} to {high} in "
            f"{beyond:.0%} of the states: no policy can follow them there. Does it answer in the environment's units?"
        )
    elif own is None and (np.minimum(-low, high) >= _WIDE).all() and np.abs(reach).max() <= 1:
        _tell(
            f"all of the teacher's actions lie within ±1, and the bounds are {low} to {high}: if its actions still "
            "have to be scaled to them, do so (lambda states: scale * policy(states)), or give it units"
        )


def _bounds(scaling: Affine) -> tuple[np.ndarray, np.ndarray]:
    low, high = scaling.bounds
    return low.astype(np.float32), high.astype(np.float32)


def _tell(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)
