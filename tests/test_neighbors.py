"""Distances to neighbors: by hand, among references, on either side of the door, and computed once for a dataset."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast import ops
from sdw_fast.density import knn_log_density
from sdw_fast.files import write_npz
from sdw_fast.neighbors import (
    dataset_neighbor_distances,
    floored_radius,
    intrinsic_dimension,
    like,
    neighbor_distances,
    states_of,
    varying_columns,
)
from sdw_fast.units import Affine


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def dataset(rng: np.random.Generator, tmp_path: Path) -> sdw.TransitionDataset:
    observations = [5, 0, -3] + rng.standard_normal((200, 3)) * [1, 10, 0.1]
    never = np.zeros(200, bool)
    arrays = {"observations": observations, "next_observations": np.roll(observations, -1, axis=0)}
    arrays |= {"actions": np.zeros((200, 1)), "rewards": np.zeros(200), "terminations": never, "truncations": never}
    return dataclasses.replace(sdw.load_dataset(arrays), path=tmp_path)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a backend's name with each neighbor search."""
    calls: list[str] = []
    knn = ops.knn

    def counted(*arrays: torch.Tensor, backend: str = "auto", **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(backend)
        return knn(*arrays, backend=backend, **options)

    monkeypatch.setattr(ops, "knn", counted)
    return calls


# --- states -----------------------------------------------------------------------------------------------------------


def test_arrays_are_held_once_and_come_back_as_arrays() -> None:
    array = np.zeros((3, 2), np.float32)
    states = states_of(array, "x")
    assert np.shares_memory(states.numpy(), array)
    assert isinstance(like(states, array), np.ndarray)
    assert like(states, states) is states
    assert states_of(np.array([[1, 2]]), "x").dtype == torch.float32
    assert states_of(torch.zeros(2, 2, requires_grad=True), "x").requires_grad is False
    assert states_of([[1.0, 2.0]], "x").tolist() == [[1, 2]]  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_arrays_that_cannot_be_written_to_are_read(rng: np.random.Generator, dataset: sdw.TransitionDataset) -> None:
    states = rng.standard_normal((50, 3)).astype(np.float32)
    expected = knn_log_density(states, k=3), knn_log_density(states, k=3, references=states[:20])
    states.setflags(write=False)
    torch.set_warn_always(True)
    try:
        found = knn_log_density(states, k=3), knn_log_density(states, k=3, references=states[:20])
    finally:
        torch.set_warn_always(False)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("states", "options", "error", "message"),
    [
        (np.zeros(5), {}, ValueError, r"shape \(M, D\)"),
        (np.zeros((0, 3)), {}, ValueError, r"shape \(M, D\)"),
        (np.zeros((3, 0)), {}, ValueError, r"shape \(M, D\)"),
        (np.full((9, 2), np.nan), {}, ValueError, "9 rows have NaN"),
        (torch.tensor([[0.0], [torch.inf], [1.0]]), {"k": 1}, ValueError, "first is row 1"),
        (np.zeros((9, 2), complex), {}, TypeError, "real numbers"),
        (torch.zeros(9, 2, dtype=torch.complex64), {}, TypeError, "real numbers"),
        (np.array([["a"]]), {}, TypeError, "real numbers"),
        (np.eye(9), {"k": 9}, ValueError, "between 1 and 8"),
        (np.eye(9), {"k": 0}, ValueError, "between 1 and 8"),
        (np.eye(9), {"k": 2.0}, TypeError, "integer"),
        (np.eye(9), {"k": True}, TypeError, "integer"),
        (np.eye(1), {"k": 1}, ValueError, "between 1 and 0"),
        (np.eye(9), {"k": 4, "references": 4}, ValueError, "between 1 and 3"),
        (np.eye(9), {"k": 1, "references": 10}, ValueError, "references must lie between 2 and"),
        (np.eye(9), {"k": 1, "references": 0}, ValueError, "references must lie between 2 and"),
        (np.eye(9), {"k": 1, "references": np.eye(4)}, ValueError, "9 columns, references 4"),
        (np.eye(9), {"k": 1, "references": np.full((2, 9), np.inf)}, ValueError, "references: 2 rows have NaN"),
        (np.eye(9), {"k": 5, "references": np.eye(9)[:4]}, ValueError, "between 1 and 4"),
        (np.zeros((9, 2)), {"k": 3}, ValueError, "exact duplicates"),
        (np.eye(9), {"k": 3, "dimension": "large"}, ValueError, "dimension must be"),
        (np.eye(9), {"k": 3, "dimension": -1}, ValueError, "dimension must be"),
        (np.eye(9), {"k": 1, "dimension": "intrinsic"}, ValueError, "k >= 2"),
        (np.eye(9), {"k": 3, "dimension": "intrinsic"}, ValueError, "all neighbor distances are equal"),
        (np.eye(9), {"k": 3, "backend": "magic"}, ValueError, "backend"),
    ],
)
def test_bad_states_are_refused(states, options, error, message) -> None:
    with pytest.raises(error, match=message):
        knn_log_density(states, **options)


