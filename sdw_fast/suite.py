"""The locomotion suite: local Minari datasets of Gymnasium's MuJoCo environments, by shipped policies or by a learner.

The datasets stand in for D4RL's where those cannot be had, and are named `sdw/<env>/<quality>-v0`, for hopper, walker2d
and halfcheetah, with D4RL's qualities and one more:

    medium          one policy at about a third of the expert's return, its actions sampled
    expert          the best policy of the training run, its actions sampled
    medium-expert   medium, then expert, half and half
    medium-replay   all that a learner sees until it reaches the mean return of D4RL's medium; trained anew
    mixture         earlier policies and the medium one in training order, equal shares

`assets/README.md` says where the policies come from and what they reach.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdw_fast.config import checked_integer, checked_seed
from sdw_fast.disk import recover_folder, replacing_folder, reserve
from sdw_fast.files import read_safetensors, sealed, to_json, write_text
from sdw_fast.networks import GaussianPolicy
from sdw_fast.progress import progress_bar
from sdw_fast.readers import EPISODES, METADATA
from sdw_fast.units import d4rl_scores
from sdw_fast.version import __version__

if TYPE_CHECKING:
    from sdw_fast.learner import History

QUALITIES = ("medium", "mixture", "medium-replay", "medium-expert", "expert")
REPLAY = "medium-replay"  # the quality that no policy makes
STEPS = 100_000  # of the other qualities, where none are asked for
_FULL_EPISODE = 1000  # steps; a stream shorter than this would hold cut episodes only


@dataclass(frozen=True)
class Snapshots:
    """The shipped policies of one environment, by the environment steps that they were trained for.

    Attributes:
        medium_return: mean return of D4RL's medium dataset.
    """

    env_id: str
    earlier: tuple[int, ...]
    medium: int
    expert: int
    medium_return: float

    def of(self, quality: str) -> tuple[int, ...]:
        """The policies that make up a quality, in the order of their shares; none of medium-replay."""
        return {
            REPLAY: (),
            "medium": (self.medium,),
            "mixture": (*self.earlier, self.medium),
            "medium-expert": (self.medium, self.expert),
            "expert": (self.expert,),
        }[quality]


SUITE = {
    "hopper": Snapshots("Hopper-v5", earlier=(20_000, 50_000), medium=70_000, expert=110_000, medium_return=1422.0),
    "walker2d": Snapshots(
        "Walker2d-v5", earlier=(80_000, 160_000), medium=240_000, expert=600_000, medium_return=2852.0
    ),
    "halfcheetah": Snapshots(
        "HalfCheetah-v5", earlier=(30_000, 70_000), medium=100_000, expert=300_000, medium_return=4770.0
    ),
}


def load_policy(env: str, trained_steps: int) -> GaussianPolicy:
    """Loads a shipped policy of "hopper", "walker2d" or "halfcheetah" by its training steps (see `SUITE`)."""
    with as_file(files("sdw_fast") / "assets" / f"{env}-{trained_steps}.safetensors") as path:
        state = {name: tensor.float() for name, tensor in read_safetensors(path)[0].items()}
    weights = [state[f"layers.{i}.weight"] for i in range(len(state) // 2)]
    with torch.device("meta"):  # nothing is drawn from PyTorch's global random state
        policy = GaussianPolicy((weights[0].shape[1], *(w.shape[0] for w in weights)))
    policy.load_state_dict(state, assign=True)
    return policy.eval()


def collect(
    name: str, *, steps: int | None = None, seed: int = 0, progress: bool = True, overwrite: bool = False
) -> str:
    """Makes a dataset of the locomotion suite, as a local Minari dataset, and returns its id for `load_dataset`.

    The same name, steps and seed give the same bits on the same machine. A dataset that was collected so before is
    kept, and its id returned at once. The dataset appears when it is complete: an interruption leaves nothing behind
    but a learner's checkpoint.

    medium-replay is what D4RL means by it: every transition that a learner saw, in order, from the first random action
    until its mean action returns what D4RL's medium dataset does (over five episodes, looked at every 5,000 steps). The
    learner is SAC by torchrl (`pip install "sdw_fast[teacher]"`): two hidden layers of 256 ReLU units, batches of 256,
    Adam at 3e-4, discount 0.99, a learned temperature, one update a step after 5,000 of random actions. It takes about
    45 minutes of one core for Hopper, 70 for HalfCheetah and 160 for Walker2d, an estimate: 25 steps a second, and the
    steps that the shipped policies took to that level. `<dataset>.checkpoint` is kept beside the dataset every 5,000
    steps and at Ctrl-C; the same call goes on from it to the same bits.

    Args:
        name: "<env>/<quality>", env in hopper, walker2d, halfcheetah, quality in medium, mixture, medium-replay,
            medium-expert, expert.
        steps: number of transitions. None: 100,000, and of medium-replay as many as the learner takes. Those of
            policies come from up to 16 streams of whole episodes; the last of each stream is cut (truncated) where its
            share ends.
        seed: of the environments, of the sampled actions and of the learner, at least 0.
        progress: show a progress bar.
        overwrite: replace a dataset of this name that was collected with other steps, seed or policies.

    Raises:
        ValueError: on an unknown name, or steps or seed out of range; a learner's checkpoint is damaged or of
            another one.
        FileExistsError: if the name holds a dataset that was collected otherwise and `overwrite` is not set.
        ImportError: if MuJoCo is not installed, or for medium-replay torchrl.
        BlockingIOError: another process trains the learner of this dataset.
        RuntimeError: a learner has not reached the return within ten times the steps that it took the shipped policies.
        KeyboardInterrupt: Ctrl-C; a learner's step under way is finished and saved first.
    """
    from minari.storage.datasets_root_dir import get_dataset_path

    env, quality = _parse(name)
    snapshots = SUITE[env]
    policies = snapshots.of(quality)
    if steps is not None:
        steps = checked_integer("steps", steps)
    elif policies:
        steps = STEPS
    if steps is not None and steps < (least := len(policies) or 1):
        why = f", one for each policy of {quality}" if policies else ""
        raise ValueError(f"steps must be at least {least}{why}, got {steps}")
    seed = checked_seed("seed", seed)
    dataset_id = f"sdw/{env}/{quality}-v0"
    own: dict[str, Any] = {"policies_trained_steps": list(policies)}
    if not policies:
        own = {"learner": "sac", "until_return": snapshots.medium_return if steps is None else None}
    recipe = {"env": env, "quality": quality, "steps": steps, "seed": seed, **own}
    target = get_dataset_path(dataset_id)
    recover_folder(target)
    if not overwrite and _is_there(target, dataset_id, recipe):
        return dataset_id
    with ExitStack() as held:
        more: dict[str, Any] = {}
        if policies:
            episodes = _rolled_out(recipe, progress)
        else:
            history = held.enter_context(_learned(recipe, target, progress))
            episodes, more = history.episodes(seed), {"returns": history.returns}
        try:
            _write(target, dataset_id, snapshots.env_id, {"recipe": recipe, **more}, episodes, overwrite)
        except FileExistsError:  # another process has made it meanwhile
            if not _is_there(target, dataset_id, recipe):
                raise
    return dataset_id


def _parse(name: str) -> tuple[str, str]:
    env, _, quality = name.removeprefix("sdw/").removesuffix("-v0").partition("/")
    if env not in SUITE or quality not in QUALITIES:
        raise ValueError(
            f"unknown dataset {name!r}: expected <env>/<quality> with env in {', '.join(SUITE)} and quality in "
            f"{', '.join(QUALITIES)}"
        )
    return env, quality


def _learned(recipe: dict[str, Any], target: Path, progress: bool) -> AbstractContextManager[History]:
    """The history of a learner, whose state is kept beside the dataset until the block has written that."""
    from sdw_fast.training import require_torchrl

    require_torchrl("collecting medium-replay")
    from sdw_fast.learner import learned

    snapshots = SUITE[recipe["env"]]
    checkpoint = target.with_name(f"{target.name}.checkpoint")
    return learned(snapshots.env_id, recipe, expected=snapshots.medium, checkpoint=checkpoint, progress=progress)


def _rolled_out(recipe: dict[str, Any], progress: bool) -> list[dict[str, Any]]:
    """Episodes of shipped policies, in equal shares."""
    env, quality, steps, seed, policies = recipe.values()
    shares = [steps // len(policies) + (i < steps % len(policies)) for i in range(len(policies))]
    episodes: list[dict[str, Any]] = []
    with progress_bar(total=steps, desc=f"collect {env}/{quality}", unit="step", show=progress) as bar:
        for phase, (trained_steps, share) in enumerate(zip(policies, shares, strict=True)):
            episodes += _rollout(SUITE[env].env_id, load_policy(env, trained_steps), share, (seed, phase), bar)
    return episodes


def _rollout(env_id: str, policy: GaussianPolicy, steps: int, seed: tuple[int, int], bar: Any) -> list[dict[str, Any]]:
    """Samples exactly `steps` transitions from the policy, in streams that step together; episodes stream by stream."""
    from sdw_fast.rollout import BATCH, SeededEnvs, act, acting, episode_seed, episodes_of

    def seeds_of(stream: int) -> Iterator[int]:
        return map(partial(episode_seed, *seed, stream), itertools.count())

    streams = max(1, min(BATCH, steps // _FULL_EPISODE))
    quotas = [steps // streams + (s < steps % streams) for s in range(streams)]
    envs = SeededEnvs(env_id, [seeds_of(s) for s in range(streams)])
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    length = max(quotas)
    with closing(envs), acting(policy):
        observations = np.empty((length + 1, *envs.observations.shape), envs.observations.dtype)
        actions = np.empty((length, streams, *envs.action_space.shape), envs.action_space.dtype)
        rewards = np.empty((length, streams))
        terminations = np.empty((length, streams), dtype=bool)
        truncations = np.empty((length, streams), dtype=bool)
        last_observations: list[dict[int, np.ndarray]] = [{} for _ in quotas]  # of episodes, by their step
        observations[0] = envs.observations
        for t in range(length):
            actions[t] = act(lambda x: policy.sample(x, generator), observations[t], envs.action_space)
            following, rewards[t], terminations[t], truncations[t] = envs.step(actions[t])
            observations[t + 1] = envs.observations
            for stream in np.flatnonzero(terminations[t] | truncations[t]).tolist():
                last_observations[stream][t] = following[stream]
            bar.update(sum(t < quota for quota in quotas))

    episodes = []
    for s, quota in enumerate(quotas):
        following = observations[1 : quota + 1, s].copy()
        for t, last in last_observations[s].items():
            if t < quota:
                following[t] = last
        parts = (column[:quota, s] for column in (rewards, terminations, truncations))
        episodes += episodes_of(seeds_of(s), observations[:quota, s], actions[:quota, s], following, *parts)
    return episodes


def _write(
    target: Path,
    dataset_id: str,
    env_id: str,
    origin: dict[str, Any],
    episodes: list[dict[str, Any]],
    overwrite: bool,
) -> None:
    """Writes the Minari dataset under a hidden temporary name, then gives it its own."""
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import NAMESPACE_METADATA_FILENAME

    from sdw_fast.environments import make_env

    for namespace in list(target.parents)[: dataset_id.count("/")]:
        if not (namespace / NAMESPACE_METADATA_FILENAME).exists():  # Minari would write it in place
            write_text(namespace / NAMESPACE_METADATA_FILENAME, "{}")
    scores = d4rl_scores(env_id)
    learner = "learner" in origin["recipe"]
    packages = ("gymnasium", "mujoco", "numpy", "torch", *(("torchrl", "tensordict") * learner))
    with closing(make_env(env_id)) as env, replacing_folder(target, overwrite) as folder:
        reserve(folder, _size(episodes))
        storage = MinariStorage.new(folder / "data", env.observation_space, env.action_space, env.spec)
        storage.update_metadata(
            {
                "dataset_id": dataset_id,
                "minari_version": minari.__version__,
                "author": {"sdw_fast"},
                "algorithm_name": "SAC by torchrl, all that it saw"
                if learner
                else "SAC policies shipped with sdw_fast",
                "description": "Locomotion suite of sdw_fast, a stand-in for D4RL's dataset of this name",
                "requirements": ["gymnasium[mujoco]>=1.0"],
                **({"ref_min_score": scores[0], "ref_max_score": scores[1]} if scores else {}),
                "sdw_fast": {**origin, "versions": {"sdw_fast": __version__, **_versions(*packages)}},
            }
        )
        storage.update_episodes([EpisodeBuffer(**episode) for episode in episodes])
        metadata = json.loads((folder / METADATA).read_text())
        write_text(folder / METADATA, to_json(sealed(metadata, folder / EPISODES)))


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}


def _size(episodes: list[dict[str, Any]]) -> int:
    """Bytes that the episodes take as HDF5, amply: their arrays, and the objects that hold them."""
    arrays = sum(value.nbytes for episode in episodes for value in episode.values() if isinstance(value, np.ndarray))
    return int(1.05 * arrays) + (32 << 10) * (len(episodes) + 8)


def _is_there(target: Path, dataset_id: str, recipe: dict[str, Any]) -> bool:
    """Whether a dataset was collected by this recipe before. Raises FileExistsError where it was by another."""
    if not target.exists():
        return False
    if (found := _recipe(target)) != recipe:
        renamed = recipe["quality"] == REPLAY and "policies_trained_steps" in (found or {})
        earlier = " (what an earlier version called medium-replay is now the mixture)" * renamed
        raise FileExistsError(
            f"{dataset_id} at {target} was collected with {found or 'an unknown recipe'}{earlier}, not {recipe}: pass "
            "overwrite=True (--overwrite) to replace it, or set MINARI_DATASETS_PATH to keep both"
        )
    return True


def _recipe(target: Path) -> dict[str, Any] | None:
    """The recipe that a dataset's folder was collected by, or None where it does not say."""
    try:
        return json.loads((target / METADATA).read_text())["sdw_fast"]["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
