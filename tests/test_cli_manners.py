"""The command line's manners: version, completion, several runs, saved policies, options without effect refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli import TINY, printed, run

import sdw_fast as sdw
from sdw_fast.folder import find_runs


@pytest.fixture(scope="module")
def two_runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs, the second one of two sets."""
    folder = tmp_path_factory.mktemp("runs")
    assert run("distill", dataset, *TINY, "--steps", 2, "--out", folder / "one").exit_code == 0
    assert run("distill", dataset, *TINY, "--steps", 2, "--n-runs", 2, "--out", folder / "two").exit_code == 0
    return folder


def test_the_version_is_told() -> None:
    assert run("--version").output == f"sdw-fast {sdw.__version__}\n"


def test_shells_can_complete() -> None:
    assert "--install-completion" in run("--help").output


def test_what_comes_with_the_package_is_listed() -> None:
    config = printed("info")
    assert "hopper/medium" in config["pretrained_teachers"]
    assert "hopper/medium" in config["pretrained_sets"]


def test_several_runs_in_one_picture(two_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(find_runs([two_runs / "one", two_runs / "two"])) == ["one", "run-000", "run-001"]
    assert list(find_runs([two_runs / "two", two_runs / "two/run-001"])) == ["run-000", "run-001"]
    monkeypatch.chdir(tmp_path)
    assert run("plot", two_runs / "one").exit_code == 0
    assert (two_runs / "one/metrics.png").exists()
    assert run("plot", two_runs / "one", two_runs / "two").exit_code == 0
    assert run("plot", two_runs / "two", "--out", "two.svg").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.png", "two.svg"]
    assert "holds no run" in run("plot", two_runs / "one", tmp_path).output


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("distill", ["--tau", "0.1", "--ess", "0.5"], "--ess would have no effect: tau is given"),
        ("density", ["--tau", "0.1", "--ess", "0.5"], "--ess would have no effect: tau is given"),
        ("density", ["--density-method", "flow", "--k", "5"], "--k would have no effect: density_method flow"),
        ("distill", ["--density-method", "flow", "--k", "5"], "--k would have no effect: density_method flow"),
        ("distill", ["--objective", "av-pbc", "--k", "5"], "--k would have no effect: objective av-pbc has no density"),
        ("distill", ["--no-density", "--clip", "0.5"], "--clip would have no effect: objective sdw has no density"),
        ("distill", ["--objective", "pbc", "--value-weights", "paper"], "--value-weights would have no effect"),
        ("distill", ["--eval-clones", "2"], "--eval-clones would have no effect: eval_every is 0"),
        ("distill", ["--eval-clones", "2", "--eval-every", "1", "--fixed-initialization", "0"], "one policy"),
        ("distill", ["--objective", "dbc", "--teacher", "t.safetensors"], "--teacher would have no effect"),
        ("train-teacher", ["--algorithm", "iql", "--alpha", "1"], "--alpha would have no effect: algorithm iql"),
        ("train-teacher", ["--expectile", "0.8"], "--expectile would have no effect: algorithm td3bc"),
    ],
)
def test_an_option_without_effect_is_refused(command: str, options: list[str], words: str, tmp_path: Path) -> None:
    result = run(command, "absent.npz", *options, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert words in result.output
    assert not list(tmp_path.iterdir())


def test_every_preset_uses_all_that_it_sets() -> None:
    for name, settings in sdw.config.PRESETS.items():
        assert not set(settings) & set(sdw.DistillConfig.preset(name).unused())


def test_a_saved_policy_is_evaluated(two_runs: Path, toy_env: str, tmp_path: Path) -> None:
    pairs = sdw.SyntheticDataset.load(two_runs / "one/best.npz")
    policy = sdw.behavior_clone(pairs, ensemble=2, seed=3)
    file = policy.save(tmp_path / "policy.safetensors")
    expected = sdw.evaluate(policy, toy_env, episodes=4, seed=3).to_dict()
    assert printed("evaluate", file, "--episodes", 4, "--seed", 3) == expected
    ensemble = ["--ensemble", 2, "--clones", 1, "--episodes", 4, "--seed", 3]
    assert printed("evaluate", two_runs / "one/best.npz", *ensemble) == expected
    refused = run("evaluate", file, "--clones", 2, "--ensemble", 2)
    assert (refused.exit_code, "--clones and --ensemble would have no effect" in refused.output) == (1, True)
    assert "clones must be between 1" in run("evaluate", two_runs / "one/best.npz", "--clones", 0).output
    assert "ensemble must be at least 1" in run("evaluate", two_runs / "one/best.npz", "--ensemble", 0).output


@pytest.mark.parametrize("command", ["plot", "report"])
@pytest.mark.parametrize("damage", ["", "{}", '{"step": 1}', '{"config": [], "dataset": 3}'])
def test_damaged_runs_get_one_sentence(dataset: Path, tmp_path: Path, command: str, damage: str) -> None:
    """Any of a run's files may be damaged; no traceback follows."""
    assert run("distill", dataset, *TINY, "--steps", 1, "--out", tmp_path / "run").exit_code == 0
    for name in ("config.json", "metrics.jsonl", "best.npz"):
        whole = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_text(f"{damage}\n")
        result = run(command, tmp_path / "run")
        assert result.exit_code in (0, 1)
        assert result.output.startswith("error: ") == (result.exit_code == 1), result.output
        assert len(result.output.splitlines()) == 1
        (tmp_path / "run" / name).write_bytes(whole)
