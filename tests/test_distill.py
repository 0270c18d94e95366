"""The outer loop: what a step does, what a run leaves behind, and that interruption changes nothing."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast.distill import DistillConfig, Distiller, RunFolder, load_checkpoint, read_metrics
from sdw_fast.policy import orthogonal_parameters

TINY = {"size": 12, "hidden": (16, 16), "inner_steps": 5, "batch_size": 64, "steps": 30, "checkpoint_every": 7}


def same_set(first: sdw.SyntheticDataset, second: sdw.SyntheticDataset) -> bool:
    return np.array_equal(first.observations, second.observations) and np.array_equal(first.actions, second.actions)


def test_step_follows_the_hypergradient(small_data, small_teacher) -> None:
    """One SGD step without clipping against autograd through the whole unroll in float64."""
    config = DistillConfig(**TINY, objective="pbc", optimizer="sgd", lr=0.3, momentum=0.0, clip_norm=1e9, seed=4)
    distiller = Distiller(small_data, small_teacher, config)
    before = [t.detach().clone().double().requires_grad_() for t in (distiller.observations, distiller.actions)]
    generator = torch.Generator().manual_seed(4)
    params = orthogonal_parameters((11, 16, 16, 3), gain=config.gain, generator=generator)
    rows = torch.randint(len(small_data), (64,), generator=generator)
    metrics = distiller.step()

    def forward(params: list[torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(states @ params[0].T + params[1])
        hidden = torch.relu(hidden @ params[2].T + params[3])
        return torch.tanh(hidden @ params[4].T + params[5])

    params = [p.double().requires_grad_() for p in params]
    velocity = [torch.zeros_like(p) for p in params]
    for _ in range(5):
        inner = (forward(params, before[0]) - before[1]).square().mean()
        gradients = torch.autograd.grad(inner, params, create_graph=True)
        velocity = [config.inner_momentum * u + g for u, g in zip(velocity, gradients, strict=True)]
        params = [p - config.inner_lr * u for p, u in zip(params, velocity, strict=True)]
    states = torch.as_tensor(small_data.normalized_observations).double()[rows]
    targets = torch.as_tensor(small_teacher.actions(small_data.observations)).double()[rows]
    loss = (forward(params, states) - targets).square().mean()
    expected = torch.autograd.grad(loss, before)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for after, start, gradient in zip((distiller.observations, distiller.actions), before, expected, strict=True):
        moved = (start.detach() - after.detach().double()) / 0.3
        torch.testing.assert_close(moved, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_clipping_bounds_the_step(small_data, small_teacher) -> None:
    config = DistillConfig(**TINY, objective="sdw", optimizer="sgd", lr=1.0, momentum=0.0, clip_norm=1e-3)
    distiller = Distiller(small_data, small_teacher, config)
    before = torch.cat([distiller.observations.detach().flatten(), distiller.actions.detach().flatten()])
    assert distiller.step()["gradient_norm"] > 1e-3
    after = torch.cat([distiller.observations.detach().flatten(), distiller.actions.detach().flatten()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("objective", ["dbc", "pbc", "av-pbc", "sdw"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_distillation_lowers_the_outer_loss(small_data, small_teacher, objective: str, optimizer: str) -> None:
    losses: list[float] = []
    sdw.distill(
        small_data,
        None if objective == "dbc" else small_teacher,
        objective=objective,
        optimizer=optimizer,
        lr=0.03 if optimizer == "adam" else 0.5,
        **{"size": 40, "hidden": (32, 32), "gain": 1.0, "inner_steps": 30, "inner_lr": 0.05, "steps": 100},
        callback=lambda distiller, metrics: losses.append(metrics["loss"]),
        progress=False,
    )
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_a_narrow_inner_loop_is_that_of_a_narrow_policy(small_data, small_teacher) -> None:
    """inner_width narrows what is unrolled, layer by layer, and nothing else: clones have the widths of hidden."""
    wide = sdw.distill(small_data, small_teacher, **{**TINY, "hidden": (16, 8)}, inner_width=10, progress=False)
    narrow = sdw.distill(small_data, small_teacher, **{**TINY, "hidden": (10, 8)}, inner_width=None, progress=False)
    assert same_set(wide, narrow)
    assert [p.shape[0] for p in sdw.behavior_clone(wide).parameters()] == [16, 16, 8, 8, 3, 3]


def test_same_seed_same_bits(small_data, small_teacher) -> None:
    runs = [sdw.distill(small_data, small_teacher, **TINY, seed=seed, progress=False) for seed in (1, 1, 2)]
    assert same_set(runs[0], runs[1])
    assert not same_set(runs[0], runs[2])


def test_result_carries_where_it_came_from(small_data, small_teacher, tmp_path) -> None:
    result = sdw.distill(small_data, small_teacher, **TINY, folder=tmp_path / "run", progress=False)
    assert result.config["objective"] == "sdw"
    assert result.config["iteration"] == 30
    assert result.dataset_hash == small_data.content_hash
    assert same_set(sdw.SyntheticDataset.load(tmp_path / "run" / "best.npz"), result)
    assert same_set(sdw.SyntheticDataset.load(tmp_path / "run" / "last.npz"), result)
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == list(range(1, 31))
    assert {"config.json", "metrics.jsonl", "checkpoint", "best.npz", "last.npz"} <= set(os.listdir(tmp_path / "run"))


def test_stopped_run_goes_on_to_the_same_bits(small_data, small_teacher, tmp_path) -> None:
    def run(folder: str, steps: int) -> sdw.SyntheticDataset:
        settings = {**TINY, "steps": steps, "schedule": "constant"}
        return sdw.distill(small_data, small_teacher, folder=tmp_path / folder, **settings, progress=False)

    whole = run("whole", 30)
    run("parts", 17)
    assert load_checkpoint(tmp_path / "parts" / "checkpoint")["iteration"] == 17
    parts = run("parts", 30)
    assert same_set(whole, parts)
    losses = [[m["loss"] for m in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


RUN = """
import numpy as np, sdw_fast as sdw, time
rng = np.random.default_rng(0)
observations = rng.normal(size=(400, 11)).astype(np.float32)
data = sdw.load_dataset({{"observations": observations, "actions": np.tanh(observations[:, :3]),
                         "rewards": np.zeros(400),
                         "terminations": np.zeros(400, bool), "truncations": np.arange(400) % 20 == 19}})
