"""Training a teacher on a dataset by offline RL, with torchrl's losses (TD3+BC, IQL).

A training that writes to a file keeps its state beside it, and goes on from there to the same bits.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sdw_fast.config import TeacherConfig
from sdw_fast.data import TransitionDataset
from sdw_fast.disk import check_writable, locked
from sdw_fast.files import check_sum, damage_named, read_torch, reading, write_torch
from sdw_fast.interruption import deferred_interrupt
from sdw_fast.networks import MLP, MinCritic
from sdw_fast.progress import progress_bar
from sdw_fast.teacher import Teacher
from sdw_fast.version import __version__

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torchrl.objectives import LossModule

BATCH_SIZE = 256
CHECKPOINT_EVERY = 5_000  # steps; half a minute of one core, at most
LEARNING_RATE = 3e-4
_SHOWN_EVERY = 200  # steps between two looks at the losses
CHECKPOINT = "checkpoint of a training"


class Learner(Protocol):
    """Networks, targets and optimizers of a training."""

    loss: LossModule
    optimizers: list[Any]


def train_teacher(
    data: TransitionDataset,
    algorithm: str = "td3bc",
    *,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Teacher:
    """Trains a teacher on a dataset by offline RL, with torchrl's losses (`pip install "sdw_fast[teacher]"`).

    TD3+BC (Fujimoto and Gu, NeurIPS 2021) or IQL (Kostrikov et al., ICLR 2022): actor and twin critics of two hidden
    layers of 256 ReLU units, batches of 256, Adam at 3e-4, discount 0.99, target networks moved by 0.005 a step, in the
    dataset's own units. Runs on the CPU; these networks are small enough for one or two cores. Rewards are scaled to a
    mean magnitude of 1 for IQL, which its temperature is tuned to.

    Args:
        data: transitions with known action bounds.
        algorithm: "td3bc" or "iql".
        out: where to write the teacher (`.safetensors`). The training then keeps `<out>.checkpoint` every 5,000 steps
            and at Ctrl-C; the same call goes on from it to the same bits, and it is removed at the end.
        progress: show a progress bar with losses, the mean of Q, steps a second and the time that is left.
        **settings: fields of `sdw_fast.config.TeacherConfig`: steps, alpha, expectile, temperature, seed. Same seed,
            machine and thread count, same bits; the global random state of PyTorch is left as it was.

    Returns:
        The teacher, with its values in the units of the dataset's rewards and its provenance filled in.

    Raises:
        ImportError: torchrl is not installed.
        ValueError: a setting out of range, discrete actions, unknown action bounds, a checkpoint of another training,
            or training ended in a dead teacher (see `Teacher.actions`).
        FloatingPointError: the losses stopped being finite.
        TypeError: there is no such setting.
        OSError: `out` cannot be written; found before the first step.
        BlockingIOError: another process trains to `out`.
        KeyboardInterrupt: Ctrl-C; the step under way is finished and saved first. A second Ctrl-C stops at once.
    """
    config = TeacherConfig(algorithm, **settings)
    if data.units.head == "softmax":
        raise ValueError(
            "td3bc and iql train teachers of continuous actions, and this dataset's are discrete: use objective='dbc', "
            "which needs none, or a policy of your own, Teacher(actor=...)"
        )
    data.units.require_actions()
    data.require_rewards()
    require_torchrl("train_teacher")
    provenance = {
        **asdict(config),
        "env_id": data.env_id,
        "dataset": data.name,
        "dataset_hash": data.content_hash,
        "transitions": len(data),
        "sdw_fast": __version__,
        "torch": torch.__version__,
    }
    checkpoint = None if out is None else Path(f"{os.fspath(out)}.checkpoint")
    with contextlib.ExitStack() as held:
        interrupted = held.enter_context(deferred_interrupt())
        if out is not None:
            check_writable(out)
            held.enter_context(locked(Path(out)))
        teacher = _trained(data, config, provenance, checkpoint, interrupted, progress=progress)
        if out is not None and checkpoint is not None:
            teacher.save(out)
            checkpoint.unlink(missing_ok=True)
        if interrupted():
            raise KeyboardInterrupt(f"stopped after the last step{'' if out is None else f'; the teacher is in {out}'}")
    return teacher


def require_torchrl(name: str) -> None:
    """Raises ImportError, on behalf of a function of that name, where torchrl is not installed."""
    try:
        import torchrl.objectives  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{name} needs torchrl: pip install "sdw_fast[teacher]"') from error


def _trained(
    data: TransitionDataset,
    config: TeacherConfig,
    provenance: dict[str, Any],
    checkpoint: Path | None,
    interrupted: Callable[[], bool],
    *,
    progress: bool,
) -> Teacher:
    """The loop: from the checkpoint, where there is one, to the last step."""
    reward_scale = _reward_scale(data) if config.algorithm == "iql" else 1.0
    sizes = data.observations.shape[1], data.actions.shape[1]
    step = 0
    with torch.random.fork_rng(devices=[]):
        # TD3's target noise comes from the global generator; torch.manual_seed would seed the GPUs' generators too.
        torch.default_generator.manual_seed(config.seed)
        learner = (Td3Bc if config.algorithm == "td3bc" else Iql)(*sizes, config)
        if checkpoint is not None and checkpoint.exists():
            step = int(go_on(checkpoint, learner, provenance)["step"])
        title = f"training the teacher ({config.algorithm})"
        with progress_bar(total=config.steps, initial=step, desc=title, unit="step", show=progress) as bar:
            while step < config.steps:
                batch = _batch(data, torch.randint(len(data), (BATCH_SIZE,)).numpy(), reward_scale)
                step += 1
                losses = learner.update(batch, step)
                if step % _SHOWN_EVERY == 0 or step == config.steps:
                    _show(bar, step, losses, _trained_networks(learner.loss, sizes, reward_scale)[1], batch)
                bar.update()
                stop = interrupted() and step < config.steps
                if checkpoint is not None and (stop or step % CHECKPOINT_EVERY == 0):
                    write_torch(checkpoint, state_of(step, learner, provenance))
                if stop:
                    kept = "nothing was kept: give it a file to write to (out)"
                    kept = kept if checkpoint is None else "the same call goes on to the same result"
                    raise KeyboardInterrupt(f"stopped after step {step} of {config.steps}; {kept}")
    actor, critic = _trained_networks(learner.loss, sizes, reward_scale)
    teacher = Teacher(actor, critic, units=data.units, provenance=provenance)
    teacher.label(data.observations[:: max(1, len(data) // 10_000)], data.units, values=True)  # raises here if dead
    return teacher


def state_of(step: int, learner: Learner, provenance: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What a checkpoint holds: tensors and plain containers."""
    return {
        "step": step,
        "generator": torch.default_generator.get_state(),
        "loss": learner.loss.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in learner.optimizers],
        "provenance": {**provenance, "torch": str(torch.__version__)},
        "threads": torch.get_num_threads(),
        **more,
    }


