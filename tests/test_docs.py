"""The documentation is true: every public name has an entry, code blocks run, links and options exist."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from test_cli import run

import sdw_fast as sdw

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
README = ROOT / "README.md"
ENTRY = re.compile(r"^\.\. auto(class|function):: sdw_fast\.([\w.]+)$", re.M)
TINY = {"steps": 2, "episodes": 1, "clones": 1, "ensemble": 2, "size": 8, "n_runs": 2, "inner_steps": 2}


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def tiny(code: str) -> str:
    """The same code with small numbers."""
    code = re.sub(r"(collect\(.*?steps=)[\d_]+", r"\g<1>200", code)
    for name, value in TINY.items():
        code = re.sub(rf"(?<!200)\b{name}=(?!200\b)[\d_]+", f"{name}={value}", code)
    return re.sub(r"range\(\d+\)", "range(2)", code).replace("learn(5_000)", "learn(120)")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages begin with: a dataset of the suite, a D4RL file, a CORL checkpoint, a policy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr("builtins.print", lambda *_: None)
    torch.manual_seed(0)
    return tmp_path


def d4rl_and_corl(place: Path) -> None:
    import h5py

    rng = np.random.default_rng(0)
    with h5py.File(place / "hopper_medium-v2.hdf5", "w") as file:
        for name, shape in {"observations": (300, 11), "actions": (300, 3), "rewards": (300,)}.items():
            file[name] = np.tanh(rng.normal(size=shape)).astype(np.float32)
        file["terminals"], file["timeouts"] = np.zeros(300, bool), np.arange(300) % 50 == 49
    layers = {"actor": (11, 16, 16, 3), "critic1": (14, 16, 16, 1)}
    content = {}
    for name, sizes in layers.items():
        pairs = list(itertools.pairwise(sizes))
        state = {f"net.{2 * i}.weight": torch.randn(o, n) / 4 for i, (n, o) in enumerate(pairs)}
        content[name] = state | {f"net.{2 * i}.bias": torch.zeros(o) for i, (_, o) in enumerate(pairs)}
    torch.save(content, place / "checkpoint.pt")


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_code_blocks_run_in_order(page: Path, place: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", text(page), re.M | re.S)
    if not blocks:
        return
    if page.stem == "libraries":
        pytest.importorskip("stable_baselines3")
    if page.stem == "deploy" and importlib.util.find_spec("onnxscript") is None:
        blocks = [block for block in blocks if "onnx" not in block]
    if page.stem == "d4rl":
        d4rl_and_corl(place)
    if page.stem in ("logging", "share"):
        sdw.collect("hopper/medium", steps=200, progress=False)
    names: dict = {"__name__": "page"}
    for block in blocks:
        exec(compile(tiny(block), str(page), "exec"), names)


def public(module: ModuleType) -> set[str]:
    return {
        name for name in module.__all__ if name != "__version__" and not isinstance(getattr(module, name), ModuleType)
    }


def test_every_public_name_has_an_entry() -> None:
    entries = {name for _, name in ENTRY.findall(text(DOCS / "api.md"))}
    assert public(sdw) | {f"ops.{name}" for name in public(sdw.ops)} <= entries


@pytest.mark.parametrize(("kind", "name"), ENTRY.findall(text(DOCS / "api.md")))
def test_every_entry_exists_and_explains_itself(kind: str, name: str) -> None:
    module, _, last = f"sdw_fast.{name}".rpartition(".")
    thing = getattr(importlib.import_module(module), last)
    assert isinstance(thing, type) == (kind == "class")
    assert len(thing.__doc__.split()) > 5
    for attribute, method in vars(thing).items() if kind == "class" else ():
        if callable(method) and not attribute.startswith("_") and attribute != "forward":
            assert method.__doc__, f"{name}.{attribute}"


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text(page), flags=re.S)):
        target = link.partition("#")[0]
        if target and not link.startswith("http"):
            assert (page.parent / target).exists(), link


def test_every_page_is_in_the_site() -> None:
    index = text(DOCS / "index.md")
    for page in PAGES:
        name = page.relative_to(DOCS).with_suffix("").as_posix()
        assert name == "index" or f"\n{name}\n" in index, name


def test_options_of_printed_commands_exist() -> None:
    helps: dict[str, str] = {}
    for page in (README, *PAGES):
        for line in re.findall(r"sdw-fast (?:[\w-]+ [^\n`#]*|--[\w-]+)", text(page)):
            command = line.split()[1]
            if command.startswith("--"):
                assert command in run("--help").output
                continue
            if command not in helps:
                result = run(command, "--help")
                assert result.exit_code == 0, line
                helps[command] = result.output
            for option in re.findall(r"\s(--[\w-]+)", line):
                assert option in helps[command], line


def test_settings_named_in_pages_exist() -> None:
    known = {*vars(sdw.DistillConfig()), *vars(sdw.config.TeacherConfig())}
    for name in re.findall(r"^\|.*?`(\w+)=[^`]*`", text(DOCS / "howto/settings.md"), re.M):
        assert name in known | {"preset"}, name
