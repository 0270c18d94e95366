"""Policies of other libraries as teachers: stable-baselines3, d3rlpy and TorchRL objects → the parts of a `Teacher`.

Each function takes the library's own object, asks it for the deterministic action, and returns Teacher's arguments. The
libraries are not imported unless the object already comes from one.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdw_fast.units import Affine, Discrete, Units


def parts_of_sb3(model: Any) -> dict[str, Any]:
    """Teacher's arguments from a stable-baselines3 model; see `sdw_fast.teacher.Teacher.from_sb3`."""
    _require(model, "from_sb3", "a stable-baselines3 model, such as SAC.load(path)", "policy", "action_space")
    policy, actions = model.policy, model.action_space
    discrete = type(actions).__name__ == "Discrete"
    for name, space in (("observation", model.observation_space), ("action", actions)):
        vector = type(space).__name__ == "Box" and len(space.shape) == 1
        if not vector and not (name == "action" and discrete):
            raise ValueError(
                f"this model has {name} space {space}; a teacher needs a one-dimensional Box space of numbers"
                + (" or Discrete actions" if name == "action" else "")
            )
    normalizer = model.get_vec_normalize_env()
    states, limit = Affine(np.zeros(model.observation_space.shape), np.ones(model.observation_space.shape)), np.inf
    if normalizer is not None and normalizer.norm_obs:
        spread = np.sqrt(normalizer.obs_rms.var + normalizer.epsilon)
        states, limit = Affine(normalizer.obs_rms.mean, spread), float(normalizer.clip_obs)
    provenance = {"source": "stable-baselines3", "algorithm": type(model).__name__}
    if discrete:
        return {
            "actor": Sb3DiscreteActor(policy, limit),
            "critic": Sb3QNetwork(policy.q_net, limit) if hasattr(policy, "q_net") else None,
            "units": Units(states, Discrete(actions.n, actions.start)),
            "provenance": provenance,
        }
    squashed = policy.squash_output
    bounds = None if squashed else (torch.as_tensor(actions.low), torch.as_tensor(actions.high))
    critic = getattr(policy, "critic", None)
    return {
        "actor": Sb3Actor(policy, limit, bounds),
        "critic": None if critic is None else Sb3Critic(critic, limit),
        "units": Units(states, Affine.between(actions.low, actions.high) if squashed else None),
        "provenance": provenance,
    }


