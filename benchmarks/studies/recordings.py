"""What the battery is made of: environments, and for each a policy trained by stable-baselines3 and its Minari dataset.

A policy gets a budget of CPU seconds on one thread and becomes whatever it becomes. Six times along the way it runs
five episodes; the best of the six is the teacher, saved as <folder>/<task>.zip. The dataset <folder>/minari/battery/
<task>-v0 holds whole episodes with exploration noise (an actor's sampled actions, or a share ε of random ones): two
thirds of the transitions by the teacher, one third, first, by the snapshot half-way to it.

Hyperparameters follow rl-baselines3-zoo (https://github.com/DLR-RM/rl-baselines3-zoo) where it has the environment;
networks and replay buffers are smaller, for the budgets are.
"""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

TRANSITIONS = 20_000  # of each dataset
SNAPSHOTS, SNAPSHOT_EPISODES = 6, 5
EPISODES = 20  # by which the random policy and the teacher are told
SEED = 0
SAC = {"buffer_size": 200_000, "learning_starts": 1_000, "batch_size": 128, "net_arch": [128, 128]}


@dataclass(frozen=True)
class Task:
    """An environment of the battery and how its policy is trained.

    Attributes:
        env_id: Gymnasium id.
        seconds: CPU seconds of training, on one thread.
        kwargs: arguments of the environment.
        algorithm: "SAC" or "DQN" of stable-baselines3.
        settings: of the algorithm, away from `SAC` or its defaults; `net_arch` and `log_std_init` go to the network.
        steps: environment steps after which training ends in any case.
    """

    env_id: str
    seconds: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    algorithm: str = "SAC"
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 10_000_000

    def make(self) -> gym.Env:
        """The environment; a dictionary of observations is made one vector by a wrapper."""
        env = gym.make(self.env_id, **self.kwargs)
        return gym.wrappers.FlattenObservation(env) if isinstance(env.observation_space, gym.spaces.Dict) else env


