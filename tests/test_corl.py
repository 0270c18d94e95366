"""CORL checkpoints: each of its algorithms' layouts against the networks they were made of, and bad files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sdw_fast.teacher import Teacher

D, A = 5, 2


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    layers[-2].bias.data.zero_()  # so that twin critics take turns at being the smaller
    return nn.Sequential(*layers[:-1])


def below(name: str, network: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for key, value in network.state_dict().items()}


MEAN, STD = np.linspace(-2, 2, D), np.linspace(0, 4, D)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def states() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(203, D)).astype(np.float32)


def seen_by_networks(states: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((states - MEAN) / (STD + 1e-3)).float()


def test_cal_ql_checkpoint(states: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published OBD teachers: a tanh-Gaussian actor, twin critics, and a pickled module `__main__.Scalar`."""

    class Scalar(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.constant = nn.Parameter(torch.tensor(value))

    Scalar.__module__, Scalar.__qualname__ = "__main__", "Scalar"
    monkeypatch.setattr(sys.modules["__main__"], "Scalar", Scalar, raising=False)
    base, q1, q2 = mlp(D, 8, 6, 2 * A), mlp(D + A, 7, 1), mlp(D + A, 7, 1)
    checkpoint = {
        "actor": {
            **below("base_network", base),
            "log_std_multiplier.constant": torch.tensor(1.0),
            "log_std_offset.constant": torch.tensor(-1.0),
        },
        "critic1": below("network", q1),
        "critic2": below("network", q2),
        "sac_log_alpha": Scalar(0.5),
        "total_it": 1000,
    }
    torch.save(checkpoint, tmp_path / "c.pt")
    teacher = Teacher.from_corl(tmp_path / "c.pt", MEAN, STD)
    actions = torch.tanh(base(seen_by_networks(states))[:, :A])
    np.testing.assert_allclose(teacher.actions(states), actions.detach(), rtol=1e-4, atol=1e-5)
    inputs = torch.cat([seen_by_networks(states), actions], dim=1)
    expected = torch.minimum(q1(inputs), q2(inputs)).squeeze(1).detach()
    np.testing.assert_allclose(teacher.values(states, actions.detach().numpy()), expected, rtol=1e-4, atol=1e-4)

    assert teacher.provenance == {"source": "CORL checkpoint", "file": "c.pt"}
    teacher.save(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(Teacher.load(tmp_path / "t.safetensors").actions(states), teacher.actions(states))


def test_td3bc_and_iql_checkpoints(states: np.ndarray, tmp_path: Path) -> None:
    actor, q1, q2 = mlp(D, 8, A), mlp(D + A, 7, 1), mlp(D + A, 5, 1)
    critics = {"critic_1": below("net", q1), "critic_2": below("net", q2)}
    torch.save({"actor": below("net", actor), **critics}, tmp_path / "td3bc.pt")
    gaussian = {**below("net.net", actor), "log_std": torch.zeros(A)}
    twin = {**below("q1.net", q1), **below("q2.net", q2)}
    torch.save({"actor": gaussian, "qf": twin, "vf": below("v.net", mlp(D, 7, 1))}, tmp_path / "iql.pt")
    expected = torch.tanh(actor(seen_by_networks(states))).detach()
    inputs = torch.cat([seen_by_networks(states), expected], dim=1)
    first, second = q1(inputs).squeeze(1).detach(), q2(inputs).squeeze(1).detach()
    values = torch.minimum(first, second)
    assert (first < second).any()
    assert (second < first).any()
    for name in ("td3bc.pt", "iql.pt"):
        teacher = Teacher.from_corl(tmp_path / name, MEAN, STD)
        np.testing.assert_allclose(teacher.actions(states), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(teacher.values(states, expected.numpy()), values, rtol=1e-4, atol=1e-4)


def test_checkpoint_without_critic_serves_actions_only(states: np.ndarray, tmp_path: Path) -> None:
    torch.save({"actor": below("net", mlp(D, 8, A))}, tmp_path / "c.pt")
    teacher = Teacher.from_corl(tmp_path / "c.pt", MEAN, STD)
    with pytest.raises(ValueError, match="no critic"):
        teacher.values(states, teacher.actions(states))


class Payload:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(FileNotFoundError, match="no CORL checkpoint"):
        Teacher.from_corl(path, MEAN, STD)

    actor = below("net", mlp(D, 8, A))
    torch.save({"actor": actor, "extra": Payload(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match="ever unpickled"):
        Teacher.from_corl(path, MEAN, STD)
    assert not (tmp_path / "ran").exists()

    torch.save({"actor": actor}, path)
    content = path.read_bytes()
    for length in (0, 50, len(content) // 2):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a readable CORL checkpoint"):
            Teacher.from_corl(path, MEAN, STD)

    bad = [
        ({"policy": actor}, r"no state dict 'actor' \(it holds \['policy'\]\)"),
        ([1, 2], "it holds list"),
        ({"actor": below("trunk", mlp(D, 8, A))}, "unknown actor layout"),
        ({"actor": {**actor, "net.1.weight": torch.ones(8), "net.1.bias": torch.ones(8)}}, "linear layers only"),
        ({"actor": actor, "critic_1": below("net", mlp(D, 7, 1))}, "critic maps 5 to 1, the actor asks for 7 to 1"),
    ]
    for checkpoint, message in bad:
        torch.save(checkpoint, path)
        with pytest.raises(ValueError, match=message):
            Teacher.from_corl(path, MEAN, STD)

    torch.save({"actor": actor}, path)
    with pytest.raises(ValueError, match=r"actor of 5 state dimensions.*\(4,\)"):
        Teacher.from_corl(path, MEAN[:4], STD)
    for mean, std in ((MEAN, STD * np.nan), (MEAN + np.inf, STD), (MEAN, STD - 1e-4)):
        with pytest.raises(ValueError, match="must be finite, and std not negative"):
            Teacher.from_corl(path, mean, std)


@pytest.mark.parametrize("part", ["actor", "critic_1"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, part: str) -> None:
    checkpoint = {"actor": below("net", mlp(D, 8, A)), "critic_1": below("net", mlp(D + A, 7, 1))}
    checkpoint[part]["net.0.bias"][0] = torch.nan
    torch.save(checkpoint, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c.pt is not .*weights of .* are NaN or infinite"):
        Teacher.from_corl(tmp_path / "c.pt", MEAN, STD)
