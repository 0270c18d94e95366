"""Trains the hopper-medium teacher that ships in sdw_fast/assets, and measures what it returns.

The data first, then the teacher (with one thread: the networks are small, and the result then repeats bit for bit):

    sdw-fast collect hopper/medium --steps 100000 --seed 0
    OMP_NUM_THREADS=1 python examples/train_hopper_teacher.py --out hopper-medium-teacher.safetensors

The weights are stored in half precision, and it is the stored teacher that is measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sdw_fast as sdw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="sdw/hopper/medium-v0")
    parser.add_argument("--algorithm", choices=["td3bc", "iql"], default="iql")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alpha", type=float, default=2.5, help="td3bc: weight of Q against cloning")
    parser.add_argument("--expectile", type=float, default=0.8, help="iql: expectile of V")
    parser.add_argument("--temperature", type=float, default=6.0, help="iql: inverse temperature of the advantages")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("hopper-medium-teacher.safetensors"))
    args = parser.parse_args()

    data = sdw.load_dataset(args.dataset)
    trained = sdw.train_teacher(
        data,
        args.algorithm,
        steps=args.steps,
        seed=args.seed,
        alpha=args.alpha,
        expectile=args.expectile,
        temperature=args.temperature,
    )
    trained.save(args.out, half=True)
    teacher = sdw.Teacher.load(args.out)

    result = sdw.evaluate(teacher.actions, data.env_id or "Hopper-v5", episodes=args.episodes, seed=0)
    values = teacher.values(data.observations, data.actions)
    teacher.provenance["evaluation"] = {
        "episodes": args.episodes,
        "return_mean": result.mean,
        "return_std": result.std,
        "normalized_mean": result.normalized_mean,
        "normalized_std": result.normalized_std,
    }
    teacher.save(args.out, half=True)
    print(f"data: {data.summary()}")
    print(f"{args.out}: {result}")
    print(
        f"Q on the data: mean {values.mean():.1f}, from {values.min():.1f} to {values.max():.1f}; "
        f"{(values < 0).mean():.2%} negative; at the teacher's actions "
        f"{teacher.values(data.observations, teacher.actions(data.observations)).mean():.1f}"
    )


if __name__ == "__main__":
    main()