TASKS = {
    "pendulum": Task("Pendulum-v1", 40, settings={"learning_rate": 1e-3, "net_arch": [64, 64]}, steps=20_000),
    "cartpole": Task(
        "CartPole-v1",
        60,
        algorithm="DQN",
        settings={
            **{"learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000, "learning_starts": 1_000},
            **{"target_update_interval": 10, "train_freq": 256, "gradient_steps": 128},
            **{"exploration_fraction": 0.16, "exploration_final_eps": 0.04, "net_arch": [128, 128]},
        },
        steps=100_000,
    ),
    "mountain-car": Task(
        "MountainCarContinuous-v0",
        75,
        settings={
            **{"batch_size": 512, "ent_coef": 0.1, "train_freq": 32, "gradient_steps": 32, "gamma": 0.9999},
            **{"tau": 0.01, "learning_starts": 0, "use_sde": True, "log_std_init": -3.67, "net_arch": [64, 64]},
        },
        steps=50_000,
    ),
    "inverted-double-pendulum": Task("InvertedDoublePendulum-v5", 90),
    "reacher": Task("Reacher-v5", 90),
    "pusher": Task("Pusher-v5", 150),
    "swimmer": Task("Swimmer-v5", 120, settings={"gamma": 0.9999}),
    "lunar-lander": Task(
        "LunarLander-v3",
        200,
        algorithm="DQN",
        settings={
            **{"learning_rate": 6.3e-4, "batch_size": 128, "buffer_size": 50_000, "learning_starts": 0},
            **{"target_update_interval": 250, "train_freq": 4, "gradient_steps": -1},
            **{"exploration_fraction": 0.12, "exploration_final_eps": 0.1, "net_arch": [128, 128]},
        },
        steps=250_000,
    ),
    "lunar-lander-continuous": Task(
        "LunarLander-v3", 200, {"continuous": True}, settings={"learning_rate": 7.3e-4, "tau": 0.01}
    ),
    "ant": Task("Ant-v5", 200, settings={"learning_starts": 5_000}),
    "humanoid": Task("Humanoid-v5", 200, settings={"learning_starts": 5_000}),
    "maze": Task("gymnasium_robotics:PointMaze_UMazeDense-v3", 120),
    "hand": Task("gymnasium_robotics:AdroitHandDoor-v1", 150),
}


def dataset_id(task: str) -> str:
    return f"battery/{task}-v0"


def model_path(task: str, folder: Path) -> Path:
    return folder / f"{task}.zip"


def exists(task: str, folder: Path) -> bool:
    """Whether a task's model and dataset lie here."""
    return model_path(task, folder).exists() and (folder / "minari" / dataset_id(task)).exists()


def use(folder: Path) -> None:
    """Has Minari keep its datasets in this folder."""
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")


def record(name: str, folder: Path) -> dict[str, Any]:
    """Trains a task's policy and records its dataset; returns what they reach and what they cost.

    Where the two lie there already, they are made again and replaced.
    """
    task = TASKS[name]
    torch.set_num_threads(1)
    began = time.process_time()
    model, snapshots = train(task)
    trained = time.process_time() - began
    best = max(range(len(snapshots)), key=lambda i: snapshots[i][0])
    returns: list[float] = []
    collector = _collector(task)
    for snapshot, share in ((best // 2, TRANSITIONS // 3), (best, TRANSITIONS - TRANSITIONS // 3)):
        model.policy.load_state_dict(snapshots[snapshot][2])
        returns += roll(collector, model, share, seed=1_000 * (len(returns) + 1))
    model.save(model_path(name, folder))
    _write(collector, name, task)
    with task.make() as env:
        random = [_episode(env, lambda _: env.action_space.sample(), seed) for seed in range(EPISODES)]
        teacher = [_episode(env, lambda s: model.predict(s, deterministic=True)[0], seed) for seed in range(EPISODES)]
    return {
        "random": _figures([r for r, _ in random]),
        "teacher": _figures([r for r, _ in teacher]),
        "data": _figures(returns),
        "snapshots": [{"return": round(r, 3), "steps": steps} for r, steps, _ in snapshots],
        "used": [best // 2, best],
        "cpu_seconds": {"training": round(trained), "in_all": round(time.process_time() - began)},
    }


def settings(name: str) -> dict[str, Any]:
    """Everything that a recording depends on besides the code and the machine's speed."""
    task = TASKS[name]
    shared = {"transitions": TRANSITIONS, "snapshots": SNAPSHOTS, "seed": SEED}
    own = (SAC if task.algorithm == "SAC" else {}) | task.settings
    limits = {"cpu_seconds": task.seconds, "steps": task.steps}
    return {"env_id": task.env_id, "env_kwargs": task.kwargs, "algorithm": task.algorithm, **own, **limits, **shared}


def train(task: Task) -> tuple[Any, list[tuple[float, int, dict[str, Any]]]]:
    """A trained model, and (return, environment steps, policy's state) of its snapshots in training order."""
    import stable_baselines3 as sb3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    own = (SAC if task.algorithm == "SAC" else {}) | task.settings
    network = {name: own.pop(name) for name in ("net_arch", "log_std_init") if name in own}
    network["optimizer_kwargs"] = {"fused": True}
    model = getattr(sb3, task.algorithm)(
        "MlpPolicy", task.make(), policy_kwargs=network, seed=SEED, device="cpu", **own
    )
    snapshots: list[tuple[float, int, dict[str, Any]]] = []
    evaluated = Monitor(task.make())
    evaluated.reset(seed=SEED + 1)
    began = time.process_time()

    def snapshot() -> None:
        mean, _ = evaluate_policy(model, evaluated, SNAPSHOT_EPISODES)
        snapshots.append((float(mean), model.num_timesteps, copy.deepcopy(model.policy.state_dict())))

    class Budget(BaseCallback):
        def _on_step(self) -> bool:
            share = (time.process_time() - began) / task.seconds
            done = max(share, self.num_timesteps / task.steps)
            if done < 1 and len(snapshots) + 1 <= done * SNAPSHOTS:
                snapshot()
            return done < 1

    model.learn(task.steps, callback=Budget())
    snapshot()
    return model, snapshots


def roll(env: gym.Env, model: Any, steps: int, seed: int) -> list[float]:
    """Returns of whole episodes with exploration noise, as many as make up this number of steps."""
    returns: list[float] = []
    while steps > 0:
        if getattr(model, "use_sde", False):
            model.actor.reset_noise()
        total, length = _episode(env, lambda s: model.predict(s, deterministic=False)[0], seed + len(returns))
        returns.append(total)
        steps -= length
    return returns


def _episode(env: gym.Env, act: Any, seed: int) -> tuple[float, int]:
    """Return and length of an episode."""
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    total, length, over = 0.0, 0, False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(act(observation))
        total, length, over = total + float(reward), length + 1, terminated or truncated
    return total, length


def _collector(task: Task) -> Any:
    import minari

    Path(os.environ["MINARI_DATASETS_PATH"]).mkdir(parents=True, exist_ok=True)
    return minari.DataCollector(task.make())


def _write(collector: Any, name: str, task: Task) -> None:
    import minari

    if dataset_id(name) in minari.list_local_datasets():
        minari.delete_dataset(dataset_id(name))
    collector.create_dataset(
        dataset_id(name),
        algorithm_name=task.algorithm,
        author="sdw_fast",
        description=f"{task.env_id} {task.kwargs or ''}: two snapshots of a policy, with exploration noise",
    )
    collector.close()


def _figures(returns: list[float]) -> dict[str, float]:
    return {
        "mean": round(float(np.mean(returns)), 3),
        "std": round(float(np.std(returns)), 3),
        "episodes": len(returns),
    }
