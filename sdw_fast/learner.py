"""A soft actor-critic learner, by torchrl, and all that it sees until it reaches a return: D4RL's medium-replay.

A learner keeps its state beside what becomes of it, and goes on from there to the same bits: the networks are put back,
and the episode under way is repeated from its seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from sdw_fast.disk import check_writable, locked
from sdw_fast.environments import make_env
from sdw_fast.evaluation import evaluate
from sdw_fast.files import damage_named, write_torch
from sdw_fast.interruption import deferred_interrupt
from sdw_fast.networks import GaussianPolicy
from sdw_fast.ops._backend import one_thread
from sdw_fast.progress import progress_bar
from sdw_fast.rollout import SeededEnvs, act, episode_seed, episodes_of
from sdw_fast.training import (
    BATCH_SIZE,
    CHECKPOINT,
    CHECKPOINT_EVERY,
    LEARNING_RATE,
    adam,
    batch_of,
    descend,
    go_on,
    q_networks,
    state_of,
    with_discount,
)

if TYPE_CHECKING:
    from tensordict import TensorDict

RANDOM_STEPS = 5_000  # of uniformly random actions, before the first update
LOOK_EVERY = 5_000  # steps between two looks at the mean action's return
EPISODES = 5  # of a look
PATIENCE = 10  # times the expected steps, after which a learner that is not where it should be is given up
ROWS = 4_096  # that a history has room for at first


class History:
    """Transitions in the order in which they were seen, and the returns that the policy reached meanwhile.

    Attributes:
        returns: (steps, mean return of the mean action over `EPISODES` episodes), a look each.
    """

    def __init__(self, columns: dict[str, np.ndarray], length: int, returns: list[tuple[int, float]]) -> None:
        """Takes over arrays whose first `length` rows are filled, in the order of `append`'s arguments."""
        self._columns, self._length = columns, length
        self.returns = returns

    @classmethod
    def empty(cls, states: int, actions: int) -> History:
        """One of observations (D,) float64 and actions (A,) float32, as MuJoCo's environments have them."""
        columns: dict[str, np.ndarray] = {
            "observations": np.empty((ROWS, states)),
            "actions": np.empty((ROWS, actions), np.float32),
            "following": np.empty((ROWS, states)),
            "rewards": np.empty(ROWS),
            "terminations": np.empty(ROWS, bool),
            "truncations": np.empty(ROWS, bool),
        }
        return cls(columns, 0, [])

    def __len__(self) -> int:
        return self._length

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The arrays (n, ·) by their names."""
        return {name: column[: self._length] for name, column in self._columns.items()}

    def append(self, *transition: Any) -> None:
        """Adds an observation, action, next observation, reward, termination and truncation."""
        if self._length == len(self._columns["rewards"]):  # twice the room
            self._columns = {name: np.concatenate([c, np.empty_like(c)]) for name, c in self._columns.items()}
        for column, value in zip(self._columns.values(), transition, strict=True):
            column[self._length] = value
        self._length += 1

    def ends(self) -> np.ndarray:
        """How many transitions had been seen as each episode ended."""
        columns = self.columns
        return np.flatnonzero(columns["terminations"] | columns["truncations"]) + 1

    def episodes(self, seed: int) -> list[dict[str, Any]]:
        """As Minari's episodes, of the seed that the learner had."""
        return episodes_of(map(partial(episode_seed, seed), itertools.count()), **self.columns)

    def batch(self) -> TensorDict:
        """Draws transitions, each as likely as any other, by PyTorch's global generator."""
        rows = torch.randint(self._length, (BATCH_SIZE,)).numpy()
        drawn = [column[rows] for column in self._columns.values()]
        return batch_of(*(x if x.dtype == bool else x.astype(np.float32) for x in drawn))


