"""Training a teacher on a dataset by offline RL, with torchrl's losses (TD3+BC, IQL)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sdw_fast.config import TeacherConfig
from sdw_fast.data import TransitionDataset
from sdw_fast.networks import MLP, MinCritic
from sdw_fast.progress import progress_bar
from sdw_fast.teacher import Teacher
from sdw_fast.version import __version__

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torchrl.objectives import LossModule, SoftUpdate

BATCH_SIZE = 256
_SHOWN_EVERY = 200  # steps between two looks at the losses


def train_teacher(
    data: TransitionDataset, algorithm: str = "td3bc", *, progress: bool = True, **settings: Any
) -> Teacher:
    """Trains a teacher on a dataset by offline RL, with torchrl's losses (`pip install "sdw_fast[teacher]"`).

    TD3+BC (Fujimoto and Gu, NeurIPS 2021) or IQL (Kostrikov et al., ICLR 2022): actor and twin critics of two hidden
    layers of 256 ReLU units, batches of 256, Adam at 3e-4, discount 0.99, target networks moved by 0.005 a step, in the
    dataset's own units. Runs on the CPU; these networks are small enough for one or two cores. Rewards are scaled to a
    mean magnitude of 1 for IQL, which its temperature is tuned to.

    Args:
        data: transitions with known action bounds.
        algorithm: "td3bc" or "iql".
        progress: show a progress bar with losses and the mean of Q.
        **settings: fields of `sdw_fast.config.TeacherConfig`: steps, alpha, expectile, temperature, seed. Same seed,
            machine and thread count, same bits; the global random state of PyTorch is left as it was.

    Returns:
        The teacher, with its values in the units of the dataset's rewards and its provenance filled in.

    Raises:
        ImportError: torchrl is not installed.
        ValueError: a setting out of range, discrete actions, unknown action bounds, or training ended in a dead teacher
            (see `Teacher.actions`).
        FloatingPointError: the losses stopped being finite.
        TypeError: there is no such setting.
    """
    config = TeacherConfig(algorithm, **settings)
    if data.units.head == "softmax":
        raise ValueError(
            "td3bc and iql train teachers of continuous actions, and this dataset's are discrete: use objective='dbc', "
            "which needs none, or a policy of your own, Teacher(actor=...)"
        )
    data.units.require_actions()
    try:
        from torchrl.objectives import SoftUpdate, ValueEstimators
    except ImportError as error:
        raise ImportError('train_teacher needs torchrl: pip install "sdw_fast[teacher]"') from error

    reward_scale = _reward_scale(data) if config.algorithm == "iql" else 1.0
    sizes = data.observations.shape[1], data.actions.shape[1]
    with torch.random.fork_rng(devices=[]):  # TD3's target noise comes from the global generator
        torch.default_generator.manual_seed(config.seed)  # torch.manual_seed would seed the GPUs' generators too
        loss = _td3bc_loss(*sizes, config) if config.algorithm == "td3bc" else _iql_loss(*sizes, config)
        loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
        targets = SoftUpdate(loss, tau=0.005)
        update = (
            _td3bc_update(loss, targets) if config.algorithm == "td3bc" else _iql_update(loss, targets, config.steps)
        )
        steps = range(1, config.steps + 1)
        with progress_bar(steps, desc=f"training the teacher ({config.algorithm})", show=progress) as bar:
            for step in bar:
                batch = _batch(data, torch.randint(len(data), (BATCH_SIZE,)).numpy(), reward_scale)
                losses = update(batch, step)
                if step % _SHOWN_EVERY == 0 or step == config.steps:
                    _show(bar, step, losses, _trained_networks(loss, sizes, reward_scale)[1], batch)

    actor, critic = _trained_networks(loss, sizes, reward_scale)
    teacher = Teacher(
        actor,
        critic,
        units=data.units,
        provenance={
            **asdict(config),
            "env_id": data.env_id,
            "dataset": data.name,
            "dataset_hash": data.content_hash,
            "transitions": len(data),
            "sdw_fast": __version__,
            "torch": torch.__version__,
        },
    )
    teacher.label(data.observations[:: max(1, len(data) // 10_000)], data.units, values=True)  # raises here if dead
    return teacher


def _reward_scale(data: TransitionDataset) -> float:
    """Scales rewards to a mean magnitude of 1, which the temperature of IQL is tuned to.

    On locomotion this is within a fifth of the authors' own scaling (returns that span 1,000 in 1,000 steps); short
    episodes are served as well.
    """
    magnitude = float(np.abs(data.rewards).mean())
    return 1.0 / magnitude if magnitude > 0 else 1.0


def _batch(data: TransitionDataset, rows: np.ndarray, reward_scale: float) -> TensorDict:
    """Rows of the dataset as the losses take them, in normalized units."""
    from tensordict import TensorDict

    states = data.units.states
    following = TensorDict(
        {
            "observation": torch.from_numpy(states.normalize(data.next_observations(rows))),
            "reward": torch.from_numpy(data.rewards[rows] * np.float32(reward_scale)).unsqueeze(-1),
            "terminated": torch.from_numpy(data.terminations[rows]).unsqueeze(-1),
            "done": torch.from_numpy(data.terminations[rows] | data.truncations[rows]).unsqueeze(-1),
        },
        [len(rows)],
    )
    observations = torch.from_numpy(states.normalize(data.observations[rows]))
    actions = torch.from_numpy(data.units.require_actions().normalize(data.actions[rows]))
    return TensorDict({"observation": observations, "action": actions, "next": following}, [len(rows)])


def _td3bc_loss(states: int, actions: int, config: TeacherConfig) -> LossModule:
    from tensordict.nn import TensorDictModule
    from torchrl.objectives import TD3BCLoss

    actor = TensorDictModule(MLP([states, 256, 256, actions], tanh=True), ["observation"], ["action"])
    return TD3BCLoss(actor, _q_networks(states, actions), bounds=(-1.0, 1.0), alpha=config.alpha, loss_function="l2")


def _iql_loss(states: int, actions: int, config: TeacherConfig) -> LossModule:
    from tensordict.nn import TensorDictModule
    from torchrl.modules import IndependentNormal, ProbabilisticActor
    from torchrl.objectives import IQLLoss

    actor = ProbabilisticActor(
        TensorDictModule(_GaussianActor(states, actions), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    value = TensorDictModule(MLP([states, 256, 256, 1], tanh=False), ["observation"], ["state_value"])
    networks = _q_networks(states, actions)
    options = {"expectile": config.expectile, "temperature": config.temperature}
    return IQLLoss(actor, networks, value, loss_function="l2", **options)


def _q_networks(states: int, actions: int) -> list[Any]:
    from tensordict.nn import TensorDictModule

    return [TensorDictModule(_Q(states, actions), ["observation", "action"], ["state_action_value"]) for _ in range(2)]


class _Q(nn.Module):
    """One critic with the two-argument call that torchrl makes."""

    def __init__(self, states: int, actions: int) -> None:
        super().__init__()
        self.network = MLP([states + actions, 256, 256, 1], tanh=False)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        return self.network(torch.cat([states, actions], dim=-1))


class _GaussianActor(nn.Module):
    """IQL's policy: mean tanh(MLP(s)), and one learned standard deviation per action, the same in all states."""

    def __init__(self, states: int, actions: int) -> None:
        super().__init__()
        self.network = MLP([states, 256, 256, actions], tanh=True)
        self.log_std = nn.Parameter(torch.zeros(actions))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.network(states)
        return mean, self.log_std.clamp(-5.0, 2.0).exp().expand_as(mean)