# --- distances --------------------------------------------------------------------------------------------------------


def test_distances_by_hand() -> None:
    states = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    distances, searched = neighbor_distances(states, 2)
    assert distances.tolist() == [[1, 3], [1, 2], [2, 3], [4, 6]]
    assert (distances.dtype, searched.dtype, int(searched)) == (torch.float32, torch.int64, 3)
    distances, searched = neighbor_distances(states, 1, np.array([[0.0], [2.0]]))
    assert (distances.tolist(), int(searched)) == ([[0], [1], [1], [5]], 2)


def test_a_duplicate_is_a_neighbor() -> None:
    states = torch.tensor([[0.0], [0.0], [1.0], [5.0]])
    distances, searched = neighbor_distances(states, 1, backend="torch")
    assert distances[:, 0].tolist() == [0, 0, 1, 4]
    assert searched == 3


def test_reference_subset_leaves_each_state_out_of_its_own_neighborhood(rng: np.random.Generator) -> None:
    states = rng.standard_normal((300, 3))
    states[10:20] = states[0]  # duplicates, some of them references
    k, count = 4, 100
    logd = knn_log_density(states, k=k, references=count, seed=3)
    found, searched = neighbor_distances(torch.from_numpy(states), k, count, seed=3)
    rows = np.flatnonzero(searched == count - 1)  # the references, which are not searched for themselves
    assert len(rows) == count
    assert set(searched.tolist()) == {count - 1, count}
    expected = np.empty(300)
    distances = np.empty((300, k))
    for i in range(300):
        others = rows[rows != i]
        distances[i] = np.sort(np.linalg.norm(states[others] - states[i], axis=1))[:k]
        expected[i] = math.log(k / len(others)) - math.log(4 / 3 * math.pi)
    np.testing.assert_allclose(found, distances, rtol=1e-5)
    radius = distances[:, -1]
    radius[radius == 0] = radius[radius > 0].min() / 2
    np.testing.assert_allclose(logd, expected - 3 * np.log(radius), rtol=1e-5)
    assert np.array_equal(logd, knn_log_density(states, k=k, references=count, seed=3))
    assert not np.array_equal(logd, knn_log_density(states, k=k, references=count, seed=4))


def test_all_references_are_the_self_join_even_with_many_duplicates(rng: np.random.Generator) -> None:
    states = rng.integers(0, 2, (60, 3)).astype(np.float32)  # each state has about seven duplicates
    states = np.concatenate([states, rng.standard_normal((60, 3)).astype(np.float32)])
    np.testing.assert_allclose(knn_log_density(states, k=3, references=120), knn_log_density(states, k=3), rtol=1e-6)


def test_radius_of_duplicates_is_half_the_smallest() -> None:
    distances = torch.tensor([[0.0, 0.0], [0.0, 3.0], [1.0, 2.0]])
    assert floored_radius(distances).tolist() == [1, 3, 2]
    assert floored_radius(distances).dtype == torch.float64
    with pytest.raises(ValueError, match="every state has k or more exact duplicates"):
        floored_radius(torch.zeros(4, 2))


def test_varying_columns() -> None:
    assert varying_columns(torch.tensor([[1.0, 2, 3], [1, 2, 4], [1, 5, 3]])) == 2
    assert varying_columns(torch.ones(3, 4)) == 1  # at least one


def test_intrinsic_dimension_by_hand() -> None:
    # Neighbor distances (1, 2) and (1, 4): 1/m = mean(log 2, log 4). A row with a duplicate says nothing.
    distances = torch.tensor([[1.0, 2], [1, 4], [0, 3]])
    assert intrinsic_dimension(distances) == pytest.approx(1 / math.log(8**0.5))
    with pytest.raises(ValueError, match="no state without a duplicate"):
        intrinsic_dimension(torch.zeros((4, 3)))


# --- computed once ----------------------------------------------------------------------------------------------------


def test_neighbors_of_a_dataset_are_searched_once(dataset: sdw.TransitionDataset, searches: list[str]) -> None:
    first = sdw.log_density(dataset)
    np.testing.assert_array_equal(first, knn_log_density(dataset.normalized_observations()))
    searches.clear()
    np.testing.assert_array_equal(sdw.log_density(dataset), first)
    intrinsic = sdw.log_density(dataset, dimension="intrinsic")  # the same neighbors
    assert not np.allclose(intrinsic, first)
    assert not searches
    assert [file.suffix for file in (dataset.path / ".sdw_cache").iterdir()] == [".npz"]


