"""The locomotion suite: shipped policies rolled out in Gymnasium's MuJoCo environments into local Minari datasets.

The datasets stand in for D4RL's where those cannot be had, and are named `sdw/<env>/<quality>-v0`, for hopper, walker2d
and halfcheetah, with D4RL's qualities:

    medium          one policy at about a third of the expert's return, its actions sampled
    expert          the best policy of the training run, its actions sampled
    medium-replay   earlier policies and the medium one in training order, a stand-in for the learner's replay buffer
    medium-expert   medium, then expert, half and half

`assets/README.md` says where the policies come from and what they reach.
"""

from __future__ import annotations

import itertools
import json
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sdw_fast.disk import recover_folder, replacing_folder, reserve
from sdw_fast.files import read_safetensors, sealed, to_json, write_text
from sdw_fast.progress import progress_bar
from sdw_fast.readers import EPISODES, METADATA
from sdw_fast.units import d4rl_scores
from sdw_fast.version import __version__

QUALITIES = ("medium", "medium-replay", "medium-expert", "expert")
_LOG_STD_BOUNDS = (-20.0, 2.0)
_FULL_EPISODE = 1000  # steps; a stream shorter than this would hold cut episodes only


@dataclass(frozen=True)
class Snapshots:
    """The shipped policies of one environment, by the environment steps that they were trained for."""

    env_id: str
    earlier: tuple[int, ...]
    medium: int
    expert: int

    def of(self, quality: str) -> tuple[int, ...]:
        """The policies that make up a quality, in the order of their shares."""
        return {
            "medium": (self.medium,),
            "medium-replay": (*self.earlier, self.medium),
            "medium-expert": (self.medium, self.expert),
            "expert": (self.expert,),
        }[quality]


SUITE = {
    "hopper": Snapshots("Hopper-v5", earlier=(20_000, 50_000), medium=70_000, expert=110_000),
    "walker2d": Snapshots("Walker2d-v5", earlier=(80_000, 160_000), medium=240_000, expert=600_000),
    "halfcheetah": Snapshots("HalfCheetah-v5", earlier=(30_000, 70_000), medium=100_000, expert=300_000),
}


