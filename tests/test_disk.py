"""The disk: names that are taken whole, what interrupted and killed processes leave, locks, room."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sdw_fast.disk import locked, naming, recover_folder, replacing, replacing_folder, reserve
from sdw_fast.files import write_text


def killed_while(work: Callable[[], object]) -> None:
    """Does a piece of work in a process that is then killed, if the work itself does not see to that."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


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


def test_a_file_that_stays_the_same_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "the same")
    before = path.stat()
    write_text(path, "the same")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    write_text(path, "another")
    assert path.read_text() == "another"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_system_names_the_file_and_nothing_else() -> None:
    for names in ((), (".a~host~1~0", None, "a")):
        with pytest.raises(OSError, match=r"^\[Errno 28\] No space left: 'a'$"), naming("a"):
            raise OSError(errno.ENOSPC, "No space left", *names)


def test_leftovers_of_killed_processes_are_cleared_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    for name in (path, tmp_path / "other.npz"):
        killed_while(lambda name=name: replacing(name).__enter__().write_text("half"))
    assert len(list(tmp_path.iterdir())) == 2
    with replacing(path) as outer:  # another thread's, say
        outer.write_text("outer")
        write_text(path, "inner")
        assert outer.exists()
    assert path.read_text() == "outer"
    assert sorted(p.name.split("~")[0] for p in tmp_path.iterdir()) == [".other", "data.npz"]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda *a: (events.append("rename"), replace(*a)))
    write_text(tmp_path / "x.txt", "x")
    assert events == [".txt", "rename", ""]


def fill_folder(target: Path, text: str) -> None:
    with replacing_folder(target) as new:
        (new / "file").write_text(text)


def test_a_folder_that_came_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "data"
    filling = replacing_folder(target, overwrite=False)
    filling.__enter__()
    fill_folder(target, "another process's")
    with pytest.raises(FileExistsError, match=rf"is there already: '{target}'"):
        filling.__exit__(None, None, None)
    assert (target / "file").read_text() == "another process's"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_replacement_of_a_folder_keeps_the_old_one(tmp_path: Path, monkeypatch, after: int) -> None:
    """Before the first of two renames, and between them."""
    target, rename, calls = tmp_path / "data", Path.rename, []

    def interrupted(path: Path, to: Path) -> None:
        calls.append(path)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        rename(path, to)

    fill_folder(target, "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fill_folder(target, "new")
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    fill_folder(target, "new")
    assert (target / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_killed_between_two_renames_is_put_back(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "data"
    fill_folder(target, "old")
    rename = Path.rename

    def killed(path: Path, to: Path) -> None:
        rename(path, to)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        killed_while(lambda: fill_folder(target, "new"))
    assert not target.exists()
    recover_folder(target)
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_room_is_found_or_refused(tmp_path: Path) -> None:
    reserve(tmp_path, 1 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="no room for 1 MiB: File too large"):
            reserve(tmp_path, 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    sentence = rf"{tmp_path} is in use by process {os.getpid()} on \S+ since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d: wait"
    with locked(tmp_path), pytest.raises(BlockingIOError, match=sentence), locked(tmp_path):
        pytest.fail("held twice")
    with locked(tmp_path):
        pass


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    killed_while(lambda: locked(tmp_path).__enter__())
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