def test_cache_knows_what_it_holds(dataset: sdw.TransitionDataset, searches: list[str]) -> None:
    """Content, units, k, references and their seed, backend."""
    sdw.log_density(dataset)
    subset = sdw.log_density(dataset, references=100)
    np.testing.assert_array_equal(subset, knn_log_density(dataset.normalized_observations(), references=100))
    twice = dataclasses.replace(dataset.units, states=Affine(dataset.units.states.offset, np.full(3, 2.0)))
    moved = dataset.observations.copy()
    moved[0, 0] += 1
    searches.clear()
    for different, options in [
        (dataset, {"k": 11}),
        (dataset, {"references": 100, "seed": 1}),
        (dataset, {"references": 101}),
        (dataset, {"backend": "torch"}),
        (dataclasses.replace(dataset, rewards=dataset.rewards + 1), {}),
        (dataclasses.replace(dataset, observations=moved), {}),
        (dataclasses.replace(dataset, units=twice), {}),
    ]:
        found = sdw.log_density(different, **options)
        np.testing.assert_array_equal(found, knn_log_density(different.normalized_observations(), **options))
        assert len(searches) == 2, options  # and one of them is the comparison's
        searches.clear()
    np.testing.assert_array_equal(sdw.log_density(dataset, references=100), subset)
    np.testing.assert_array_equal(sdw.log_density(dataset, seed=7), sdw.log_density(dataset))  # seeds no subset
    assert not searches


def test_cache_lies_beside_a_file_and_nowhere_without_one(dataset: sdw.TransitionDataset, searches: list[str]) -> None:
    folder = dataset.path
    (folder / "data.npz").write_bytes(b"")
    sdw.log_density(dataclasses.replace(dataset, path=folder / "data.npz"))
    assert (folder / ".sdw_cache").is_dir()
    searches.clear()
    sdw.log_density(dataclasses.replace(dataset, path=None))
    assert len(searches) == 1


@pytest.mark.parametrize("references", [None, 100])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "shape", "nan", "pickle", "missing", "searched"])
def test_damaged_cache_is_computed_again(dataset, searches: list[str], damage: str, references: int | None) -> None:
    expected = sdw.log_density(dataset, references=references)
    (file,) = (dataset.path / ".sdw_cache").iterdir()
    good = file.read_bytes()
    distances, searched = np.ones((200, 10), np.float32), np.full(200 if references else (), 199)
    if damage == "truncated":
        file.write_bytes(good[: len(good) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_text("not an archive")
    elif damage == "shape":
        write_npz(file, distances=distances[:50], searched=searched)
    elif damage == "nan":
        write_npz(file, distances=distances * np.nan, searched=searched)
    elif damage == "pickle":
        np.savez(file, distances=np.array([{}], dtype=object), searched=searched)
    elif damage == "missing":
        write_npz(file, distances=distances)
    elif damage == "searched":
        write_npz(file, distances=distances, searched=np.full(7, 199))
    searches.clear()
    np.testing.assert_array_equal(sdw.log_density(dataset, references=references), expected)
    assert len(searches) == 1
    np.testing.assert_array_equal(sdw.log_density(dataset, references=references), expected)
    assert len(searches) == 1


def test_place_that_cannot_be_written_is_no_error(dataset: sdw.TransitionDataset, monkeypatch, searches) -> None:
    expected = knn_log_density(dataset.normalized_observations())
    (dataset.path / ".sdw_cache").write_text("a file where the folder would be")
    np.testing.assert_array_equal(sdw.log_density(dataset), expected)
    (dataset.path / ".sdw_cache").unlink()
    dataset.path.chmod(0o555)
    np.testing.assert_array_equal(sdw.log_density(dataset), expected)
    dataset.path.chmod(0o755)
    for path in (dataset.path / ".sdw_cache").glob("*"):  # root writes everywhere
        path.unlink()

    def refuse(*arguments: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "replace", refuse)
    np.testing.assert_array_equal(sdw.log_density(dataset), expected)
    assert list((dataset.path / ".sdw_cache").iterdir()) == []  # no temporary file is left


def test_bad_requests_for_a_dataset_are_refused(dataset: sdw.TransitionDataset) -> None:
    with pytest.raises(TypeError, match="must be a number"):
        sdw.log_density(dataset, references=np.eye(3))
    with pytest.raises(ValueError, match="between 1 and 199"):
        sdw.log_density(dataset, k=200)
    with pytest.raises(ValueError, match="between 1 and 199"):
        dataset_neighbor_distances(dataset, 0)
