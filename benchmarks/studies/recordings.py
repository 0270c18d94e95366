"""What the battery is made of: environments, and for each a trained policy and a Minari dataset that it recorded.

A policy is trained by SBX, stable-baselines3 in JAX, whose steps take a fifth of the time here. It gets a budget of CPU
seconds on one thread, compilation included, and becomes whatever it becomes. Five times along the way it runs three
episodes; the best of the five is the teacher, saved as a stable-baselines3 model, <folder>/<task>.zip. The dataset
<folder>/minari/battery/<task>-v0 holds whole episodes with exploration noise (an actor's sampled actions, or a share ε
of random ones): one third of the transitions by the snapshot half-way to the teacher, two thirds by the teacher.

Hyperparameters follow rl-baselines3-zoo (https://github.com/DLR-RM/rl-baselines3-zoo) where it has the environment;
networks, batches and replay buffers are smaller, for the budgets are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

TRANSITIONS = 20_000  # of each dataset
SNAPSHOTS, SNAPSHOT_EPISODES = 5, 3
EPISODES = 20  # by which the random policy and the teacher are told
STREAMS = 8  # environments side by side
SEED = 0
SAC: dict[str, Any] = {"buffer_size": 200_000, "learning_starts": 1_000, "batch_size": 128, "net_arch": [128, 128]}
EVERY: dict[str, Any] = {"train_freq": 4, "gradient_steps": 4 * STREAMS}  # an update a step, many at once
DQN: dict[str, Any] = {"buffer_size": 100_000, "net_arch": [128, 128]}

Act = Callable[[np.ndarray], np.ndarray]  # observations (B, D) -> actions


@dataclass(frozen=True)
class Task:
    """An environment of the battery and how its policy is trained.

    Attributes:
        env_id: Gymnasium id.
        seconds: CPU seconds of training, on one thread.
        kwargs: arguments of the environment.
        algorithm: "SAC" or "DQN".
        settings: of the algorithm, away from `SAC` or `DQN` and `EVERY`; train_freq counts steps of STREAMS
            environments.
        noise: standard deviation of an Ornstein-Uhlenbeck noise on the actions while training.
        steps: environment steps after which training ends in any case.
    """

    env_id: str
    seconds: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    algorithm: str = "SAC"
    settings: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.0
    steps: int = 1_000_000

    def make(self) -> gym.Env:
        """The environment; a dictionary of observations is made one vector by a wrapper."""
        env = gym.make(self.env_id, **self.kwargs)
        return gym.wrappers.FlattenObservation(env) if isinstance(env.observation_space, gym.spaces.Dict) else env

    def hyperparameters(self) -> dict[str, Any]:
        return (SAC if self.algorithm == "SAC" else DQN) | EVERY | self.settings


TASKS = {
    "pendulum": Task("Pendulum-v1", 40, settings={"learning_rate": 1e-3, "net_arch": [64, 64]}, steps=15_000),
    "cartpole": Task(
        "CartPole-v1",
        50,
        algorithm="DQN",
        settings={
            **{"learning_rate": 2.3e-3, "batch_size": 64, "learning_starts": 1_000, "target_update_interval": 10},
            **{"train_freq": 256 // STREAMS, "gradient_steps": 128},
            **{"exploration_fraction": 0.16, "exploration_final_eps": 0.04},
        },
        steps=50_000,
    ),
    "inverted-double-pendulum": Task("InvertedDoublePendulum-v5", 50),
    "mountain-car": Task(
        "MountainCarContinuous-v0",
        50,
        settings={"ent_coef": 0.1, "gamma": 0.9999, "tau": 0.01, "net_arch": [64, 64]},
        noise=0.5,
        steps=50_000,
    ),
    "reacher": Task("Reacher-v5", 50),
    "lunar-lander-continuous": Task(
        "LunarLander-v3", 120, {"continuous": True}, settings={"learning_rate": 7.3e-4, "tau": 0.01}
    ),
    "pusher": Task("Pusher-v5", 40),
    "swimmer": Task("Swimmer-v5", 50, settings={"gamma": 0.9999}),
    "lunar-lander": Task(
        "LunarLander-v3",
        60,
        algorithm="DQN",
        settings={
            **{"learning_rate": 6.3e-4, "batch_size": 128, "learning_starts": 1_000, "target_update_interval": 250},
            **{"exploration_fraction": 0.12, "exploration_final_eps": 0.1},
        },
        steps=100_000,
    ),
    "ant": Task("Ant-v5", 90),
    "humanoid": Task("Humanoid-v5", 90),
    "maze": Task("gymnasium_robotics:PointMaze_UMazeDense-v3", 40),
    "hand": Task("gymnasium_robotics:AdroitHandDoor-v1", 50),
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
    (folder / "minari").mkdir(parents=True, exist_ok=True)
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")


def settings(name: str) -> dict[str, Any]:
    """Everything that a recording depends on besides the code and the machine's speed."""
    task = TASKS[name]
    return {
        **{"env_id": task.env_id, "env_kwargs": task.kwargs, "algorithm": task.algorithm, "noise": task.noise},
        **task.hyperparameters(),
        **{"cpu_seconds": task.seconds, "steps": task.steps, "transitions": TRANSITIONS, "seed": SEED},
    }


