"""Measures the returns of the locomotion suite's shipped policies: the table of sdw_fast/assets/README.md.

    python -m benchmarks.studies.policies [hopper] [walker2d] [halfcheetah] [--episodes 20]

Each policy runs the same episodes (seeds 0, 1, ...) twice: with sampled actions, as datasets are collected, and with
the mean action.
"""

from __future__ import annotations

import argparse

import torch

from sdw_fast import Evaluation, evaluate
from sdw_fast.suite import QUALITIES, SUITE, load_policy


def cell(result: Evaluation) -> str:
    return f"{result.mean:.0f} ± {result.std:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("envs", nargs="*", metavar="env", choices=[[], *SUITE], help="all if none is given")
    parser.add_argument("--episodes", type=int, default=20)
    arguments = parser.parse_args()
    print("| file | environment | steps trained | used in | sampled actions | mean action | D4RL-normalized, sampled |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for env in arguments.envs or SUITE:
        snapshots = SUITE[env]
        for steps in (*snapshots.earlier, snapshots.medium, snapshots.expert):
            policy = load_policy(env, steps)
            generator = torch.Generator().manual_seed(0)
            sampled = evaluate(
                lambda x, p=policy, g=generator: p.sample(x, g), snapshots.env_id, episodes=arguments.episodes
            )
            mean = evaluate(policy, snapshots.env_id, episodes=arguments.episodes)
            used = ", ".join(quality for quality in QUALITIES if steps in snapshots.of(quality))
            normalized = sampled.normalized_mean
            print(
                f"| `{env}-{steps}` | {snapshots.env_id} | {steps:,} | {used} | {cell(sampled)} | {cell(mean)} "
                f"| {normalized:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
