"""Discrete actions: CartPole-v1, 10,000 transitions of a noisy controller, distilled into 64 pairs.

Records the dataset into an .npz file, and prints, for three seeds, the returns of policies cloned on 64 distilled pairs
and on 64 random real pairs, and of a policy cloned on the whole dataset. The same from the shell:

    python examples/discrete.py --out discrete
    sdw-fast distill discrete/cartpole.npz --objective dbc --size 64 --steps 300 --eval-every 0 --out discrete/run
    sdw-fast evaluate discrete/run/last.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

import sdw_fast as sdw
from sdw_fast.evaluation import evaluate_synthetic
from sdw_fast.networks import orthogonal_parameters

ENV = "CartPole-v1"
SEEDS = range(3)
EPISODES, TEST_SEED = 20, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("discrete"), help="where to write (default: discrete)")
    parser.add_argument("--transitions", type=int, default=10_000, help="of the dataset (default: 10000)")
    parser.add_argument("--steps", type=int, default=300, help="outer steps (default: 300)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cartpole.npz"
    np.savez(path, **record(options.transitions), env_id=ENV)
    data = sdw.load_dataset(path)
    print(f"{len(data)} transitions, {data.units.actions}, mean return {data.episode_returns.mean():.1f}\n")
    print("seed  64 distilled  64 random  whole dataset")
    for seed in SEEDS:
        syn = sdw.distill(data, objective="dbc", size=64, steps=options.steps, eval_every=0, seed=seed, progress=False)
        syn.save(options.out / f"cartpole-{seed}.npz")
        sets = syn, sdw.real_pairs(data, 64, seed=seed)
        returns = [evaluate_synthetic(one, episodes=EPISODES, seed=TEST_SEED).mean for one in sets]
        returns.append(sdw.evaluate(clone_dataset(data, seed), ENV, episodes=EPISODES, seed=TEST_SEED).mean)
        print("{:4}{:14.1f}{:11.1f}{:15.1f}".format(seed, *returns), flush=True)


def record(transitions: int) -> dict[str, np.ndarray]:
    """Runs a controller that balances the pole, with three actions in ten drawn at random."""
    env, rng = gym.make(ENV), np.random.default_rng(0)
    rows = []
    observation, _ = env.reset(seed=0)
    for _ in range(transitions):
        position, velocity, angle, turning = observation
        action = int(3 * angle + turning + 0.1 * position + 0.2 * velocity > 0)
        action = int(rng.integers(2)) if rng.random() < 0.3 else action
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, terminated, truncated, following))
        observation = env.reset()[0] if terminated or truncated else following
    names = ("observations", "actions", "rewards", "terminations", "truncations", "next_observations")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def clone_dataset(data: sdw.TransitionDataset, seed: int, steps: int = 2_000) -> sdw.MLPPolicy:
    """Behavior cloning on all transitions, by Adam on minibatches."""
    generator = torch.Generator().manual_seed(seed)
    states, actions = torch.from_numpy(data.normalized_observations()), torch.from_numpy(data.actions)
    sizes = (states.shape[1], 256, 256, 256, 2)
    params = [p[0].requires_grad_() for p in orthogonal_parameters(sizes, gain=1.0, generators=[generator])]
    optimizer = torch.optim.Adam(params, 3e-4)
    for _ in range(steps):
        rows = torch.randint(len(data), (256,), generator=generator)
        optimizer.zero_grad()
        loss = sdw.ops.behavior_matching(params, states[rows], actions[rows], torch.ones(256), head="softmax")
        loss.backward()
        optimizer.step()
    return sdw.MLPPolicy(params, data.units)


if __name__ == "__main__":
    main()
