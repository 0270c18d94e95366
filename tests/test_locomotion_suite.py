"""The locomotion suite: exact counts, true transitions, determinism, and no half-written dataset."""

from __future__ import annotations

import json
from pathlib import Path

import minari
import numpy as np
import pytest
import torch
from minari.dataset._storages.hdf5_storage import HDF5Storage
from safetensors import safe_open

from sdw_fast import disk, suite
from sdw_fast.environments import make_env
from sdw_fast.evaluation import evaluate
from sdw_fast.networks import GaussianPolicy
from sdw_fast.readers import load_dataset
from sdw_fast.suite import QUALITIES, SUITE, collect, load_policy
from sdw_fast.units import Affine

ASSETS = Path(suite.__file__).parent / "assets"


@pytest.fixture(autouse=True)
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def quick(name: str, steps: int = 300, seed: int = 0, overwrite: bool = False) -> str:
    return collect(name, steps=steps, seed=seed, progress=False, overwrite=overwrite)


@pytest.mark.parametrize("env", list(SUITE))
@pytest.mark.parametrize("quality", QUALITIES)
def test_every_dataset_has_exactly_the_steps_asked_for(env: str, quality: str) -> None:
    if quality == "medium-replay":
        pytest.importorskip("torchrl")
    assert quick(f"{env}/{quality}", steps=101) == f"sdw/{env}/{quality}-v0"
    data = load_dataset(f"{env}/{quality}")
    reference = make_env(SUITE[env].env_id)
    assert data.env_id == SUITE[env].env_id
    assert data.observations.shape == (101, *reference.observation_space.shape)  # type: ignore[misc]
    assert data.actions.shape == (101, *reference.action_space.shape)  # type: ignore[misc]
    assert np.abs(data.actions).max() <= 1
    assert data.units.actions == Affine.between(-np.ones(data.actions.shape[1]), np.ones(data.actions.shape[1]))
    assert data.summary()["normalized_return_mean"] is not None


def test_episodes_replay_in_the_environment_from_their_seeds() -> None:
    dataset = minari.load_dataset(quick("hopper/medium-expert", steps=4001))  # two streams for each of two policies
    assert dataset.total_steps == 4001
    assert dataset.env_spec.id == "Hopper-v5"
    env = make_env("Hopper-v5")
    seeds = [m["seed"] for m in dataset.storage.get_episode_metadata(dataset.episode_indices)]
    assert len(set(seeds)) == len(seeds) == dataset.total_episodes > 4
    cut = 0
    for seed, episode in zip(seeds, dataset, strict=True):
        observations = [env.reset(seed=seed)[0]]
        rewards, terminations, truncations = [], [], []
        for action in episode.actions:
            for log, value in zip(
                (observations, rewards, terminations, truncations), env.step(action)[:4], strict=True
            ):
                log.append(value)
        np.testing.assert_array_equal(episode.observations, observations)
        np.testing.assert_array_equal(episode.rewards, rewards)
        np.testing.assert_array_equal(episode.terminations, terminations)
        np.testing.assert_array_equal(episode.truncations[:-1], truncations[:-1])
        assert not any(truncations[:-1])
        assert episode.terminations[-1] or episode.truncations[-1]
        cut += bool(episode.truncations[-1] and not truncations[-1])
    assert cut <= 4  # at most one for each stream