class Sac:
    """SAC with a learned temperature (Haarnoja et al. 2018, arXiv 1812.05905): all losses at once, at every step."""

    def __init__(self, states: int, actions: int) -> None:
        from tensordict.nn import TensorDictModule
        from torchrl.modules import ProbabilisticActor, TanhNormal
        from torchrl.objectives import SACLoss, SoftUpdate

        self.policy = GaussianPolicy((states, 256, 256, 2 * actions))
        actor = ProbabilisticActor(
            TensorDictModule(_Moments(self.policy), ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            return_log_prob=True,
        )
        options = {"loss_function": "l2", "target_entropy": -float(actions)}
        self.loss = with_discount(SACLoss(actor, q_networks(states, actions), **options))
        self._targets = SoftUpdate(self.loss, tau=0.005)
        temperature = torch.optim.Adam([self.loss.log_alpha], lr=LEARNING_RATE)
        self.optimizers: list[Any] = [
            adam(self.loss.actor_network_params),
            adam(self.loss.qvalue_network_params),
            temperature,
        ]

    def update(self, batch: TensorDict) -> None:
        losses = self.loss(batch)
        descend(losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"], *self.optimizers)
        self._targets.step()


class _Moments(nn.Module):
    """What torchrl's actor calls: the policy's mean and standard deviation, with its parameters."""

    def __init__(self, policy: GaussianPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy.moments(observations)


@contextmanager
def learned(
    env_id: str, recipe: dict[str, Any], *, expected: int, checkpoint: Path, progress: bool
) -> Iterator[History]:
    """Trains a learner in an environment and gives its history, for as long as the block that uses it.

    Twin critics and a tanh-Gaussian policy of two hidden layers of 256 ReLU units, batches of 256 of the whole history,
    Adam at 3e-4, discount 0.99, target networks moved by 0.005 a step, a temperature for an entropy of −A; one update a
    step after 5,000 of uniformly random actions. One thread, so that the bits do not depend on their number.

    Args:
        env_id: of one of MuJoCo's locomotion environments, whose actions lie between −1 and 1.
        recipe: "seed" of the environment, the networks and all draws; "steps", the number of transitions, where
            "until_return" is None, else the mean return at which it ends, of the mean action over 5 episodes, looked at
            every 5,000 steps. A checkpoint must agree with all of it.
        expected: about how many steps the return takes, for the progress bar; ten times as many are the most.
        checkpoint: kept every 5,000 steps, at Ctrl-C and at the end, and removed when the block has ended well.
        progress: show a progress bar with the return, steps a second and the time that is left.

    Raises:
        ImportError: MuJoCo is not installed.
        ValueError: the checkpoint is damaged or of another training, or the environment no longer acts as it did.
        OSError: the checkpoint cannot be written; found before the first step.
        BlockingIOError: another process trains with this checkpoint.
        RuntimeError: the return was not reached within ten times the expected steps.
        KeyboardInterrupt: Ctrl-C; the step under way is finished and saved first. A second Ctrl-C stops at once.
    """
    with closing(make_env(env_id)) as env:
        sizes = [int(space.shape[0]) for space in (env.observation_space, env.action_space) if space.shape]
    check_writable(checkpoint)
    with deferred_interrupt() as interrupted, locked(checkpoint):
        total = recipe["steps"] if recipe["until_return"] is None else expected
        bar = partial(progress_bar, total=total, desc=f"learning {env_id}", unit="step", show=progress)
        yield _history(env_id, sizes, recipe, PATIENCE * expected, checkpoint, interrupted, bar)
        checkpoint.unlink(missing_ok=True)
        if interrupted():
            raise KeyboardInterrupt("stopped after the last step; the dataset is there")


def _history(
    env_id: str,
    sizes: list[int],
    recipe: dict[str, Any],
    most: int,
    checkpoint: Path,
    interrupted: Callable[[], bool],
    bar_from: Callable[..., Any],
) -> History:
    """The loop: from the checkpoint, where there is one, to the last step, of `most` at the most."""
    provenance = {**recipe, **{package: version(package) for package in ("gymnasium", "mujoco")}}
    with torch.random.fork_rng(devices=[]), one_thread():
        # torchrl draws from the global generator; torch.manual_seed would seed the GPUs' generators too.
        torch.default_generator.manual_seed(recipe["seed"])
        sac, history = _begin(sizes, checkpoint, provenance)
        with closing(_environment(env_id, recipe["seed"], history)) as envs, bar_from(initial=len(history)) as bar:
            while not _done(history, recipe):
                if recipe["until_return"] is not None and len(history) >= most:
                    _give_up(history, recipe["until_return"], checkpoint)
                _step(envs, sac, history)
                if len(history) % LOOK_EVERY == 0:
                    history.returns.append((len(history), evaluate(sac.policy, env_id, episodes=EPISODES).mean))
                if history.returns:
                    bar.set_postfix({"return": f"{history.returns[-1][1]:.0f}"}, refresh=False)
                bar.update()
                stop = interrupted() and not _done(history, recipe)
                if stop or _done(history, recipe) or len(history) % CHECKPOINT_EVERY == 0:
                    columns = {name: torch.from_numpy(column) for name, column in history.columns.items()}
                    more = {"history": columns, "returns": history.returns}
                    write_torch(checkpoint, state_of(len(history), sac, provenance, **more))
                if stop:
                    where = f"stopped after step {len(history)}"
                    raise KeyboardInterrupt(f"{where}; the same call goes on to the same result")
    return history


def _give_up(history: History, wanted: float, checkpoint: Path) -> NoReturn:
    best = max(reached for _, reached in history.returns)
    raise RuntimeError(
        f"after {len(history):,} steps the learner's best return is {best:.0f}, and it was to reach {wanted:.0f}: "
        f"delete {checkpoint}, and try another seed or say how many steps to keep"
    )


def _done(history: History, recipe: dict[str, Any]) -> bool:
    if recipe["until_return"] is None:
        return len(history) == recipe["steps"]
    return bool(history.returns) and history.returns[-1][1] >= recipe["until_return"]


def _begin(sizes: list[int], checkpoint: Path, provenance: dict[str, Any]) -> tuple[Sac, History]:
    """A new learner without a history, or both as the checkpoint holds them."""
    sac = Sac(*sizes)
    if not checkpoint.exists():
        return sac, History.empty(*sizes)
    state = go_on(checkpoint, sac, provenance)
    with damage_named(checkpoint, CHECKPOINT):
        columns = {name: column.numpy() for name, column in state["history"].items()}
        return sac, History(columns, state["step"], [tuple(look) for look in state["returns"]])


def _environment(env_id: str, seed: int, history: History) -> SeededEnvs:
    """The environment after the last of these transitions: the episode under way is repeated."""
    ends = history.ends()
    begun = int(ends[-1]) if len(ends) else 0
    envs = SeededEnvs(env_id, [map(partial(episode_seed, seed), itertools.count(len(ends)))])
    for action, following in zip(history.columns["actions"][begun:], history.columns["following"][begun:], strict=True):
        if not np.array_equal(envs.step(action[None])[0][0], following):
            envs.close()
            raise ValueError(
                f"{env_id} does not repeat the episode under way in the checkpoint: this machine or its MuJoCo is "
                "another. Go on where it was written, or delete the checkpoint to start anew"
            )
    return envs


def _step(envs: SeededEnvs, sac: Sac, history: History) -> None:
    """Acts once, at random in the beginning, and learns."""
    observations, random = envs.observations, len(history) < RANDOM_STEPS
    if random:
        actions = torch.rand(1, *envs.action_space.shape).numpy() * 2 - 1
    else:
        actions = act(lambda x: sac.policy.sample(x, torch.default_generator), observations, envs.action_space)
    history.append(*(part[0] for part in (observations, actions, *envs.step(actions))))
    if not random:
        sac.update(history.batch())
