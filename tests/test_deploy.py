"""Policies leave Python's objects: files, ensembles, torch.export, ONNX, TorchScript, and NumPy alone."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_policy import SMALL, make_set

import sdw_fast as sdw
from sdw_fast.files import write_safetensors
from sdw_fast.policy import MLPPolicy, behavior_clone

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module", params=[1, 3], ids=["single", "ensemble"])
def policy(request: pytest.FixtureRequest) -> MLPPolicy:
    return behavior_clone(make_set(low=-3.0, high=0.5), ensemble=request.param, seed=2, **SMALL)


OBSERVATIONS = torch.from_numpy(make_set().observations)


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    members = [behavior_clone(make_set(low=-3.0, high=0.5), seed=seed, **SMALL) for seed in (5, 6, 7)]
    ensemble = behavior_clone(make_set(low=-3.0, high=0.5), ensemble=3, seed=5, **SMALL)
    assert ensemble.members == 3
    expected = torch.stack([member(OBSERVATIONS) for member in members]).mean(0)
    torch.testing.assert_close(ensemble(OBSERVATIONS), expected)
    assert ensemble(OBSERVATIONS[0]).shape == (2,)
    assert ensemble(OBSERVATIONS.reshape(4, 5, 4)).shape == (4, 5, 2)
    assert ensemble(OBSERVATIONS[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match="ensemble must be at least 1"):
        behavior_clone(make_set(), ensemble=0)


def test_a_saved_policy_is_the_same_policy(policy: MLPPolicy, tmp_path: Path) -> None:
    loaded = MLPPolicy.load(policy.save(tmp_path / "policy.safetensors"))
    assert torch.equal(loaded(OBSERVATIONS), policy(OBSERVATIONS))
    assert loaded.units == policy.units
    assert loaded.provenance == policy.provenance
    assert repr(loaded) == repr(policy)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.safetensors"]


def test_a_file_that_is_no_policy_is_refused(policy: MLPPolicy, tmp_path: Path) -> None:
    file = policy.save(tmp_path / "policy.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100], whole.replace(b"relu", b"gelu"), b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"policy\.safetensors is not a readable policy file"):
            MLPPolicy.load(file)
    with pytest.raises(FileNotFoundError, match="no policy file at"):
        MLPPolicy.load(tmp_path / "none.safetensors")
    write_safetensors(file, {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="holds no policy"):
        MLPPolicy.load(file)
    broken = behavior_clone(make_set(), **SMALL)
    with torch.no_grad():
        next(broken.parameters())[0, 0, 0] = torch.nan
    broken.save(file)
    with pytest.raises(ValueError, match="NaN or infinite"):
        MLPPolicy.load(file)


def test_torch_export_takes_any_batch(policy: MLPPolicy) -> None:
    exported = torch.export.export(policy, (OBSERVATIONS,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for rows in (5, 20):
        torch.testing.assert_close(exported.module()(OBSERVATIONS[:rows]), policy(OBSERVATIONS[:rows]))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(policy: MLPPolicy, tmp_path: Path) -> None:
    torch.jit.script(policy).save(str(tmp_path / "policy.pt"))
    scripted = torch.jit.load(str(tmp_path / "policy.pt"))
    torch.testing.assert_close(scripted(OBSERVATIONS), policy(OBSERVATIONS))
    torch.testing.assert_close(scripted(OBSERVATIONS[0]), policy(OBSERVATIONS[0]))


@pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="needs onnx and onnxscript")
def test_onnx(policy: MLPPolicy, tmp_path: Path) -> None:
    file = tmp_path / "policy.onnx"
    batch = {"observations": {0: torch.export.Dim("batch")}}
    torch.onnx.export(policy, (OBSERVATIONS,), str(file), dynamo=True, dynamic_shapes=batch, verbose=False)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(file))
    for rows in (1, 20):
        (actions,) = session.run(None, {session.get_inputs()[0].name: OBSERVATIONS[:rows].numpy()})
        np.testing.assert_allclose(actions, policy(OBSERVATIONS[:rows]).detach().numpy(), atol=1e-5)


def test_a_policy_runs_without_this_package(policy: MLPPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that docs/howto/deploy.md prints."""
    page = (DOCS / "howto/deploy.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "safetensors.numpy" in block)
    assert len(code.split("\n")) - code.split("\n").count("") == 10
    assert "sdw" not in code
    policy.save(tmp_path / "policy.safetensors")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    np.testing.assert_allclose(names["act"](OBSERVATIONS.numpy()), policy(OBSERVATIONS).detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(
        names["act"](OBSERVATIONS[0].numpy()), policy(OBSERVATIONS[0]).detach().numpy(), atol=1e-5
    )


def test_compiled_policies_and_ensembles_are_evaluated(toy_env: str) -> None:
    pairs = sdw.SyntheticDataset(
        np.zeros((4, 11), np.float32),
        np.full((4, 3), 0.2, np.float32),
        sdw.Units(sdw.units.Affine(np.zeros(11), np.ones(11)), sdw.units.Affine.between([-1] * 3, [1] * 3)),
    )
    one = sdw.evaluate(behavior_clone(pairs, ensemble=4, seed=3, **SMALL), toy_env, episodes=2, seed=3)
    many = sdw.evaluate_synthetic(pairs, toy_env, clones=1, ensemble=4, episodes=2, seed=3)
    assert many.returns.shape == (2,)
    assert one.env_id == many.env_id