def _td3bc_update(loss: LossModule, targets: SoftUpdate) -> Callable[[TensorDict, int], dict[str, Tensor]]:
    """Returns one step of TD3+BC: the critics every time, actor and target networks every second time."""
    actor_optimizer, critic_optimizer = _adam(loss.actor_network_params), _adam(loss.qvalue_network_params)
    losses: dict[str, Tensor] = {}

    def update(batch: TensorDict, step: int) -> dict[str, Tensor]:
        losses["critic"], _ = loss.qvalue_loss(batch)
        _descend(losses["critic"], critic_optimizer)
        if step % 2 == 0:
            losses["actor"], _ = loss.actor_loss(batch)
            _descend(losses["actor"], actor_optimizer)
            targets.step()
        return losses

    return update


def _iql_update(loss: LossModule, targets: SoftUpdate, steps: int) -> Callable[[TensorDict, int], dict[str, Tensor]]:
    """Returns one step of IQL: all three losses at once, each with gradients for its own networks only."""
    actor_optimizer = _adam(loss.actor_network_params)
    critic_optimizer = _adam(loss.qvalue_network_params, loss.value_network_params)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(actor_optimizer, steps)

    def update(batch: TensorDict, step: int) -> dict[str, Tensor]:
        result = loss(batch)
        losses = {"critic": result["loss_qvalue"], "value": result["loss_value"], "actor": result["loss_actor"]}
        _descend(sum(losses.values(), torch.zeros(())), actor_optimizer, critic_optimizer)
        schedule.step()
        targets.step()
        return losses

    return update


def _adam(*parameters: Any) -> torch.optim.Adam:
    leaves = [leaf for group in parameters for leaf in group.values(include_nested=True, leaves_only=True)]
    return torch.optim.Adam(leaves, lr=3e-4, fused=True)


def _descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _show(bar: Any, step: int, losses: dict[str, Tensor], critic: MinCritic, batch: TensorDict) -> None:
    """Writes losses and the batch's mean Q into the progress bar; stops a run that has diverged."""
    with torch.no_grad():
        shown = {name: float(value) for name, value in losses.items()}
        shown["Q"] = float(critic(batch["observation"], batch["action"]).mean())
    if not np.isfinite(list(shown.values())).all():
        raise FloatingPointError(
            f"the teacher's training had diverged by step {step}: {shown}; check the rewards' scale"
        )
    bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)


def _trained_networks(loss: LossModule, sizes: tuple[int, int], reward_scale: float) -> tuple[MLP, MinCritic]:
    """Copies actor and critics out of torchrl's loss; values are brought back to the dataset's reward units."""
    actor = _frozen([sizes[0], 256, 256, sizes[1]], _mlp_state(loss.actor_network_params), tanh=True)
    critics = []
    for index in range(2):
        state = _mlp_state(loss.qvalue_network_params[index])
        for key in ("4.weight", "4.bias"):  # the last layer is linear: scaling it scales Q
            state[key] = state[key] / reward_scale
        critics.append(_frozen([sum(sizes), 256, 256, 1], state, tanh=False))
    return actor, MinCritic(critics)


def _mlp_state(parameters: Any) -> dict[str, Tensor]:
    """State dict of the one MLP inside torchrl's nested parameters, whatever wraps it ("module.0.network.2.weight")."""
    flat = parameters.data.flatten_keys(".").items()
    return {".".join(key.split(".")[-2:]): value.clone() for key, value in flat if key.endswith((".weight", ".bias"))}


def _frozen(sizes: list[int], state: dict[str, Tensor], *, tanh: bool) -> MLP:
    return MLP.from_state(sizes, state, tanh=tanh).requires_grad_(False)
