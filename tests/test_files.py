"""Files: whole or not at all, and what was computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdw_fast.files import computed_once, read_npz, replacing, write_npz, write_text


def fail(*_: object, **__: object) -> None:
    raise KeyboardInterrupt("killed while writing")


def test_a_file_appears_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "text.txt"
    write_text(path, "Größe 1\n")
    assert path.read_text(encoding="utf-8") == "Größe 1\n"
    write_text(path, "2")
    assert path.read_text(encoding="utf-8") == "2"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("half of the new")
        assert path.read_text() == "old"
        assert (temporary.parent, temporary.suffix) == (
            tmp_path,
            ".npz",
        )  # same disk; suffixes mean something to writers
    assert path.read_text() == "half of the new"


@pytest.mark.parametrize("where", ["numpy.savez", "os.replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "data.npz"
    write_npz(path, x=np.arange(3))
    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(KeyboardInterrupt):
            write_npz(path, x=np.zeros(9))
    np.testing.assert_array_equal(read_npz(path)["x"], [0, 1, 2])
    assert list(tmp_path.iterdir()) == [path]


def test_no_pickle_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        read_npz(tmp_path / "evil.npz")


class Computed:
    """Counts how often it is asked."""

    def __init__(self, value: float = 1.0) -> None:
        self.times, self.value = 0, value

    def __call__(self) -> dict[str, np.ndarray]:
        self.times += 1
        return {"x": np.full(3, self.value)}


def test_computed_once(tmp_path: Path) -> None:
    dataset = tmp_path / "data.npz"
    dataset.write_text("a dataset")
    compute = Computed()
    for beside in (dataset, dataset, tmp_path):  # a file's folder, or the folder itself
        np.testing.assert_array_equal(computed_once(beside, "knn of this", compute, {"x": (3,)})["x"], 1)
    assert compute.times == 1
    assert [path.name.split("-")[0] for path in (tmp_path / ".sdw_cache").iterdir()] == ["knn"]
    computed_once(dataset, "knn of that", compute, {"x": (3,)})
    assert compute.times == 2


def test_without_a_place_nothing_is_kept() -> None:
    compute = Computed()
    for _ in range(2):
        computed_once(None, "knn", compute, {"x": (3,)})
    assert compute.times == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "other shape", "other names", "not finite"])
def test_what_is_damaged_is_computed_again(tmp_path: Path, damage: str) -> None:
    computed_once(tmp_path, "knn", Computed(7), {"x": (3,)})
    [file] = (tmp_path / ".sdw_cache").iterdir()
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        wrong = {
            "other shape": {"x": np.ones(2)},
            "other names": {"y": np.ones(3)},
            "not finite": {"x": np.full(3, np.nan)},
        }
        np.savez(file, **wrong[damage])
    compute = Computed(8)
    for _ in range(2):
        np.testing.assert_array_equal(computed_once(tmp_path, "knn", compute, {"x": (3,)})["x"], 8)
    assert compute.times == 1


def test_a_place_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / ".sdw_cache").write_text("a file where the folder should be")
    compute = Computed()
    for _ in range(2):
        np.testing.assert_array_equal(computed_once(tmp_path, "knn", compute, {"x": (3,)})["x"], 1)
    assert compute.times == 2