class Sb3Actor(nn.Module):
    """The deterministic action of a policy: in [−1, 1] where it squashes, else clipped to the bounds, as `predict`."""

    def __init__(self, policy: nn.Module, limit: float, bounds: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.policy, self.limit, self.bounds = policy, limit, bounds

    def forward(self, states: Tensor) -> Tensor:
        actions = self.policy(states.clamp(-self.limit, self.limit), deterministic=True)
        actions = actions[0] if isinstance(actions, tuple) else actions  # PPO and A2C: actions, values, log-probability
        return actions if self.bounds is None else actions.clamp(*(bound.to(actions.device) for bound in self.bounds))


class Sb3Critic(nn.Module):
    """The smallest of a critic's values, as SAC and TD3 take it for their targets."""

    def __init__(self, critic: nn.Module, limit: float) -> None:
        super().__init__()
        self.critic, self.limit = critic, limit

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        return torch.cat(self.critic(states.clamp(-self.limit, self.limit), actions), dim=1).amin(dim=1)


class Sb3DiscreteActor(nn.Module):
    """The numbers of the actions that Q values most (DQN), or the probabilities of a stochastic policy (PPO, A2C)."""

    def __init__(self, policy: nn.Module, limit: float) -> None:
        super().__init__()
        self.policy: Any = policy
        self.limit = limit

    def forward(self, states: Tensor) -> Tensor:
        states = states.clamp(-self.limit, self.limit)
        if hasattr(self.policy, "q_net"):
            return self.policy(states, deterministic=True)
        return self.policy.get_distribution(states).distribution.probs


class Sb3QNetwork(nn.Module):
    """The values of actions by their numbers, of a network with one output an action (DQN)."""

    def __init__(self, network: nn.Module, limit: float) -> None:
        super().__init__()
        self.network, self.limit = network, limit

    def forward(self, states: Tensor, numbers: Tensor) -> Tensor:
        return self.network(states.clamp(-self.limit, self.limit)).gather(1, numbers.unsqueeze(1)).squeeze(1)


def parts_of_d3rlpy(algo: Any) -> dict[str, Any]:
    """Teacher's arguments from a d3rlpy algorithm; see `sdw_fast.teacher.Teacher.from_d3rlpy`."""
    _require(algo, "from_d3rlpy", "a d3rlpy algorithm, such as d3rlpy.load_learnable(path)", "predict", "config")
    if algo.impl is None:
        raise ValueError("this d3rlpy algorithm has no networks yet: call its fit, build_with_dataset or load_model")
    if algo.get_action_type().name != "CONTINUOUS":
        raise ValueError(f"{type(algo).__name__} has discrete actions; a teacher needs actions (B, A)")

    def actor(states: Tensor) -> Tensor:
        return torch.as_tensor(algo.predict(states.cpu().numpy()), device=states.device)

    try:
        critic = D3rlpyCritic(algo.impl.q_function, algo.config)
    except NotImplementedError:  # behavior cloning has none
        critic = None
    provenance = {"source": "d3rlpy", "algorithm": type(algo).__name__}
    return {"actor": actor, "critic": critic, "provenance": provenance}


class D3rlpyCritic(nn.Module):
    """The smallest value of an ensemble; d3rlpy's own `predict_value` takes their mean."""

    def __init__(self, networks: nn.ModuleList, config: Any) -> None:
        super().__init__()
        self.networks, self.config = networks, config

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        if self.config.observation_scaler is not None:
            states = self.config.observation_scaler.transform(states)
        if self.config.action_scaler is not None:
            actions = self.config.action_scaler.transform(actions)
        return torch.cat([network(states, actions).q_value for network in self.networks], dim=1).amin(dim=1)


def parts_of_torchrl(actor: Any, critic: Any = None) -> dict[str, Any]:
    """Teacher's arguments from TorchRL modules; see `sdw_fast.teacher.Teacher.from_torchrl`."""
    critics = [] if critic is None else list(critic) if isinstance(critic, (Sequence, nn.ModuleList)) else [critic]
    for module in (actor, *critics):
        _require(module, "from_torchrl", "modules on TensorDicts, such as a ProbabilisticActor", "in_keys", "out_keys")
    return {
        "actor": TorchrlActor(actor),
        "critic": TorchrlCritic(critics) if critics else None,
        "provenance": {"source": "torchrl", "algorithm": type(actor).__name__},
    }


class TorchrlActor(nn.Module):
    """The action of a module on TensorDicts that is its distribution's deterministic one."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, states: Tensor) -> Tensor:
        from tensordict import TensorDict
        from torchrl.envs.utils import ExplorationType, set_exploration_type

        (key,) = self.module.in_keys
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            return self.module(TensorDict({key: states}, [len(states)]))["action"]


class TorchrlCritic(nn.Module):
    """The smallest value that modules on TensorDicts give a state and an action."""

    def __init__(self, modules: Sequence[Any]) -> None:
        super().__init__()
        self.modules_of_q = nn.ModuleList(modules)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        from tensordict import TensorDict

        values = []
        module: Any
        for module in self.modules_of_q:
            inputs = dict(zip(module.in_keys, (states, actions), strict=True))
            values.append(module(TensorDict(inputs, [len(states)]))["state_action_value"])
        return torch.cat(values, dim=-1).amin(dim=-1)


def named_factory(name: str) -> Callable[[], Any]:
    """The function "module:function" of the user's that makes a teacher, which is looked for in the current folder too.

    It is named by the user every time: a file never says which code to run.

    Raises:
        ValueError: there is no such function; called, it returns something else.
    """
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--teacher-factory must be module:function, got {name!r}: {error}") from error
    finally:
        sys.path.pop(0)

    def make() -> Any:
        made = function()
        if not hasattr(made, "actor"):
            raise ValueError(f"--teacher-factory must return a sdw_fast.Teacher, got {type(made).__name__}")
        return made

    return make


def _require(given: Any, method: str, expected: str, *attributes: str) -> None:
    if not all(hasattr(given, name) for name in attributes):
        raise TypeError(f"Teacher.{method} takes {expected}, got {type(given).__name__}")
