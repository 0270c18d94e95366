"""The outer step: against plain autograd, each setting to what it sets, runs side by side, states that go on."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from oracle import autograd_unroll, policy, relative_error

import sdw_fast as sdw
from sdw_fast import batches
from sdw_fast.networks import orthogonal_parameters
from sdw_fast.run import new_distiller, run
from sdw_fast.units import Affine

TINY = {"size": 12, "hidden": (16, 16), "inner_steps": 5, "batch_size": 64, "steps": 8}
BOUNDS = Affine.between([-2, 0, -1], [1, 3, 0.5])


def make(data, teacher=None, n_runs=None, **settings: Any) -> sdw.Distiller:
    return new_distiller(data, teacher, sdw.DistillConfig(**{**TINY, **settings}), n_runs=n_runs)


def in_other_units(data: sdw.TransitionDataset, teacher: sdw.Teacher) -> tuple[sdw.TransitionDataset, sdw.Teacher]:
    """The same dataset and teacher in an environment whose actions lie between other bounds, with a name and scores."""
    returns = Affine.scores(-5.0, 40.0)
    units = dataclasses.replace(data.units, actions=BOUNDS, returns=returns, env_id="Other-v1")
    moved = dataclasses.replace(data, actions=BOUNDS.denormalize(data.actions), units=units, name="moved")
    zero = Affine(np.zeros(11), np.ones(11))
    return moved, sdw.Teacher(teacher.actor, teacher.critic, units=sdw.Units(zero, BOUNDS))


class Reference:
    """The outer loop as one would write it first, of one set: float64, autograd through the whole unroll."""

    def __init__(self, problem: sdw.OuterProblem, start: sdw.SyntheticDataset, config: sdw.DistillConfig) -> None:
        self.config = config
        self.arrays = [
            torch.from_numpy(x).double()
            for x in (problem.units.states.normalize(problem.observations), problem.targets, problem.weights)
        ]
        self.rows = torch.from_numpy(problem.split()[0])
        self.leaves = [torch.from_numpy(x).double().requires_grad_() for x in start.normalized()]
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.leaves, betas=(config.momentum, 0.999))
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.leaves, momentum=config.momentum)
        self.iterates: list[list[torch.Tensor]] = []

    def draw(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The initial parameters and the rows of a step."""
        config = self.config
        widths = [min(width, config.inner_width or width) for width in config.hidden]
        sizes = [self.leaves[0].shape[1], *widths, self.leaves[1].shape[1]]
        drawn = orthogonal_parameters(sizes, gain=config.gain, generators=[self.generator])
        return drawn, self.rows[torch.randint(len(self.rows), (config.batch_size,), generator=self.generator)]

    def step(self) -> tuple[float, float]:
        """Loss, and norm of the hypergradient."""
        config = self.config
        drawn, rows = self.draw()
        states, targets, weights = (array[rows] for array in self.arrays)
        steps, window = config.inner_steps, config.window or config.inner_steps
        initial = [p[0].double().requires_grad_() for p in drawn]
        final, _ = autograd_unroll(*self.leaves, initial, steps, config.inner_lr, config.inner_momentum, window)
        loss = (weights * (policy(final, states) - targets).square().mean(dim=1)).mean()
        gradients = torch.autograd.grad(loss, self.leaves)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient * min(1.0, config.clip_norm / norm)
        cosine = (1 + math.cos(math.pi * len(self.iterates) / config.steps)) / 2
        self.optimizer.param_groups[0]["lr"] = config.lr * (cosine if config.schedule == "cosine" else 1)
        self.optimizer.step()
        self.iterates.append([leaf.detach().clone() for leaf in self.leaves])
        return float(loss.detach()), norm

    def averages(self) -> list[torch.Tensor]:
        """A plain mean of the iterates at first, then an exponential one."""
        average = self.iterates[0]
        for number, iterate in enumerate(self.iterates[1:], start=2):
            share = max(1 - self.config.average, 1 / number)
            average = [(1 - share) * old + share * new for old, new in zip(average, iterate, strict=True)]
        return average


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "dbc"},
        {"objective": "pbc", "seed": 3},
        {"optimizer": "sgd", "lr": 0.3},
        {"optimizer": "sgd", "lr": 0.3, "momentum": 0.0, "clip_norm": 1e9},
        {"momentum": 0.5},
        {"clip_norm": 1e9},
        {"schedule": "constant"},
        {"average": 0.0},
        {"average": 0.6},
        {"window": 2},
        {"tape": "recompute"},
        {"inner_width": 10, "hidden": (16, 8)},
        {"inner_momentum": 0.0, "inner_lr": 0.3},
        {"gain": math.sqrt(2), "inner_steps": 3},
        {"size": 20, "batch_size": 32, "init": "kmeans++"},
    ],
    ids=str,
)
def test_steps_are_those_of_plain_autograd(small_data, small_teacher, settings: dict) -> None:
    data, teacher = in_other_units(small_data, small_teacher)
    config = sdw.DistillConfig(**{**TINY, **settings})
    problem = sdw.outer_problem(data, teacher, config)
    start = sdw.real_pairs(data, config.size, init=config.init, seed=config.seed)
    distiller, reference = sdw.Distiller(problem, start, config), Reference(problem, start, config)
    for _ in range(4):
        metrics = distiller.step()
        loss, norm = reference.step()
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    expected = reference.averages() if config.average else reference.iterates[-1]
    for found, wanted, first in zip(distiller.synthetic.normalized(), expected, start.normalized(), strict=True):
        moved = torch.from_numpy(first).double()
        assert relative_error([torch.from_numpy(found) - moved], [wanted - moved]) < 1e-3