def callback(distiller, metrics):
    time.sleep({pause})
    if distiller.iteration == 9:  # past the first checkpoint, at step 7
        print("started", flush=True)
sdw.distill(data, objective="dbc", size=12, hidden=(16, 16), inner_steps=5, batch_size=64, steps=40, checkpoint_every=7,
            folder={folder!r}, callback=callback)
print("finished", flush=True)
"""


def run_script(folder: Path, pause: float) -> subprocess.Popen[str]:
    code = RUN.format(folder=str(folder), pause=pause)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_resumes_to_the_same_bits(tmp_path: Path, signum: signal.Signals) -> None:
    whole = run_script(tmp_path / "whole", pause=0.0)
    cut = run_script(tmp_path / "cut", pause=0.1)
    assert cut.stdout is not None
    assert cut.stdout.readline() == "started\n"
    cut.send_signal(signum)
    output, errors = cut.communicate(timeout=250)
    assert "finished" not in output
    assert whole.wait(timeout=250) == 0, whole.communicate()
    reached = load_checkpoint(tmp_path / "cut" / "checkpoint")["iteration"]
    if signum == signal.SIGINT:
        assert "the same call with folder" in errors
        assert reached == read_metrics(tmp_path / "cut")[-1]["step"]
    else:
        assert reached % 7 == 0
    assert 7 <= reached < 40
    resumed = run_script(tmp_path / "cut", pause=0.0)
    assert resumed.wait(timeout=250) == 0, resumed.communicate()
    for name in ("last.npz", "best.npz"):
        first, second = (sdw.SyntheticDataset.load(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert same_set(first, second)
    steps = [m["step"] for m in read_metrics(tmp_path / "cut")]
    assert steps == list(range(1, 41))


def test_cosine_schedule_takes_the_learning_rate_to_zero(small_data, small_teacher) -> None:
    config = DistillConfig(**{**TINY, "steps": 4}, lr=0.4, schedule="cosine", optimizer="sgd", momentum=0.0)
    distiller = Distiller(small_data, small_teacher, config)
    rates = []
    for _ in range(6):  # two steps beyond the end stand still
        before = distiller.observations.detach().clone()
        gradient = distiller.step()["gradient_norm"]
        rates.append(distiller._optimizer.param_groups[0]["lr"])
        assert torch.equal(distiller.observations, before) == (rates[-1] == 0)
        assert gradient > 0
    half = 0.2 * (1 + np.cos(np.pi / 4))
    assert rates == pytest.approx([0.4, half, 0.2, 0.4 - half, 0.0, 0.0])


def test_the_set_is_the_moving_average_of_the_iterates(small_data, small_teacher) -> None:
    """A plain mean over the first 1 / (1 − average) steps, then exponential: 0.75 is four steps."""
    plain, averaged = (
        Distiller(small_data, small_teacher, DistillConfig(**TINY, average=average)) for average in (0.0, 0.75)
    )
    iterates = []
    for _ in range(6):
        plain.step()
        averaged.step()
        iterates.append(plain.synthetic.observations.astype(np.float64))
        assert torch.equal(plain.observations, averaged.observations)  # gradients are taken at the iterates
    expected = np.mean(iterates[:4], axis=0)
    for iterate in iterates[4:]:
        expected = 0.75 * expected + 0.25 * iterate
    np.testing.assert_allclose(averaged.synthetic.observations, expected, rtol=1e-5, atol=1e-5)


def test_schedule_and_average_go_on_to_the_same_bits(small_data, small_teacher, tmp_path) -> None:
    settings = {**TINY, "steps": 20, "schedule": "cosine", "average": 0.9}
    whole = sdw.distill(small_data, small_teacher, **settings, progress=False)

    def stop(distiller: Distiller, metrics: dict) -> None:
        if distiller.iteration == 10:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        sdw.distill(small_data, small_teacher, **settings, folder=tmp_path, callback=stop, progress=False)
    with pytest.raises(ValueError, match=r"other settings of \['steps'\]"):  # a cosine over 30 steps is another one
        sdw.distill(small_data, small_teacher, **{**settings, "steps": 30}, folder=tmp_path, progress=False)
    assert same_set(whole, sdw.distill(small_data, small_teacher, **settings, folder=tmp_path, progress=False))


def test_runs_side_by_side_take_the_steps_of_single_runs(small_data, small_teacher) -> None:
    settings = {**TINY, "steps": 4, "clip_norm": 0.05, "average": 0.5}  # some of the hypergradients are longer
    together = Distiller(small_data, small_teacher, DistillConfig(**settings, seed=5), n_runs=3)
    assert together.observations.shape == (3, 12, 11)
    for _ in range(4):
        metrics = together.step()
    assert {name: value.shape for name, value in metrics.items()} == dict.fromkeys(metrics, (3,))
    for run, found in enumerate(together.sets):
        alone = Distiller(small_data, small_teacher, DistillConfig(**settings, seed=5 + run))
        for _ in range(4):
            single = alone.step()
        assert found.config == alone.synthetic.config
        np.testing.assert_allclose(found.observations, alone.synthetic.observations, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.actions, alone.synthetic.actions, rtol=1e-4, atol=1e-4)
        assert {name: value[run] for name, value in metrics.items()} == pytest.approx(single, rel=1e-3)
    with pytest.raises(ValueError, match=r"take \.sets"):
        _ = together.synthetic


def test_runs_side_by_side_stop_and_go_on_to_the_same_bits(small_data, small_teacher, tmp_path) -> None:
    def run(folder: str, steps: int) -> list[sdw.SyntheticDataset]:
        settings = {**TINY, "steps": steps, "schedule": "constant"}
        return sdw.distill(small_data, small_teacher, n_runs=2, folder=tmp_path / folder, **settings, progress=False)

    whole = run("whole", 20)
    run("parts", 9)
    assert all(same_set(a, b) for a, b in zip(whole, run("parts", 20), strict=True))
    assert not same_set(*whole)
    for number, synthetic in enumerate(whole):
        folders = [tmp_path / name / f"run-{number:03}" for name in ("whole", "parts")]
        assert all(same_set(sdw.SyntheticDataset.load(folder / "best.npz"), synthetic) for folder in folders)
        losses = [[m["loss"] for m in read_metrics(folder)] for folder in folders]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 20
    assert {"config.json", "checkpoint"} <= set(os.listdir(tmp_path / "whole"))
    settings = {**TINY, "schedule": "constant"}
    with pytest.raises(ValueError, match=r"other settings of \['n_runs'\]"):
        sdw.distill(small_data, small_teacher, folder=tmp_path / "whole", **settings, progress=False)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_host_that_runs_ahead_changes_nothing(
    small_data, small_teacher, tmp_path, monkeypatch, optimizer: str
) -> None:
    """What a GPU does, on the CPU: steps are looked at only from time to time, the optimizer is the fused one."""
    settings = {**TINY, "steps": 24, "optimizer": optimizer, "average": 0.9, "schedule": "cosine"}
    waiting = sdw.distill(small_data, small_teacher, **settings, folder=tmp_path / "waiting", progress=False)
    monkeypatch.setattr(Distiller, "_ahead", True)
    monkeypatch.setattr(sys.modules[Distiller.__module__], "FETCH_EVERY", 5)
    fetched: list[int] = []
    fetch = Distiller._fetch
    monkeypatch.setattr(Distiller, "_fetch", lambda self, steps: fetched.append(len(steps)) or fetch(self, steps))
    ahead = sdw.distill(small_data, small_teacher, **settings, folder=tmp_path / "ahead", progress=False)
    assert fetched == [5, 2, 5, 2, 5, 2, 3]  # a checkpoint every 7 steps
    np.testing.assert_allclose(ahead.observations, waiting.observations, rtol=1e-3, atol=1e-3)
    first, second = (read_metrics(tmp_path / name) for name in ("waiting", "ahead"))
    assert [m["step"] for m in first] == [m["step"] for m in second] == list(range(1, 25))
    np.testing.assert_allclose([m["loss"] for m in first], [m["loss"] for m in second], rtol=1e-3)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("bad", [1, 4])
def test_a_step_that_diverges_is_left_out(
    small_data, small_teacher, tmp_path, monkeypatch, optimizer: str, ahead: bool, bad: int
) -> None:
    monkeypatch.setattr(Distiller, "_ahead", ahead)
    config = DistillConfig(**TINY, optimizer=optimizer)
    reference, distiller = (Distiller(small_data, small_teacher, config) for _ in range(2))
    draw = Distiller._draw

    def poisoned(self: Distiller) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        initial, batches = draw(self)
        if self is distiller and self.iteration == bad - 1:
            batches[0][0].fill_(torch.nan)
        return initial, batches

    monkeypatch.setattr(Distiller, "_draw", poisoned)
    distiller.run(tmp_path, progress=False)
    for step in range(1, config.steps + 1):
        if step == bad:  # draws, and does nothing with them
            reference._draw()
            reference.iteration += 1
        else:
            reference.step()
    left_out = [m["step"] for m in read_metrics(tmp_path) if not np.isfinite(m["loss"])]
    assert (left_out, distiller.iteration) == ([bad], config.steps)
    assert same_set(distiller.synthetic, reference.synthetic)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_run_that_diverges_ends(small_data, small_teacher, monkeypatch, ahead: bool) -> None:
    monkeypatch.setattr(Distiller, "_ahead", ahead)
    distiller = Distiller(small_data, small_teacher, DistillConfig(**TINY, inner_lr=1e20))
    before = distiller.state_dict()
    with pytest.raises(FloatingPointError, match="10 outer steps in a row are not finite, up to step 10: loss nan"):
        distiller.run(progress=False)
    with pytest.raises(FloatingPointError, match="11 outer steps in a row"):  # nor does it go on in silence
        distiller.step()
    assert torch.equal(distiller.observations, before["observations"])
    assert torch.equal(distiller.actions, before["actions"])
    assert same_set(distiller.synthetic, Distiller(small_data, small_teacher, distiller.config).synthetic)


def test_files_are_closed(small_data, small_teacher, tmp_path) -> None:
    distiller = Distiller(small_data, small_teacher, DistillConfig(**TINY))
    with RunFolder(tmp_path, distiller) as folder:
        folder.log(2, [{"loss": 1.0}, {"loss": np.float32(2.0)}])
    assert [m["loss"] for m in read_metrics(tmp_path)] == [1.0, 2.0]
    with pytest.raises(ValueError, match="closed"):
        folder.log(3, [{"loss": 3.0}])


def test_checkpoints_of_earlier_versions_go_on(small_data, small_teacher, tmp_path) -> None:
    whole = sdw.distill(small_data, small_teacher, **TINY, progress=False)
    distiller = Distiller(small_data, small_teacher, DistillConfig(**TINY))
    for _ in range(9):
        distiller.step()
    state = distiller.state_dict()
    state["generator"] = state["generator"][0]
    state["best_return"] = state.pop("best_returns")[0]
    del state["device"], state["n_runs"]
    continued = Distiller(small_data, small_teacher, DistillConfig(**TINY))
    continued.load_state_dict(state)
    assert same_set(whole, continued.run(progress=False))


def test_checkpoint_of_another_dataset_or_setting_is_refused(small_data, small_teacher, tmp_path) -> None:
    sdw.distill(small_data, small_teacher, **TINY, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="another dataset"):
        sdw.distill(small_data.subset(np.arange(300)), small_teacher, **TINY, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="inner_lr"):
        sdw.distill(small_data, small_teacher, **TINY, inner_lr=0.05, folder=tmp_path, progress=False)


def test_damaged_checkpoint_is_an_error(small_data, small_teacher, tmp_path) -> None:
    sdw.distill(small_data, small_teacher, **TINY, folder=tmp_path, progress=False)
    (tmp_path / "checkpoint").write_bytes((tmp_path / "checkpoint").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        sdw.distill(small_data, small_teacher, **TINY, folder=tmp_path, progress=False)


def test_works_outside_the_main_thread(small_data, small_teacher) -> None:
    results: list[sdw.SyntheticDataset] = []
    thread = threading.Thread(
        target=lambda: results.append(sdw.distill(small_data, small_teacher, **TINY, progress=False))
    )
    thread.start()
    thread.join()
    assert len(results) == 1


def test_evaluation_needs_an_environment(small_data, small_teacher) -> None:
    with pytest.raises(ValueError, match="names no environment"):
        sdw.distill(small_data, small_teacher, **TINY, eval_every=10, progress=False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"objective": "bc"}, "objective"),
        ({"size": 0}, "size"),
        ({"lr": float("nan")}, "lr"),
        ({"window": 101}, "window"),
        ({"momentum": 1.0}, "momentum"),
        ({"inner_momentum": 1.0}, "inner_momentum"),
        ({"average": 1.0}, "average"),
        ({"schedule": "linear"}, "schedule"),
        ({"hidden": (0,)}, "hidden"),
        ({"inner_width": 0}, "inner_width"),
        ({"optimiser": "adam"}, "unknown settings"),
    ],
)
def test_bad_settings_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig.from_dict(setting)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(small_data, small_teacher) -> None:
    with pytest.raises(ValueError, match="'cuda' needs a GPU"):
        sdw.distill(small_data, small_teacher, **TINY, device="cuda")


def test_paper_settings() -> None:
    config = DistillConfig.paper(seed=3)
    assert (config.optimizer, config.lr, config.momentum, config.clip_norm) == ("sgd", 0.1, 0.9, 2.0)
    assert (config.steps, config.size) == (50_000, 256)
    assert (config.inner_steps, config.inner_lr, config.inner_momentum) == (100, 0.1, 0.0)
    assert (config.batch_size, config.beta, config.seed) == (2_560, 0.02, 3)
    assert (config.hidden, config.inner_width, config.gain) == ((256, 256, 256), None, math.sqrt(2))
    assert (config.schedule, config.average) == ("constant", 0.0)
    assert DistillConfig.paper(gain=1.0, inner_steps=20).gain == 1.0