def record(name: str, folder: Path) -> dict[str, Any]:
    """Trains a task's policy and records its dataset; returns what they reach and what they cost.

    Where the two lie there already, they are made again and replaced.
    """
    task = TASKS[name]
    began = time.process_time()
    snapshots = train(task)
    trained = time.process_time() - began
    best = max(range(len(snapshots)), key=lambda i: snapshots[i][0])
    episodes: list[dict[str, Any]] = []
    torch.manual_seed(SEED)
    for snapshot, share in ((best // 2, TRANSITIONS // 3), (best, TRANSITIONS - TRANSITIONS // 3)):
        model = untrained(task)
        model.policy.load_state_dict(snapshots[snapshot][2])
        episodes += roll(task, explore(task, model), steps=share, seed=1_000_000 * (snapshot + 1))
    model.save(model_path(name, folder))
    write(name, episodes)
    space = model.action_space
    space.seed(SEED)
    random = roll(task, lambda states: np.array([space.sample() for _ in states]), count=EPISODES)
    teacher = roll(task, lambda states: model.predict(states, deterministic=True)[0], count=EPISODES)
    return {
        "random": _figures(random),
        "teacher": _figures(teacher),
        "data": _figures(episodes),
        "snapshots": [{"return": round(mean, 3), "steps": steps} for mean, steps, _ in snapshots],
        "used": [best // 2, best],
        "cpu_seconds": {"training": round(trained), "in_all": round(time.process_time() - began)},
    }


Snapshot = tuple[float, int, dict[str, Tensor]]  # return, environment steps, state of a stable-baselines3 policy


def train(task: Task) -> list[Snapshot]:
    """Trains a policy until its time is over; returns its snapshots in training order."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    import jax
    import sbx
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # compute in this thread
    began = time.process_time()
    own = task.hyperparameters()
    envs = make_vec_env(task.make, STREAMS, seed=SEED)
    if task.noise:
        shape = envs.action_space.shape
        own["action_noise"] = OrnsteinUhlenbeckActionNoise(np.zeros(shape), np.full(shape, task.noise))
    network = {"net_arch": own.pop("net_arch")}
    learner = getattr(sbx, task.algorithm)("MlpPolicy", envs, policy_kwargs=network, seed=SEED, **own)
    model, snapshots = untrained(task), []

    def snapshot() -> None:
        state = sb3_state(task, learner.policy)
        model.policy.load_state_dict(state)
        episodes = roll(task, lambda states: model.predict(states, deterministic=True)[0], count=SNAPSHOT_EPISODES)
        snapshots.append((_figures(episodes)["mean"], learner.num_timesteps, state))

    class Budget(BaseCallback):
        def _on_step(self) -> bool:
            done = max((time.process_time() - began) / task.seconds, self.num_timesteps / task.steps)
            if done < 1 and len(snapshots) + 1 <= done * SNAPSHOTS:
                snapshot()
            return done < 1

    learner.learn(task.steps, callback=Budget())
    snapshot()
    envs.close()
    return snapshots


def untrained(task: Task) -> Any:
    """A stable-baselines3 model of the task's networks."""
    import stable_baselines3 as sb3

    network = {"net_arch": task.hyperparameters()["net_arch"]}
    return getattr(sb3, task.algorithm)("MlpPolicy", task.make(), policy_kwargs=network, buffer_size=1, device="cpu")


def sb3_state(task: Task, policy: Any) -> dict[str, Tensor]:
    """The state of a stable-baselines3 policy that computes what a policy of SBX computes."""
    state: dict[str, Tensor] = {}

    def put(name: str, dense: Any, *index: int) -> None:
        state[f"{name}.weight"] = torch.from_numpy(np.array(dense["kernel"])[index].T.copy())
        state[f"{name}.bias"] = torch.from_numpy(np.array(dense["bias"])[index].copy())

    layers = len(task.hyperparameters()["net_arch"]) + 1
    if task.algorithm == "DQN":
        for network, params in (("q_net", policy.qf_state.params), ("q_net_target", policy.qf_state.target_params)):
            for layer in range(layers):
                put(f"{network}.q_net.{2 * layer}", params["params"][f"Dense_{layer}"])
        return state
    actor = policy.actor_state.params["params"]
    names = [*(f"actor.latent_pi.{2 * layer}" for layer in range(layers - 1)), "actor.mu", "actor.log_std"]
    for layer, name in enumerate(names):
        put(name, actor[f"Dense_{layer}"])
    for network, params in (("critic", policy.qf_state.params), ("critic_target", policy.qf_state.target_params)):
        for layer in range(layers):
            for twin in range(2):
                dense = params["params"]["VmapContinuousCritic_0"][f"Dense_{layer}"]
                put(f"{network}.qf{twin}.{2 * layer}", dense, twin)
    return state


def explore(task: Task, model: Any) -> Act:
    """What a policy does while it learns: sampled actions, or with probability ε a random one."""
    if task.algorithm == "SAC":
        return lambda states: model.predict(states, deterministic=False)[0]
    generator, epsilon = np.random.default_rng(SEED), task.settings["exploration_final_eps"]

    def act(states: np.ndarray) -> np.ndarray:
        greedy, _ = model.predict(states, deterministic=True)
        random = generator.integers(model.action_space.n, size=len(states))
        return np.where(generator.random(len(states)) < epsilon, random, greedy)

    return act


def roll(task: Task, act: Act, *, steps: int = 0, count: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Whole episodes, as Minari's EpisodeBuffer takes them: `count` of them, or as many as make up `steps`."""
    envs = [task.make() for _ in range(min(STREAMS, count or STREAMS))]
    started, finished = 0, []

    def start(env: gym.Env) -> dict[str, Any] | None:
        nonlocal started
        if started >= count if count else sum(len(e["actions"]) for e in finished) >= steps:
            return None
        first, _ = env.reset(seed=seed + started)
        started += 1
        columns: dict[str, Any] = {name: [] for name in ("actions", "rewards", "terminations", "truncations")}
        return {"observations": [first], **columns, "infos": {}, "seed": seed + started - 1}

    running = [(env, episode) for env in envs if (episode := start(env))]
    while running:
        actions = act(np.stack([episode["observations"][-1] for _, episode in running]))
        following = []
        for (env, episode), action in zip(running, actions, strict=True):
            observation, reward, terminated, truncated, _ = env.step(action)
            for name, value in (
                ("observations", observation),
                ("actions", action),
                ("rewards", float(reward)),
                ("terminations", terminated),
                ("truncations", truncated),
            ):
                episode[name].append(value)
            if terminated or truncated:
                finished.append(episode | {n: np.asarray(v) for n, v in episode.items() if isinstance(v, list)})
            following.append((env, start(env) if terminated or truncated else episode))
        running = [(env, episode) for env, episode in following if episode]
    for env in envs:
        env.close()
    return finished


def write(name: str, episodes: list[dict[str, Any]]) -> None:
    """Writes a task's Minari dataset, in place of one that is there."""
    import minari
    from minari.data_collector import EpisodeBuffer

    task = TASKS[name]
    if dataset_id(name) in minari.list_local_datasets():
        minari.delete_dataset(dataset_id(name))
    with task.make() as env:
        minari.create_dataset_from_buffers(
            dataset_id(name),
            [EpisodeBuffer(**episode) for episode in episodes],
            env=env,
            algorithm_name=task.algorithm,
            author="sdw_fast",
            description=f"{task.env_id} {task.kwargs or ''}: two snapshots of a policy, with exploration noise",
        )


def _figures(episodes: list[dict[str, Any]]) -> dict[str, float]:
    returns = [float(episode["rewards"].sum()) for episode in episodes]
    mean, std = float(np.mean(returns)), float(np.std(returns))
    return {"mean": round(mean, 3), "std": round(std, 3), "episodes": len(returns)}