def test_gradient_norm_is_that_before_clipping(small_data, small_teacher) -> None:
    free, clipped = (
        make(small_data, small_teacher, optimizer="sgd", lr=1.0, momentum=0.0, average=0.0, clip_norm=bound)
        for bound in (1e9, 1e-3)
    )
    before = torch.cat([x.detach().clone().flatten() for x in (clipped.observations, clipped.actions)])
    norm = clipped.step()["gradient_norm"]
    assert norm == free.step()["gradient_norm"] > 1e-3
    after = torch.cat([x.detach().flatten() for x in (clipped.observations, clipped.actions)])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_adjoint_growth_is_of_the_initialization_and_the_end(small_data, small_teacher) -> None:
    """At T = 1 and a tiny step the unroll amplifies nothing; a window of all steps is no window."""
    still = make(small_data, small_teacher, inner_steps=1, inner_lr=1e-6).step()
    assert still["adjoint_growth"] == pytest.approx(1, rel=1e-4)
    rough = {"inner_lr": 0.5, "adapt_inner_lr": False}
    whole, window = (make(small_data, small_teacher, **rough, window=w).step() for w in (None, 5))
    assert whole == window
    assert whole["adjoint_growth"] != pytest.approx(1, rel=1e-3)


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
    assert wide == narrow
    assert [p.shape[1] for p in sdw.behavior_clone(wide).parameters()] == [16, 16, 8, 8, 3, 3]


def test_same_seed_same_bits_and_no_other_random_state(small_data, small_teacher) -> None:
    torch.manual_seed(5)
    before, legacy = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    runs = [sdw.distill(small_data, small_teacher, **TINY, seed=seed, progress=False) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], legacy)  # noqa: NPY002


def test_cosine_schedule_takes_the_learning_rate_to_zero(small_data, small_teacher) -> None:
    settings = {"optimizer": "sgd", "momentum": 0.0, "clip_norm": 1e-3, "average": 0.0, "steps": 4, "lr": 400.0}
    distiller = make(small_data, small_teacher, **settings)
    moved = []
    for _ in range(6):  # two steps beyond the end stand still
        before = distiller.synthetic.normalized()
        assert distiller.step()["gradient_norm"] > 1e-3
        after = distiller.synthetic.normalized()
        moved.append(math.hypot(*(float(np.linalg.norm(a - b)) for a, b in zip(after, before, strict=True))))
    half = 0.2 * (1 + np.cos(np.pi / 4))
    assert moved == pytest.approx([0.4, half, 0.2, 0.4 - half, 0.0, 0.0], rel=1e-2, abs=1e-6)


def test_the_set_is_the_moving_average_of_the_iterates(small_data, small_teacher) -> None:
    """A plain mean over the first 1 / (1 − average) steps, then exponential: 0.75 is four steps."""
    plain, averaged = (make(small_data, small_teacher, average=average) for average in (0.0, 0.75))
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


# --- the problem and the start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["dbc", "sdw"])
def test_other_action_bounds_are_other_units_of_the_same_set(small_data, small_teacher, tmp_path, objective) -> None:
    data, teacher = in_other_units(small_data, small_teacher)
    settings = {**TINY, "objective": objective, "progress": False}
    plain = sdw.distill(small_data, small_teacher, **settings)
    moved = sdw.distill(data, teacher, **settings, out=tmp_path)
    np.testing.assert_allclose(moved.observations, plain.observations, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moved.actions, BOUNDS.denormalize(plain.actions), rtol=1e-4, atol=1e-4)
    for found in (moved, sdw.SyntheticDataset.load(tmp_path / "best.npz")):
        assert found == moved
        assert found.units == data.units  # bounds, scores and environment
        assert (found.dataset_name, found.dataset_hash) == ("moved", data.content_hash)
    actions = sdw.behavior_clone(moved)(torch.from_numpy(data.observations)).detach().numpy()
    low, high = data.action_bounds
    assert (actions >= low - 1e-6).all()
    assert (actions <= high + 1e-6).all()
    assert actions[:, 1].max() > 1.5  # beyond ±1


