"""Tables of results, one a study or op: JSON lines in benchmarks/results/<name>.jsonl that are only ever appended to.

{"define": "machine", "id": "0a1b2c3d", "value": {"processor": ...}}      what many rows share stands once,
{"define": "settings", "id": "4e5f6071", "value": {"steps": 2000, ...}}   before the first row that names it
{"task": ..., "settings": "4e5f6071", "machine": "0a1b2c3d", "date": ..., "commit": ..., ...}

append(path, {"task": ..., "settings": {...}, **origin()})
rows = read(path)                                       # settings and machine in full again, the oldest row first
newest = latest(rows, "task")                           # a later row of a key stands for an earlier one

A last line that a killed process left half-written is ignored, and removed by the next `append`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sdw_fast

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
SHARED = ("settings", "machine")  # entries of a row that are stored once
VERSIONS = ("torch", "numpy", "jax", "torchopt", "higher", "numba", "faiss-cpu", "scipy", "pykdtree", "scikit-learn")
VERSIONS += ("quitefastmst", "pynanoflann", "fast_hdbscan")

Entries = dict[str, Any]  # a row, or a line that defines something


def read(path: Path, settings: Any = None) -> list[Entries]:
    """All rows of a table, or those with some settings, the oldest first; settings and machine in full.

    There are none where there is no file.

    Raises:
        ValueError: a line is damaged (a half-written last one is not: it is left out).
    """
    lines, _ = _lines(path.read_bytes() if path.exists() else b"", path)
    values: dict[tuple[str, str], Any] = {}
    rows = []
    for line in lines:
        if "define" in line:
            values[line["define"], line["id"]] = line["value"]
        else:
            rows.append({key: values[key, value] if key in SHARED else value for key, value in line.items()})
    return [row for row in rows if settings is None or row["settings"] == settings]


def append(path: Path, row: Entries) -> None:
    """Adds one row, and before it its settings and its machine where they are new to the table.

    Several processes may append at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        lines, size = _lines(content, path)
        known = {(line["define"], line["id"]) for line in lines if "define" in line}
        new, stored = [], dict(row)
        for key in SHARED:
            if key in row:
                stored[key] = hashlib.sha256(json.dumps(row[key], sort_keys=True).encode()).hexdigest()[:8]
                if (key, stored[key]) not in known:
                    new.append({"define": key, "id": stored[key], "value": row[key]})
        file.truncate(size)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [*new, stored])
        file.write(b"\n" * (size > 0 and content[size - 1 : size] != b"\n") + text.encode())


def latest(rows: Iterable[Entries], *keys: str) -> dict[Any, Entries]:
    """The last row of each value of a key, or of each tuple of several keys' values."""
    return {row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys): row for row in rows}


def _lines(content: bytes, path: Path) -> tuple[list[Entries], int]:
    """The lines of a table, and where the last complete one ends."""
    lines, end = [], 0
    for number, text in enumerate(content.splitlines(keepends=True), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:  # of JSON or of UTF-8
            if text.endswith(b"\n"):
                raise ValueError(f"{path}, line {number} is damaged: {error}") from error
            break
        end += len(text)
    return lines, end


def origin() -> Entries:
    """Where a row comes from: date, commit, and the machine."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "machine": machine(),
    }


def machine() -> Entries:
    """Processor, instruction set, threads and versions."""
    config = sdw_fast.show_config("dicts")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": {"sdw_fast": config["threads"], "torch": torch.get_num_threads()},
        "instruction_set": config["instruction_set"],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"sdw_fast": config["sdw_fast"], **{n: v for n in VERSIONS if (v := _version(n))}},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