def test_same_seed_same_file_and_another_seed_another() -> None:
    def contents(seed: int) -> bytes:
        dataset_id = quick("hopper/medium", steps=np.int64(2001), seed=np.int64(seed), overwrite=True)  # two streams
        return (Path(minari.load_dataset(dataset_id).storage.data_path) / "main_data.hdf5").read_bytes()

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = contents(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert contents(3) == first
    assert contents(4) != first


def test_the_seed_reaches_environments_and_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    def standard(env: str, trained_steps: int) -> GaussianPolicy:
        """Mean 0 and deviation 1 whatever the state: actions differ by the draws alone."""
        policy = load_policy(env, trained_steps)
        torch.nn.init.zeros_(policy.layers[-1].weight)
        torch.nn.init.zeros_(policy.layers[-1].bias)
        return policy

    monkeypatch.setattr(suite, "load_policy", standard)
    datasets = []
    for options in ({}, {"seed": 0}, {"seed": 1}):
        collect("hopper/expert", steps=20, progress=False, overwrite=True, **options)
        datasets.append(load_dataset("hopper/expert"))
    default, zero, one = datasets
    np.testing.assert_array_equal(default.observations, zero.observations)
    np.testing.assert_array_equal(default.actions, zero.actions)
    assert not np.array_equal(zero.observations[0], one.observations[0])  # the environment's reset
    assert not np.array_equal(zero.actions[0], one.actions[0])
    assert 0.3 < np.arctanh(zero.actions.astype(np.float64)).std() < 3  # sampled, not the mean


def test_shares_come_in_training_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(env: str, trained_steps: int) -> GaussianPolicy:
        policy = load_policy(env, trained_steps)
        torch.nn.init.zeros_(policy.layers[-1].weight)
        with torch.no_grad():
            policy.layers[-1].bias.copy_(torch.tensor([trained_steps / 1e5] * 3 + [-20.0] * 3))
        return policy

    monkeypatch.setattr(suite, "load_policy", constant)
    quick("hopper/mixture", steps=31)
    hopper = SUITE["hopper"]
    trained = [*hopper.earlier, hopper.medium]
    expected = np.repeat(np.tanh(np.array(trained) / 1e5), [11, 10, 10])
    np.testing.assert_allclose(load_dataset("hopper/mixture").actions[:, 0], expected, rtol=1e-5)


def test_collected_dataset_is_kept_and_never_silently_replaced(
    minari_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick("hopper/medium")
    path = minari_root / "sdw/hopper/medium-v0/data/main_data.hdf5"
    before = path.stat().st_mtime_ns
    assert quick("sdw/hopper/medium-v0") == "sdw/hopper/medium-v0"
    assert path.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match=r"'steps': 300.* not .*'steps': 200.*--overwrite"):
        quick("hopper/medium", steps=200)
    with pytest.raises(FileExistsError, match="seed"):
        quick("hopper/medium", seed=1)
    assert len(load_dataset("hopper/medium")) == 300
    quick("hopper/medium", steps=200, overwrite=True)
    assert len(load_dataset("hopper/medium")) == 200
    (path.parent / "metadata.json").write_text("{}")
    with pytest.raises(FileExistsError, match="an unknown recipe"):
        quick("hopper/medium", steps=200)


def test_interruption_leaves_nothing_and_keeps_what_was_there(
    minari_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    folder = minari_root / "sdw" / "hopper"
    for owner, method in ((GaussianPolicy, "sample"), (HDF5Storage, "update_episodes")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, interrupted)
            with pytest.raises(KeyboardInterrupt):
                quick("hopper/medium")
        assert not minari.list_local_datasets()
        assert not folder.exists() or [p.name for p in folder.iterdir()] == ["namespace_metadata.json"]

    quick("hopper/medium")
    with monkeypatch.context() as patch:
        patch.setattr(HDF5Storage, "update_episodes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quick("hopper/medium", steps=200, overwrite=True)
    assert len(load_dataset("hopper/medium")) == 300
    assert {p.name for p in folder.iterdir()} == {"namespace_metadata.json", "medium-v0"}


def test_overwriting_cut_between_two_renames_loses_nothing(minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick("hopper/medium")
    folder, rename = minari_root / "sdw" / "hopper", Path.rename

    def interrupted(path: Path, target: Path) -> None:
        rename(path, target)
        if path.name == "medium-v0":  # it has just been set aside
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quick("hopper/medium", steps=200, overwrite=True)
    assert len(load_dataset("hopper/medium")) == 300
    assert {p.name for p in folder.iterdir()} == {"namespace_metadata.json", "medium-v0"}
    with monkeypatch.context() as patch:  # killed: nothing is put back until the next one comes
        patch.setattr(Path, "rename", interrupted)
        patch.setattr(disk, "_put_back", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            quick("hopper/medium", steps=200, overwrite=True)
    assert not (folder / "medium-v0").exists()
    quick("hopper/medium")  # found, as it was, with nothing to collect
    assert len(load_dataset("hopper/medium")) == 300
    assert {p.name for p in folder.iterdir()} == {"namespace_metadata.json", "medium-v0"}


def test_metadata_tell_how_the_dataset_was_made(minari_root: Path) -> None:
    quick("walker2d/medium-expert", steps=20, seed=5)
    dataset = minari.load_dataset("sdw/walker2d/medium-expert-v0")
    metadata = dataset.storage.metadata
    assert metadata["sdw_fast"]["recipe"] == {
        "env": "walker2d",
        "quality": "medium-expert",
        "steps": 20,
        "seed": 5,
        "policies_trained_steps": [240_000, 600_000],
    }
    assert set(metadata["sdw_fast"]["versions"]) == {"sdw_fast", "gymnasium", "mujoco", "numpy", "torch"}
    assert minari.get_normalized_score(dataset, np.array([1.629008, 4592.3])) == pytest.approx([0.0, 1.0])
    assert list(minari.list_local_datasets()) == ["sdw/walker2d/medium-expert-v0"]
    assert json.loads((minari_root / "sdw/walker2d/namespace_metadata.json").read_text()) == {}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ant/medium", {}, "unknown dataset 'ant/medium': expected .*hopper, walker2d, halfcheetah.*medium-replay"),
        ("hopper/great", {}, "unknown dataset"),
        ("hopper", {}, "unknown dataset"),
        ("hopper/medium", {"steps": 0}, "steps must be at least 1"),
        ("hopper/mixture", {"steps": 2}, "steps must be at least 3"),
        ("hopper/medium-replay", {"steps": 0}, "steps must be at least 1"),
        ("hopper/medium", {"seed": -1}, "seed must be between 0"),
    ],
)
def test_bad_arguments_are_reported(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(name, **options)


def test_assets_are_exactly_the_suites_policies_in_half_precision() -> None:
    wanted = {f"{env}-{steps}.safetensors" for env, s in SUITE.items() for steps in (*s.earlier, s.medium, s.expert)}
    shipped = {p.name for env in SUITE for p in ASSETS.glob(f"{env}-*0.safetensors")}
    assert wanted == shipped
    for name in wanted:
        with safe_open(ASSETS / name, framework="pt") as file:
            metadata = file.metadata()
            assert all(file.get_tensor(key).dtype == torch.float16 for key in set(file.keys()) - {"checksum"})
        env, steps = name.removesuffix(".safetensors").split("-")
        assert (metadata["env_id"], metadata["trained_steps"]) == (SUITE[env].env_id, steps)


def test_gaussian_policy_by_hand() -> None:
    policy = GaussianPolicy((1, 1, 2))
    with torch.no_grad():
        for layer, weight, bias in zip(policy.layers, ([[2.0]], [[1.0], [0.0]]), ([1.0], [0.5, 30.0]), strict=True):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
        x = torch.tensor([[1.0], [-1.0]])  # hidden relu(2x + 1) = 3, 0; mean 3.5, 0.5; log-std 30, clamped to 2
        torch.testing.assert_close(policy(x), torch.tensor([[3.5], [0.5]]).tanh())
        noise = torch.randn(2, 1, generator=torch.Generator().manual_seed(0))
        expected = (torch.tensor([[3.5], [0.5]]) + np.exp(2.0) * noise).tanh()
        torch.testing.assert_close(policy.sample(x, torch.Generator().manual_seed(0)), expected)


def test_a_shipped_expert_acts_as_one() -> None:
    """Its mean action was measured at 2994 ± 3, 93 normalized."""
    hopper = SUITE["hopper"]
    result = evaluate(load_policy("hopper", hopper.expert), hopper.env_id, episodes=1)
    assert result.normalized_mean > 80