def test_the_start_must_fit_the_problem(small_data, small_teacher) -> None:
    config = sdw.DistillConfig(**TINY)
    problem = sdw.outer_problem(small_data, small_teacher, config)
    pairs = functools.partial(sdw.real_pairs, small_data, 12)
    narrow = sdw.load_dataset({
        "observations": small_data.observations[:, :7], "actions": small_data.actions[:, :2],
        "rewards": small_data.rewards, "terminations": small_data.terminations, "truncations": small_data.truncations,
    })  # fmt: skip
    for start, message in [
        ([], "at least one synthetic set"),
        (sdw.real_pairs(narrow, 12), r"\(12, 11, 3\), got \(12, 7, 2\)"),
        ([pairs(), sdw.real_pairs(small_data, 13)], r"\(12, 11, 3\), got \(13, 11, 3\)"),
        (sdw.real_pairs(in_other_units(small_data, small_teacher)[0], 12), "other units"),
    ]:
        with pytest.raises(ValueError, match=message):
            sdw.Distiller(problem, start, config)
    shifted = dataclasses.replace(small_data.units, states=Affine(np.ones(11), np.ones(11)))
    with pytest.raises(ValueError, match="other units"):
        sdw.Distiller(problem, [pairs(), dataclasses.replace(pairs(), units=shifted)], config)


def test_a_problem_in_host_memory_gives_the_same_steps(small_data, small_teacher, monkeypatch) -> None:
    resident = sdw.distill(small_data, small_teacher, **TINY, progress=False)
    monkeypatch.setattr(batches, "RESIDENT_BYTES", 0)
    assert sdw.distill(small_data, small_teacher, **TINY, progress=False) == resident


@pytest.mark.filterwarnings("error")
def test_arrays_that_cannot_be_written_to_are_read(small_data, small_teacher) -> None:
    expected = sdw.distill(small_data, small_teacher, **TINY, progress=False)
    names = ("observations", "actions", "rewards", "terminations", "truncations", "jump_observations")
    locked = {name: getattr(small_data, name).copy() for name in names}
    for array in locked.values():
        array.setflags(write=False)
    torch.set_warn_always(True)
    try:
        found = sdw.distill(dataclasses.replace(small_data, **locked), small_teacher, **TINY, progress=False)
    finally:
        torch.set_warn_always(False)
    assert found == expected


# --- runs side by side ------------------------------------------------------------------------------------------------


def test_one_set_and_a_list_of_one_give_the_same_bits(small_data, small_teacher) -> None:
    one, several = make(small_data, small_teacher), make(small_data, small_teacher, n_runs=1)
    for _ in range(3):
        single, listed = one.step(), several.step()
        assert all(isinstance(value, float) for value in single.values())
        assert {name: value.tolist() for name, value in listed.items()} == {name: [x] for name, x in single.items()}
    assert one.synthetic == several.sets[0]
    with pytest.raises(ValueError, match="n_runs must be at least 1"):
        make(small_data, small_teacher, n_runs=0)


def test_runs_side_by_side_take_the_steps_of_single_runs(small_data, small_teacher) -> None:
    settings = {"steps": 4, "clip_norm": 0.05, "average": 0.5}  # some of the hypergradients are longer
    together = make(small_data, small_teacher, n_runs=3, **settings, seed=5)
    assert together.observations.shape == (3, 12, 11)
    assert together.seeds == [5, 6, 7]
    for _ in range(4):
        metrics = together.step()
    assert {name: value.shape for name, value in metrics.items()} == dict.fromkeys(metrics, (3,))
    for number, found in enumerate(together.sets):
        alone = make(small_data, small_teacher, **settings, seed=5 + number)
        for _ in range(4):
            single = alone.step()
        assert found.config == alone.synthetic.config
        np.testing.assert_allclose(found.observations, alone.synthetic.observations, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.actions, alone.synthetic.actions, rtol=1e-4, atol=1e-4)
        assert {name: value[number] for name, value in metrics.items()} == pytest.approx(single, rel=1e-3)
    with pytest.raises(ValueError, match=r"take \.sets"):
        _ = together.synthetic


