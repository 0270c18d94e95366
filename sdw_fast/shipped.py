"""What comes with the package: teachers and synthetic sets of the locomotion suite, found by their dataset's name."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
_ENDINGS = {"teacher": "-teacher.safetensors", "set": "-set.npz"}


def names(kind: str) -> list[str]:
    """The datasets, "hopper/medium", that a "teacher" or a "set" comes with the package for, sorted."""
    ending = _ENDINGS[kind]
    stems = sorted(path.name.removesuffix(ending) for path in ASSETS.glob(f"*{ending}"))
    return [stem.replace("-", "/", 1) for stem in stems]


def path(kind: str, name: str, hint: str) -> Path:
    """Where the teacher or set of a dataset lies.

    Raises:
        ValueError: there is none for that dataset; the message lists those that there are, and ends in the hint.
    """
    task = name.removeprefix("sdw/").removesuffix("-v0")
    known = names(kind)
    if task not in known:
        raise ValueError(f"no {kind} for {name!r} comes with the package; there are {known}, or {hint}")
    return ASSETS / f"{task.replace('/', '-')}{_ENDINGS[kind]}"