def go_on(path: Path, learner: Learner, provenance: dict[str, Any]) -> dict[str, Any]:
    """Puts a learner and PyTorch's generator where a checkpoint was taken, and returns what else it holds.

    Raises ValueError where the file is damaged or of another training.
    """
    with reading(path, CHECKPOINT):
        check_sum(path)
        state = read_torch(path)
        before = state["provenance"]
    rounding = {"torch": (before["torch"], torch.__version__), "threads": (state["threads"], torch.get_num_threads())}
    other = [name for name, value in provenance.items() if name not in rounding and before.get(name) != value]
    if other:
        raise ValueError(
            f"{path} is of another training: {', '.join(other)} differ. Repeat that call, write to another file, or "
            "delete the checkpoint to start anew"
        )
    moved = [f"{name} {then}, now {now}" for name, (then, now) in rounding.items() if then != now]
    if moved:
        warnings.warn(f"{path} was written under {'; '.join(moved)}: the last bits will differ", stacklevel=4)
    with damage_named(path, CHECKPOINT):
        learner.loss.load_state_dict(state["loss"])
        for optimizer, kept in zip(learner.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        torch.default_generator.set_state(state["generator"])
    return state


def _reward_scale(data: TransitionDataset) -> float:
    """Scales rewards to a mean magnitude of 1, which the temperature of IQL is tuned to.

    On locomotion this is within a fifth of the authors' own scaling (returns that span 1,000 in 1,000 steps); short
    episodes are served as well.
    """
    magnitude = float(np.abs(data.require_rewards()).mean())
    return 1.0 / magnitude if magnitude > 0 else 1.0


def _batch(data: TransitionDataset, rows: np.ndarray, reward_scale: float) -> TensorDict:
    """Rows of the dataset as the losses take them, in normalized units."""
    states = data.units.states
    return batch_of(
        states.normalize(data.observations[rows]),
        data.units.require_actions().normalize(data.actions[rows]),
        states.normalize(data.next_observations(rows)),
        data.require_rewards()[rows] * np.float32(reward_scale),
        data.terminations[rows],
        data.truncations[rows],
    )


def batch_of(
    observations: np.ndarray,
    actions: np.ndarray,
    following: np.ndarray,
    rewards: np.ndarray,
    terminations: np.ndarray,
    truncations: np.ndarray,
) -> TensorDict:
    """Transitions (B, ·), float32 and bool, as torchrl's losses take them."""
    from tensordict import TensorDict

    step = {
        "observation": torch.from_numpy(following),
        "reward": torch.from_numpy(rewards).unsqueeze(-1),
        "terminated": torch.from_numpy(terminations).unsqueeze(-1),
        "done": torch.from_numpy(terminations | truncations).unsqueeze(-1),
    }
    batch = {"observation": torch.from_numpy(observations), "action": torch.from_numpy(actions)}
    return TensorDict({**batch, "next": TensorDict(step, [len(rewards)])}, [len(rewards)])


class Td3Bc:
    """TD3+BC: the critics learn at every step, actor and target networks at every second one."""

    def __init__(self, states: int, actions: int, config: TeacherConfig) -> None:
        from tensordict.nn import TensorDictModule
        from torchrl.objectives import SoftUpdate, TD3BCLoss

        actor = TensorDictModule(MLP([states, 256, 256, actions], tanh=True), ["observation"], ["action"])
        critics = q_networks(states, actions)
        options = {"bounds": (-1.0, 1.0), "alpha": config.alpha, "loss_function": "l2"}
        self.loss = with_discount(TD3BCLoss(actor, critics, **options))
        self._targets = SoftUpdate(self.loss, tau=0.005)
        self._actor, self._critic = adam(self.loss.actor_network_params), adam(self.loss.qvalue_network_params)
        self.optimizers: list[Any] = [self._actor, self._critic]
        self._losses: dict[str, Tensor] = {}

    def update(self, batch: TensorDict, step: int) -> dict[str, Tensor]:
        self._losses["critic"], _ = self.loss.qvalue_loss(batch)
        descend(self._losses["critic"], self._critic)
        if step % 2 == 0:
            self._losses["actor"], _ = self.loss.actor_loss(batch)
            descend(self._losses["actor"], self._actor)
            self._targets.step()
        return self._losses


class Iql:
    """IQL: all three losses at once, each with gradients for its own networks only."""

    def __init__(self, states: int, actions: int, config: TeacherConfig) -> None:
        from tensordict.nn import TensorDictModule
        from torchrl.modules import IndependentNormal, ProbabilisticActor
        from torchrl.objectives import IQLLoss, SoftUpdate

        actor = ProbabilisticActor(
            TensorDictModule(_GaussianActor(states, actions), ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=IndependentNormal,
        )
        value = TensorDictModule(MLP([states, 256, 256, 1], tanh=False), ["observation"], ["state_value"])
        critics = q_networks(states, actions)
        options = {"expectile": config.expectile, "temperature": config.temperature}
        self.loss = with_discount(IQLLoss(actor, critics, value, loss_function="l2", **options))
        self._targets = SoftUpdate(self.loss, tau=0.005)
        self._actor = adam(self.loss.actor_network_params)
        self._critic = adam(self.loss.qvalue_network_params, self.loss.value_network_params)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._actor, config.steps)
        self.optimizers: list[Any] = [self._actor, self._critic, self._schedule]

    def update(self, batch: TensorDict, step: int) -> dict[str, Tensor]:
        result = self.loss(batch)
        losses = {"critic": result["loss_qvalue"], "value": result["loss_value"], "actor": result["loss_actor"]}
        descend(sum(losses.values(), torch.zeros(())), self._actor, self._critic)
        self._schedule.step()
        self._targets.step()
        return losses


def with_discount(loss: LossModule) -> LossModule:
    from torchrl.objectives import ValueEstimators

    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
    return loss


def q_networks(states: int, actions: int) -> list[Any]:
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


def adam(*parameters: Any) -> torch.optim.Adam:
    leaves = [leaf for group in parameters for leaf in group.values(include_nested=True, leaves_only=True)]
    return torch.optim.Adam(leaves, lr=LEARNING_RATE, fused=True)


def descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
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
