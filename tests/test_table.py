"""Tables of results: what is appended is read again, what rows share stands once, a killed process leaves no damage."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import table

MACHINE, OTHER = {"cores": 2, "versions": {"torch": "2"}}, {"cores": 4}
FIRST = {"task": "α", "settings": {"lr": 0.1, "hidden": [8, 8]}, "returns": [0.1 + 0.2, 1e-300], "machine": MACHINE}
SECOND = {"task": "b", "settings": {"hidden": [8, 8], "lr": 0.1}, "returns": [1.0], "machine": MACHINE}
THIRD = {"task": "b", "settings": {"lr": 0.2}, "returns": [], "machine": OTHER}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new/t.jsonl"


def test_rows_come_back_as_they_went_in(path: Path) -> None:
    assert table.read(path) == []
    for row in (FIRST, SECOND, THIRD):
        table.append(path, row)
    assert table.read(path) == [FIRST, SECOND, THIRD]
    assert list(table.read(path)[0]) == list(FIRST)  # in the order given
    assert table.read(path, {"hidden": [8, 8], "lr": 0.1}) == [FIRST, SECOND]
    assert table.read(path, {"lr": 0.3}) == []
    assert table.latest(table.read(path), "task") == {"α": FIRST, "b": THIRD}
    pairs = table.latest([{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 4}, {"a": 1, "b": 0}], "a", "b")
    assert pairs == {(1, 2): {"a": 1, "b": 2, "c": 4}, (1, 0): {"a": 1, "b": 0}}


def test_settings_and_machines_stand_once(path: Path) -> None:
    for row in (FIRST, SECOND, THIRD, FIRST):
        table.append(path, row)
    lines = path.read_text().splitlines()
    kinds = [json.loads(line).get("define") for line in lines]
    assert kinds == ["settings", "machine", None, None, "settings", "machine", None, None]
    before = path.read_bytes()
    table.append(path, SECOND)
    assert path.read_bytes().startswith(before)
    assert path.read_bytes().count(b"\n") == len(lines) + 1  # a new row is one added line


def test_a_row_without_settings_or_machine(path: Path) -> None:
    table.append(path, {"part": "sets"})
    assert table.read(path) == [{"part": "sets"}]


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_half_written_line_is_ignored_and_then_removed(path: Path, cut: int) -> None:
    table.append(path, FIRST)
    whole = path.read_bytes()
    table.append(path, THIRD)
    added = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + added[:cut])  # killed in the middle of the first line added
    assert table.read(path) == [FIRST]
    table.append(path, SECOND)
    assert table.read(path) == [FIRST, SECOND]
    assert [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_cut_after_its_definitions(path: Path) -> None:
    table.append(path, FIRST)
    path.write_bytes(path.read_bytes()[:-20])
    assert table.read(path) == []
    table.append(path, FIRST)
    assert table.read(path) == [FIRST]
    assert path.read_text().count("define") == 2


def test_only_the_last_newline_is_missing(path: Path) -> None:
    table.append(path, FIRST)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert table.read(path) == [FIRST]
    table.append(path, SECOND)
    assert table.read(path) == [FIRST, SECOND]


def test_a_damaged_line_is_an_error_that_names_it(path: Path) -> None:
    for row in (FIRST, THIRD):
        table.append(path, row)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "<<<<<<< HEAD\n", *lines[2:]]))
    for use in (table.read, lambda path: table.append(path, SECOND)):
        with pytest.raises(ValueError, match="line 3 is damaged"):
            use(path)


def test_several_may_append_at_once(path: Path) -> None:
    rows = [{"seed": seed, "settings": {"k": seed % 3}, "machine": MACHINE} for seed in range(60)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda row: table.append(path, row), rows))
    assert sorted(table.read(path), key=lambda row: row["seed"]) == rows
    assert path.read_text().count("define") == 4


def test_origin_says_where_a_row_comes_from() -> None:
    origin = table.origin()
    assert origin.keys() == {"date", "commit", "machine"}
    assert {"processor", "instruction_set", "threads", "versions"} <= origin["machine"].keys()


@pytest.mark.parametrize("file", sorted(table.RESULTS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_committed_tables_are_whole_and_say_nothing_twice(file: Path, tmp_path: Path) -> None:
    rows = table.read(file)
    assert rows
    for row in rows[:20]:  # written again they are the same lines
        table.append(tmp_path / file.name, row)
    first = (tmp_path / file.name).read_text()
    assert file.read_text().startswith(first)
    defined = [line for line in file.read_text().splitlines() if '"define"' in line]
    assert len(defined) == len(set(defined))
