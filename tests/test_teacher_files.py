"""Teachers' files: every bit kept, whole or not at all, and foreign or damaged ones refused."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sdw_fast.files import check_sum, read_safetensors, write_safetensors
from sdw_fast.networks import MLP, MinCritic
from sdw_fast.teacher import Teacher
from sdw_fast.units import Affine, Units

D, A = 5, 2


@pytest.fixture
def teacher() -> Teacher:
    """A teacher with random networks of odd widths and units of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critics = [MLP([D + A, 9, 1], tanh=False), MLP([D + A, 13, 6, 1], tanh=False)]
        actor = MLP([D, 7, 11, A], tanh=True)
    units = Units(
        states=Affine(np.linspace(-1, 1, D) / 3, np.linspace(0.3, 3, D)),
        actions=Affine.between([-0.3, 0.1], [0.7, 0.4]),
        returns=Affine.scores(-7.3, 2000.1),
        env_id="Test-v0",
    )
    return Teacher(actor, MinCritic(critics), units=units, provenance={"seed": 0, "é": [1.5, None]})


@pytest.fixture
def states() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(203, D)).astype(np.float32)


def test_save_and_load_keep_every_bit(teacher: Teacher, states: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "teacher.safetensors"
    teacher.save(path)
    loaded = Teacher.load(path)
    actions = teacher.actions(states)
    np.testing.assert_array_equal(loaded.actions(states), actions)
    np.testing.assert_array_equal(loaded.values(states, actions), teacher.values(states, actions))
    assert loaded.units == teacher.units
    assert loaded.units.returns == teacher.units.returns
    assert loaded.units.env_id == "Test-v0"
    assert loaded.provenance == {"seed": 0, "é": [1.5, None]}
    assert os.listdir(path.parent) == ["teacher.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # as readable as any file of the user
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["teacher"])
    assert description["networks"] == {"actor": [5, 7, 11, 2], "critic1": [7, 9, 1], "critic2": [7, 13, 6, 1]}


def test_save_without_critic_or_units(states: np.ndarray, tmp_path: Path) -> None:
    teacher = Teacher(MLP([D, A], tanh=True))
    teacher.save(tmp_path / "t.safetensors")
    loaded = Teacher.load(str(tmp_path / "t.safetensors"))
    assert loaded.critic is None
    assert loaded.units is None
    np.testing.assert_array_equal(loaded.actions(states), teacher.actions(states))


def test_half_precision_halves_the_file(teacher: Teacher, states: np.ndarray, tmp_path: Path) -> None:
    teacher.save(tmp_path / "half.safetensors", half=True)
    loaded = Teacher.load(tmp_path / "half.safetensors")
    actions = loaded.actions(states)
    assert actions.dtype == np.float32
    assert loaded.units == teacher.units  # they are not rounded
    np.testing.assert_allclose(actions, teacher.actions(states), atol=5e-3)
    assert not np.array_equal(actions, teacher.actions(states))
    large = Teacher(MLP([D, 64, 64, A], tanh=True))
    for half in (False, True):
        large.save(tmp_path / f"{half}.safetensors", half=half)
    saved = (tmp_path / "False.safetensors").stat().st_size - (tmp_path / "True.safetensors").stat().st_size
    assert saved == pytest.approx(2 * sum(p.numel() for p in large.actor.parameters()), abs=64)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    Teacher(MLP([D, 64, A], tanh=True)).save(path)
    before = path.read_bytes()
    with full_disk(8_000), pytest.raises(OSError, match="too large"):
        Teacher(MLP([D, 64, 64, A], tanh=True)).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["teacher.safetensors"]


def test_arbitrary_callables_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="its actor is function"):
        Teacher(lambda s: s).save(tmp_path / "t.safetensors")
    with pytest.raises(TypeError, match="its critic is function"):
        Teacher(MLP([D, A], tanh=True), lambda s, a: a).save(tmp_path / "t.safetensors")
    assert os.listdir(tmp_path) == []


