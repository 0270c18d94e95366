"""The study of learners' histories: rows in order, the successors of ended episodes, the learner as a teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.studies import histories, work

ROWS, ENDS = 60, [19, 39, 59]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A history of hopper's shape and its learner, as files."""
    pytest.importorskip("mujoco")
    rng = np.random.default_rng(0)
    ended = np.isin(np.arange(ROWS), ENDS)
    folder = tmp_path / "Hopper"
    folder.mkdir()
    np.savez(
        folder / "replay.npz",
        observations=rng.normal(size=(ROWS, 11)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(ROWS, 3)).astype(np.float32),
        rewards=np.ones(ROWS, np.float32),
        terminals=ended & (np.arange(ROWS) < 30),
        timeouts=ended & (np.arange(ROWS) >= 30),
        end_index=np.array(ENDS),
        end_observations=np.full((3, 11), 7, np.float32),
    )
    torch.manual_seed(0)
    actor = {
        f"n.{i}.{kind}": torch.randn(*shape) for i, *shapes in ACTOR for kind, shape in zip(KINDS, shapes, strict=True)
    }
    critic = {name: torch.randn(2, *shape) for name, shape in CRITIC.items()}
    torch.save({"actor": actor, "critic": critic}, folder / "replay_learner.pt")
    return folder


KINDS = ("weight", "bias")
ACTOR = [(0, (5, 11), (5,)), (2, (5, 5), (5,)), (4, (6, 5), (6,))]
CRITIC = {"w1": (14, 5), "b1": (1, 5), "w2": (5, 5), "b2": (1, 5), "w3": (5, 1), "b3": (1, 1)}


def test_history_keeps_the_order_and_the_ends(folder: Path) -> None:
    data = histories.history(folder)
    assert len(data) == ROWS
    assert data.env_id == "Hopper-v5"
    following = data.next_observations()
    assert (following[ENDS] == 7).all()
    np.testing.assert_array_equal(following[:19], data.observations[1:20])
    assert np.flatnonzero(data.terminations).tolist() == [19]
    assert np.flatnonzero(data.truncations).tolist() == [39, 59]


def test_learner_acts_by_its_mean_and_values_by_the_lower_critic(folder: Path) -> None:
    teacher = histories.learner(folder)
    state = torch.load(folder / "replay_learner.pt", weights_only=True)
    states, actions = torch.randn(4, 11), torch.rand(4, 3)
    h = states
    for i in (0, 2):
        h = torch.relu(h @ state["actor"][f"n.{i}.weight"].T + state["actor"][f"n.{i}.bias"])
    mean = (h @ state["actor"]["n.4.weight"].T + state["actor"]["n.4.bias"])[:, :3]
    np.testing.assert_allclose(teacher.actor(states).detach(), torch.tanh(mean), rtol=1e-5, atol=1e-6)
    c, x = state["critic"], torch.cat([states, actions], 1)
    for i in (1, 2):
        x = torch.relu(x @ c[f"w{i}"] + c[f"b{i}"])
    values = (x @ c["w3"] + c["b3"]).amin(0)[:, 0]
    assert teacher.critic is not None
    np.testing.assert_allclose(teacher.critic(states, actions).detach(), values, rtol=1e-4)


def test_the_command_asks_for_its_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["histories"])
    with pytest.raises(SystemExit):
        work.options("help", ("folder", "histories"))
    assert "say where FOLDER and HISTORIES are, or --tables" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["histories", "here", "there", "--only", "hopper"])
    made: list[tuple] = []
    monkeypatch.setattr(work, "one_thread", lambda: None)
    work.study(
        "help",
        [(0, "hopper/medium"), (0, "walker2d/medium")],
        results=dict,
        measure=lambda *given: made.append(given),
        write_page=lambda: made.append(()),
        folders=("folder", "histories"),
    )
    assert made == [((0, "hopper/medium"), Path("here"), Path("there")), ()]


def test_a_row_of_each_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"size": 12, "steps": 2, "k": 10, "ess": 0.8, "hidden": [8], "inner_steps": 2}
    for name, value in {
        "TABLE": folder / "rows.jsonl",
        "SETTINGS": small,
        "SEEDS": range(1),
        "POLICIES": 2,
        "EPISODES": 1,
        "EPISODES_OF_ONE": 1,
    }.items():
        monkeypatch.setattr(histories, name, value)
    for method in histories.METHODS:
        histories.measure((0, "hopper/medium-replay", method), folder.parent)
    text = histories.results_table(histories.results())
    assert "missing" not in text.splitlines()[2]
    assert "| halfcheetah/medium-replay | missing | missing |" in text