@pytest.mark.parametrize("initializations", [None, 3])
def test_drawing_ahead_changes_no_number(small_data, small_teacher, monkeypatch, initializations) -> None:
    """As on a GPU; and a state holds the generators of before what is drawn ahead."""
    monkeypatch.setattr(sdw.Distiller, "runs_ahead", True)
    ahead, plain, resumed = (make(small_data, small_teacher, 2, initializations=initializations) for _ in range(3))
    monkeypatch.setattr(plain._draws, "draw_ahead", lambda *_: None)
    for _ in range(4):
        states = [distiller.state_dict() for distiller in (ahead, plain)]
        for one, other in zip(*(state["generators"] for state in states), strict=True):
            assert torch.equal(one, other)
        resumed.load_state_dict(states[0])
        metrics = [distiller.step() for distiller in (plain, ahead, resumed)]
        for name, value in metrics[0].items():
            assert all(np.array_equal(value, other[name]) for other in metrics[1:])
    assert ahead._draws._ahead is not None
    for expected, *others in zip(*(distiller.sets for distiller in (plain, ahead, resumed)), strict=True):
        assert all(expected == other for other in others)


# --- steps that are not finite ----------------------------------------------------------------------------------------


def poisoned(problem: sdw.OuterProblem, config: sdw.DistillConfig, steps: set[int]) -> sdw.OuterProblem:
    """The problem with targets that are NaN in rows that the run of config.seed draws in these steps, and no others."""
    start = sdw.SyntheticDataset(problem.observations[:1], problem.targets[:1], problem.units)
    reference = Reference(problem, start, config)
    drawn = [set(reference.draw()[1].tolist()) for _ in range(config.steps)]
    fine = set().union(*(rows for step, rows in enumerate(drawn, start=1) if step not in steps))
    targets = problem.targets.copy()
    for step in steps:
        targets[next(iter(drawn[step - 1] - fine))] = np.nan
    return dataclasses.replace(problem, targets=targets)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("bad", [1, 4])
@pytest.mark.parametrize("n_runs", [1, 2])
def test_a_step_that_is_not_finite_is_left_out(
    small_data, small_teacher, monkeypatch, optimizer: str, ahead: bool, bad: int, n_runs: int
) -> None:
    monkeypatch.setattr(sdw.Distiller, "runs_ahead", ahead)  # as on a GPU: the optimizer leaves it out by itself
    config = sdw.DistillConfig(**{**TINY, "batch_size": 8}, optimizer=optimizer)
    problem = sdw.outer_problem(small_data, small_teacher, config)
    starts = [sdw.real_pairs(small_data, 12, seed=seed) for seed in range(n_runs)]
    expected = sdw.Distiller(problem, starts, config)
    found = sdw.Distiller(poisoned(problem, config, {bad}), starts, config)
    for step in range(1, config.steps + 1):
        before = expected.state_dict()
        expected.step()
        loss = found.step()["loss"]
        assert np.isfinite(loss[0]) == (step != bad)
        if not np.isfinite(loss).all():  # draws, and does nothing with them
            drawn = {name: expected.state_dict()[name] for name in ("generators", "iteration")}
            expected.load_state_dict({**before, **drawn})
    assert found.iteration == config.steps
    assert all(one == other for one, other in zip(found.sets, expected.sets, strict=True))


@pytest.mark.parametrize("ahead", [False, True])
def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(small_data, small_teacher, monkeypatch, ahead) -> None:
    monkeypatch.setattr(sdw.Distiller, "runs_ahead", ahead)
    config = sdw.DistillConfig(**{**TINY, "batch_size": 4, "steps": 20})
    problem = sdw.outer_problem(small_data, small_teacher, config)
    start = sdw.real_pairs(small_data, 12)
    nine = sdw.Distiller(poisoned(problem, config, {*range(1, 10), *range(11, 20)}), start, config)
    losses = [nine.step()["loss"] for _ in range(20)]
    assert np.flatnonzero(np.isfinite(losses)).tolist() == [9, 19]
    ten = sdw.Distiller(poisoned(problem, config, set(range(3, 13))), start, config)
    for _ in range(11):
        ten.step()
    with pytest.raises(FloatingPointError, match="10 outer steps in a row are not finite, up to step 12: loss nan"):
        ten.step()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_run_that_diverges_ends(small_data, small_teacher, monkeypatch, ahead: bool) -> None:
    monkeypatch.setattr(sdw.Distiller, "runs_ahead", ahead)
    distiller = make(small_data, small_teacher, inner_lr=1e20, steps=30, adapt_inner_lr=False)
    before = distiller.state_dict()
    with pytest.raises(FloatingPointError, match=r"10 outer steps in a row are not finite, up to step 10: loss nan"):
        run(distiller, progress=False)
    with pytest.raises(FloatingPointError, match="11 outer steps in a row"):  # nor does it go on in silence
        distiller.step()
    assert torch.equal(distiller.observations, before["observations"])
    assert torch.equal(distiller.actions, before["actions"])