class Twin(nn.Module):
    """Two critics that share a layer, batch norm and its whole-number buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(D + A, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.second = nn.Sequential(self.first[0], nn.Tanh(), nn.Linear(8, 1))

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pair = torch.cat([states, actions], dim=-1)
        return self.first(pair), self.second(pair)


def own_modules() -> Teacher:
    """What a user would name as the factory."""
    return Teacher(nn.Sequential(nn.Linear(D, 6), nn.ELU(), nn.Linear(6, A), nn.Tanh()), Twin())


def test_modules_of_any_kind_are_saved_by_their_weights(states: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    torch.manual_seed(0)  # of some draws the critic is dead
    made = own_modules()
    made.critic.first[1].running_mean += 1
    teacher = Teacher(made.actor, made.critic, units=Units(Affine(np.ones(D), np.full(D, 2.0))), provenance={"x": 1})
    teacher.save(path)
    loaded = Teacher.load(path, factory=own_modules)
    actions = teacher.actions(states)
    np.testing.assert_array_equal(loaded.actions(states), actions)
    np.testing.assert_array_equal(loaded.values(states, actions), teacher.values(states, actions))
    assert (loaded.units, loaded.provenance) == (teacher.units, {"x": 1})
    teacher.save(path, half=True)
    np.testing.assert_allclose(Teacher.load(path, factory=own_modules).actions(states), actions, atol=1e-2)
    Teacher(made.actor).save(path)
    assert Teacher.load(path, factory=own_modules).critic is None
    with pytest.raises(ValueError, match=r"weights of modules of yours \(Sequential\), .* --teacher-factory"):
        Teacher.load(path)


def test_a_factory_that_makes_other_modules_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    own_modules().save(path)
    for made, message in (
        (Teacher(nn.Linear(D, A), Twin()), "the actor that the factory made is not the one in .*Missing key"),
        (Teacher(own_modules().actor), "the critic .* it is NoneType, no torch module"),
        (None, "the actor .* it is NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            Teacher.load(path, factory=lambda made=made: made)


def test_nothing_in_a_teachers_file_is_code(tmp_path: Path) -> None:
    """A class named in the file is a word in a message; it is never looked up."""
    path = tmp_path / "teacher.safetensors"
    own_modules().save(path)
    tensors, metadata = read_safetensors(path)
    description = json.loads(metadata["teacher"]) | {"modules": {"actor": "os.system"}}
    write_safetensors(path, tensors, {"teacher": json.dumps(description)})
    with pytest.raises(ValueError, match=r"modules of yours \(os.system\)"):
        Teacher.load(path)


def test_truncated_and_foreign_files_are_refused(teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no teacher file at .*teacher.safetensors"):
        Teacher.load(path)
    teacher.save(path)
    content = path.read_bytes()
    for length in (0, 5, 200, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"teacher.safetensors is not a readable teacher file"):
            Teacher.load(path)
    torch.save({"actor": {}}, path)
    with pytest.raises(ValueError, match="from_corl"):
        Teacher.load(path)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="its checksum does not fit"):
        Teacher.load(path)
    write_safetensors(path, {"weight": torch.ones(3)}, {})
    with pytest.raises(ValueError, match="holds no teacher"):
        Teacher.load(path)


def test_damaged_descriptions_are_refused(teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    teacher.save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    description = json.loads(metadata["teacher"])

    def refused(message: str, tensors: dict[str, torch.Tensor] = tensors, **changes: object) -> None:
        write_safetensors(path, tensors, {"teacher": json.dumps({**description, **changes})})
        with pytest.raises(ValueError, match=f"not a readable teacher file.*{message}"):
            Teacher.load(path)

    refused(r"0\.bias", {key: tensor for key, tensor in tensors.items() if key != "critic2.0.bias"})
    refused("size mismatch", networks={**description["networks"], "actor": [5, 7, 11, 3]})
    refused("format is 'sdw_fast.teacher/1'", format="sdw_fast.teacher/1")
    refused("states", units={"actions": None})


@pytest.mark.parametrize("name", ["actor.0.weight", "critic2.4.bias"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(teacher: Teacher, tmp_path: Path, name: str, number: float) -> None:
    path = tmp_path / "teacher.safetensors"
    teacher.save(path)
    tensors, metadata = read_safetensors(path)
    tensors[name].view(-1)[0] = number
    write_safetensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=rf"weights of {name.split('.')[0]} are NaN or infinite"):
        Teacher.load(path)


def test_a_flipped_bit_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    teacher.save(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a readable teacher file .*its checksum does not fit"):
        Teacher.load(path)


def test_every_shipped_network_carries_its_checksum() -> None:
    root = Path(__file__).parents[1]
    shipped = [*(root / "sdw_fast/assets").glob("*.safetensors"), *(root / "benchmarks/teachers").glob("*.safetensors")]
    assert len(shipped) > 20
    for path in shipped:
        check_sum(path)
