"""Files: whole or not at all, and what was computed once."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdw_fast.files import (
    check_sum,
    computed_once,
    read_npz,
    read_safetensors,
    read_torch,
    to_json,
    write_npz,
    write_safetensors,
    write_text,
    write_torch,
)


def fail(*_: object, **__: object) -> None:
    raise KeyboardInterrupt("killed while writing")


def test_a_file_appears_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "text.txt"
    write_text(path, "Größe 1\n")
    assert path.read_text(encoding="utf-8") == "Größe 1\n"
    write_text(path, "2")
    assert path.read_text(encoding="utf-8") == "2"
    assert list(path.parent.iterdir()) == [path]


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


# --- a checksum of our own, and sizes before memory ------------------------------------------------------------------


def write_all(folder: Path) -> dict[Path, Callable[[Path], Any]]:
    """A small file of each of our formats, and its reader."""
    write_npz(folder / "x.npz", x=np.arange(7.0), name=np.array("a header"))
    write_torch(folder / "x", {"x": torch.arange(7.0), "list": [1, 2.5, None, "a"]})
    write_safetensors(folder / "x.safetensors", {"x": torch.ones(3).half(), "y": torch.arange(7.0)}, {"key": "value"})
    readers = {"x.npz": read_npz, "x": read_torch, "x.safetensors": read_safetensors}
    return {folder / name: reader for name, reader in readers.items()}


def test_files_of_ours_are_read_back_by_us_and_by_others(tmp_path: Path) -> None:
    npz, checkpoint, safetensors = write_all(tmp_path)
    for path in (npz, checkpoint, safetensors):
        check_sum(path)
    np.testing.assert_array_equal(read_npz(npz)["x"], np.load(npz)["x"])
    assert read_torch(checkpoint)["list"] == torch.load(checkpoint, weights_only=True)["list"] == [1, 2.5, None, "a"]
    tensors, metadata = read_safetensors(safetensors)
    assert metadata == {"key": "value"}
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"x": [1] * 3, "y": list(range(7))}
    assert {"x", "y"} < load_file(safetensors).keys()


def test_no_flipped_bit_and_no_cut_passes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for path in write_all(tmp_path):
        good = path.read_bytes()
        for bit in rng.choice(8 * len(good), 300, replace=False):
            changed = bytearray(good)
            changed[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(changed)
            with pytest.raises(ValueError, match="checksum"):
                check_sum(path)
        for length in (0, 10, 64, len(good) - 1):
            path.write_bytes(good[:length])
            with pytest.raises(ValueError, match="checksum"):
                check_sum(path)


def test_a_cache_with_a_flipped_bit_is_computed_again(tmp_path: Path) -> None:
    computed_once(tmp_path, "knn", Computed(7), {"x": (3,)})
    [file] = (tmp_path / ".sdw_cache").iterdir()
    content = file.read_bytes()
    place = content.index(np.int64(7).tobytes())
    np.savez(file, x=np.full(3, 6.5))  # of the right shape and readable, but not ours
    assert computed_once(tmp_path, "knn", Computed(8), {"x": (3,)})["x"][0] == 8
    file.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    assert computed_once(tmp_path, "knn", Computed(9), {"x": (3,)})["x"][0] == 9


def test_a_bit_of_a_foreign_archive_is_found_by_its_crc(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(50)}, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", x=np.ones(50, np.float32))
    for name, reader in (("x.pt", read_torch), ("x.npz", read_npz)):
        path = tmp_path / name
        content = path.read_bytes()
        place = content.index(np.ones(50, np.float32).tobytes()) + 80
        path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
        with pytest.raises((ValueError, zipfile.BadZipFile), match=r"damaged|CRC"):
            reader(path)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [(46, b"z", "differ"), (32, b"\x40", "1 of 2 parts"), (38, b"\x10", "is a folder")],
    ids=["another name", "the next entry as a comment", "marked as a folder"],
)
def test_damage_to_an_archive_s_directory_is_found(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    """No CRC covers it. The bytes are those of its first entry, of two."""
    np.savez(tmp_path / "x.npz", x=np.ones(50), y=np.ones(2))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    place = content.index(b"PK\x01\x02") + offset
    content[place : place + 1] = value
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises((ValueError, zipfile.BadZipFile), match=message):
        read_npz(tmp_path / "x.npz")


def test_a_file_that_claims_more_than_memory_is_refused_before_it_is_asked_for(tmp_path: Path) -> None:
    """A bomb of zeros, and a header that tells of more numbers than there are."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 45,)})
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(64))
    with pytest.raises(ValueError, match=r"shape \(35184372088832,\) and type float32 does not have 64 bytes"):
        read_npz(tmp_path / "header.npz")
    for name, reader in (("bomb.npz", read_npz), ("bomb.pt", read_torch)):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", bytes(1000))
            archive.infolist()[0].file_size = 1 << 45  # as the directory will say
        with pytest.raises(ValueError, match=r"says that it holds 3.28e\+04 GiB, and .* of memory are free"):
            reader(tmp_path / name)


def test_json_has_no_words_that_are_none_of_its_numbers() -> None:
    text = to_json({"a": [math.nan, -math.inf, 1.5], "b": {"c": (np.float64("inf"), "NaN", None, True)}})
    assert text == '{"a": [null, null, 1.5], "b": {"c": [null, "NaN", null, true]}}'