class GaussianPolicy(nn.Module):
    """A SAC actor: a ReLU MLP from raw observations to the mean and log-std of a Gaussian squashed by tanh.

    `forward` gives the mean action, so that it can be evaluated as it is; `sample` draws actions.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        """Makes the layers between the given widths: (D, hidden, ..., 2A)."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Mean actions (B, A), in −1 to 1, of observations (B, D)."""
        mean, _ = self._moments(observations)
        return torch.tanh(mean)

    def sample(self, observations: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draws actions (B, A), in −1 to 1, for observations (B, D)."""
        mean, log_std = self._moments(observations)
        noise = torch.randn(mean.shape, generator=generator)
        return torch.tanh(mean + log_std.clamp(*_LOG_STD_BOUNDS).exp() * noise)

    def _moments(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.relu(layer(x))
        return last(x).chunk(2, dim=-1)


def load_policy(env: str, trained_steps: int) -> GaussianPolicy:
    """Loads a shipped policy of "hopper", "walker2d" or "halfcheetah" by its training steps (see `SUITE`)."""
    with as_file(files("sdw_fast") / "assets" / f"{env}-{trained_steps}.safetensors") as path:
        state = {name: tensor.float() for name, tensor in read_safetensors(path)[0].items()}
    weights = [state[f"layers.{i}.weight"] for i in range(len(state) // 2)]
    with torch.device("meta"):  # nothing is drawn from PyTorch's global random state
        policy = GaussianPolicy((weights[0].shape[1], *(w.shape[0] for w in weights)))
    policy.load_state_dict(state, assign=True)
    return policy.eval()


def collect(name: str, *, steps: int = 100_000, seed: int = 0, progress: bool = True, overwrite: bool = False) -> str:
    """Makes a dataset of the locomotion suite, as a local Minari dataset, and returns its id for `load_dataset`.

    The same name, steps and seed give the same bits on the same machine. A dataset that was collected so before is
    kept, and its id returned at once. The dataset appears when it is complete: an interruption leaves nothing behind.

    Args:
        name: "<env>/<quality>", env in hopper, walker2d, halfcheetah, quality in medium, medium-replay, medium-expert,
            expert.
        steps: number of transitions. They come from up to 16 streams of whole episodes; the last of each stream is cut
            (truncated) where its share ends.
        seed: of the environments and of the sampled actions, at least 0.
        progress: show a progress bar.
        overwrite: replace a dataset of this name that was collected with other steps, seed or policies.

    Raises:
        ValueError: on an unknown name, or steps or seed out of range.
        FileExistsError: if the name holds a dataset that was collected otherwise and `overwrite` is not set.
        ImportError: if MuJoCo is not installed.
    """
    from minari.storage.datasets_root_dir import get_dataset_path

    env, quality = _parse(name)
    snapshots = SUITE[env]
    policies = snapshots.of(quality)
    if steps < len(policies):
        raise ValueError(f"steps must be at least {len(policies)}, one for each policy of {quality}, got {steps}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    dataset_id = f"sdw/{env}/{quality}-v0"
    recipe = {"env": env, "quality": quality, "steps": steps, "seed": seed, "policies_trained_steps": list(policies)}
    target = get_dataset_path(dataset_id)
    recover_folder(target)
    if not overwrite and _is_there(target, dataset_id, recipe):
        return dataset_id
    shares = [steps // len(policies) + (i < steps % len(policies)) for i in range(len(policies))]
    episodes: list[dict[str, Any]] = []
    with progress_bar(total=steps, desc=f"collect {env}/{quality}", unit="step", show=progress) as bar:
        for phase, (trained_steps, share) in enumerate(zip(policies, shares, strict=True)):
            episodes += _rollout(snapshots.env_id, load_policy(env, trained_steps), share, (seed, phase), bar)
    try:
        _write(target, dataset_id, snapshots.env_id, recipe, episodes, overwrite)
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


def _rollout(env_id: str, policy: GaussianPolicy, steps: int, seed: tuple[int, int], bar: Any) -> list[dict[str, Any]]:
    """Samples exactly `steps` transitions from the policy, in streams that step together; episodes stream by stream."""
    from sdw_fast.rollout import BATCH, SeededEnvs, act, acting

    streams = max(1, min(BATCH, steps // _FULL_EPISODE))
    quotas = [steps // streams + (s < steps % streams) for s in range(streams)]
    envs = SeededEnvs(env_id, [map(partial(_episode_seed, seed, s), itertools.count()) for s in range(streams)])
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    length = max(quotas)
    with closing(envs), acting(policy):
        observations = np.empty((length + 1, *envs.observations.shape), envs.observations.dtype)
        actions = np.empty((length, streams, *envs.action_space.shape), envs.action_space.dtype)
        rewards = np.empty((length, streams))
        terminations = np.empty((length, streams), dtype=bool)
        truncations = np.empty((length, streams), dtype=bool)
        last_observations: dict[tuple[int, int], np.ndarray] = {}  # of episodes, by (step, stream)
        observations[0] = envs.observations
        for t in range(length):
            actions[t] = act(lambda x: policy.sample(x, generator), observations[t], envs.action_space)
            following, rewards[t], terminations[t], truncations[t] = envs.step(actions[t])
            observations[t + 1] = envs.observations
            for stream in np.flatnonzero(terminations[t] | truncations[t]).tolist():
                last_observations[t, stream] = following[stream]
            bar.update(sum(t < quota for quota in quotas))

    episodes = []
    for s, quota in enumerate(quotas):
        if not (terminations[quota - 1, s] or truncations[quota - 1, s]):
            truncations[quota - 1, s] = True  # the share ends here
        ends = np.flatnonzero(terminations[:quota, s] | truncations[:quota, s]) + 1
        for e, (start, end) in enumerate(itertools.pairwise([0, *map(int, ends)])):
            states = observations[start : end + 1, s].copy()
            states[-1] = last_observations.get((end - 1, s), states[-1])
            episodes.append(
                {
                    "seed": _episode_seed(seed, s, e),
                    "observations": states,
                    "actions": actions[start:end, s],
                    "rewards": rewards[start:end, s],
                    "terminations": terminations[start:end, s],
                    "truncations": truncations[start:end, s],
                    "infos": {},
                }
            )
    return episodes


def _episode_seed(seed: tuple[int, int], stream: int, episode: int) -> int:
    return int(np.random.SeedSequence([*seed, stream, episode]).generate_state(1)[0])


def _write(
    target: Path,
    dataset_id: str,
    env_id: str,
    recipe: dict[str, Any],
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
    with closing(make_env(env_id)) as env, replacing_folder(target, overwrite) as folder:
        reserve(folder, _size(episodes))
        storage = MinariStorage.new(folder / "data", env.observation_space, env.action_space, env.spec)
        storage.update_metadata(
            {
                "dataset_id": dataset_id,
                "minari_version": minari.__version__,
                "author": {"sdw_fast"},
                "algorithm_name": "SAC policies shipped with sdw_fast, actions sampled",
                "description": "Locomotion suite of sdw_fast, a stand-in for D4RL's dataset of this name",
                "requirements": ["gymnasium[mujoco]>=1.0"],
                **({"ref_min_score": scores[0], "ref_max_score": scores[1]} if scores else {}),
                "sdw_fast": {
                    "recipe": recipe,
                    "versions": {
                        "sdw_fast": __version__,
                        **{package: version(package) for package in ("gymnasium", "mujoco", "numpy", "torch")},
                    },
                },
            }
        )
        storage.update_episodes([EpisodeBuffer(**episode) for episode in episodes])
        metadata = json.loads((folder / METADATA).read_text())
        write_text(folder / METADATA, to_json(sealed(metadata, folder / EPISODES)))


def _size(episodes: list[dict[str, Any]]) -> int:
    """Bytes that the episodes take as HDF5, amply: their arrays, and the objects that hold them."""
    arrays = sum(value.nbytes for episode in episodes for value in episode.values() if isinstance(value, np.ndarray))
    return int(1.05 * arrays) + (32 << 10) * (len(episodes) + 8)


def _is_there(target: Path, dataset_id: str, recipe: dict[str, Any]) -> bool:
    """Whether a dataset was collected by this recipe before. Raises FileExistsError where it was by another."""
    if not target.exists():
        return False
    if (found := _recipe(target)) != recipe:
        raise FileExistsError(
            f"{dataset_id} at {target} was collected with {found or 'an unknown recipe'}, not {recipe}: pass "
            "overwrite=True (--overwrite) to replace it, or set MINARI_DATASETS_PATH to keep both"
        )
    return True


def _recipe(target: Path) -> dict[str, Any] | None:
    """The recipe that a dataset's folder was collected by, or None where it does not say."""
    try:
        return json.loads((target / METADATA).read_text())["sdw_fast"]["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
