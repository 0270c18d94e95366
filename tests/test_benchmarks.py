"""Every contender of the benchmarks computes the same numbers, and the harness measures what it says."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdw_fast
from benchmarks import (
    bench_behavior_matching,
    bench_knn,
    bench_knn_gpu,
    bench_unrolled_bc,
    bench_weighted_bc_loss,
    gpu,
    gpu_distill,
    run,
    table,
    timing,
)
from benchmarks.model import Problem, arrays
from sdw_fast.ops import knn

SUITES = {
    "unrolled_bc": bench_unrolled_bc,
    "behavior_matching": bench_behavior_matching,
    "weighted_bc_loss": bench_weighted_bc_loss,
}
TWINS = {
    "unrolled_bc": bench_unrolled_bc.twin,
    "behavior_matching": bench_behavior_matching.twin,
    "weighted_bc_loss": bench_weighted_bc_loss.twin,
}
TINY = Problem(size=5, state=3, action=2, hidden=(7, 6), steps=4, batch=9, dtype=torch.float64)
SINGLE = Problem(size=5, state=3, action=2, hidden=(7, 6), steps=4, batch=9)
CASES = [
    (op, name)
    for op, suite in SUITES.items()
    for name in suite.CONTENDERS
    if "floor" not in name and "twin" not in name
]


@pytest.mark.parametrize(("op", "name"), CASES)
def test_contenders_agree_with_the_twin(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler proper takes half a minute a graph; tracing alone already shows whether the right thing is traced.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(bench_behavior_matching, "CHUNK", 4)
    contender = timing.contender(name, SUITES[op].CONTENDERS[name], TINY)
    if contender.run is None:
        pytest.skip(contender.skipped)
    tolerance = 1e-5 if "JAX" in name else 1e-12  # JAX computes in single precision unless a global switch is thrown
    expected = arrays(TWINS[op](TINY)())
    for _ in range(2):  # a second call starts from the same state
        actual = arrays(contender.run())
        assert [a.shape for a in actual] == [e.shape for e in expected]
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


@pytest.mark.parametrize("op", SUITES)
def test_compiled_op_agrees_in_single_precision(op: str) -> None:
    expected = arrays(TWINS[op](TINY)())
    for a, e in zip(arrays(SUITES[op].ours(SINGLE)()), expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())


def test_problems_together_are_problems_apart() -> None:
    losses, *together = bench_unrolled_bc.ours_together(TINY, count=3)()
    for seed in range(3):
        loss, *alone = bench_unrolled_bc.ours(dataclasses.replace(TINY, seed=seed))()
        np.testing.assert_allclose(losses[seed].detach(), loss.detach(), rtol=1e-12)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[seed], b, rtol=0, atol=1e-12 * b.abs().max())


def test_every_stage_of_the_gpu_check_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    gpu.touch([], tmp_path, "cpu")
    gpu.table([], tmp_path, "cpu")
    gpu.summary(tmp_path, "cpu")
    found = timing.recorded(tmp_path)
    assert {name.split("/")[0] for name in found} == {op for op, _ in gpu.TABLES.values()}
    recorded, _ = found["unrolled_bc/cpu"]
    skipped = [row.name for row in recorded.rows if row.skipped]
    assert all("CUDA graph" in name or "JAX" in name for name in skipped)
    assert not gpu.failures


def test_a_failing_row_of_ours_fails_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: Problem) -> Any:
        raise RuntimeError("broken kernel")

    def measure(device: str, save: Any) -> None:
        peer = {"peer": lambda problem: lambda: None}
        gpu.compare("t", {"sdw_fast": broken, **peer}, TINY, 1, functools.partial(save, device))

    monkeypatch.setattr(gpu, "failures", [])
    monkeypatch.setitem(gpu.TABLES, "t", ("t", measure))
    with pytest.raises(SystemExit, match="broken kernel"):
        gpu.table(["t"], tmp_path, "cpu")
    ours, peer = timing.recorded(tmp_path)["t/cpu"][0].rows
    assert "broken kernel" in ours.skipped
    assert peer.median is not None  # is timed all the same
    assert peer.ratio is None


def test_what_is_known_is_recorded_before_a_peer_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(problem: Problem) -> Any:
        raise KeyboardInterrupt

    builders = {"sdw_fast": lambda problem: lambda: None, "first": lambda problem: lambda: None, "second": hangs}
    tables: list[list[str]] = []
    with pytest.raises(KeyboardInterrupt):
        gpu.compare("t", builders, TINY, 1, lambda measured: tables.append([row.name for row in measured.rows]))
    assert tables == [["sdw_fast"], ["sdw_fast", "first"]]


def test_a_distillation_without_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gymnasium", "mujoco", "minari"):
        monkeypatch.setitem(sys.modules, name, None)
    gpu_distill.without_environment(tmp_path, "cpu")
    (results,) = table.read(tmp_path / "distill.jsonl")
    assert results["difference_to_the_cpu"] == {"loss": 0, "gradient_norm": 0}
    assert results["steps_per_second"] > 0


def test_first_steps_that_differ_from_the_cpu_s_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_distill, "difference_to_the_cpu", lambda *_, **__: {"loss": float("nan")})
    with pytest.raises(SystemExit, match="differ"):
        gpu_distill.without_environment(tmp_path, "cpu")


def test_gemm_floor_counts_the_products_of_the_recipe() -> None:
    # By hand, one hidden layer: N = 2, D = 3, width 5, A = 4, M = 6, T = 1; multiply-adds per product.
    problem = Problem(size=2, state=3, action=4, hidden=(5,), steps=1, batch=6)
    gradient = 15 + 20 + 20 + 15 + 20  # forward D·w, w·A; backward A·w; weights D·w, w·A: a row
    adjoint = (15 + 2 * 20) + (2 * 15 + 2 * 20) + (15 + 2 * 20)
    counted = 0

    def count(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        nonlocal counted
        counted += a.shape[0] * a.shape[1] * b.shape[1]

    run = bench_unrolled_bc.gemm_floor(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", count)
        run()
    assert counted == 2 * (gradient + adjoint) + 6 * gradient


def test_every_suite_names_its_tables() -> None:
    for suite in SUITES.values():
        for mode in ("quick", "full", "sweep"):
            names = [name for name, _ in suite.tables(mode)]
            assert names
            assert len(names) == len(set(names))


def test_measure_interleaves_and_relates_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    order: list[str] = []

    def work(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            clock[0] += seconds

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def missing() -> Any:
        raise timing.Unavailable("not here")

    rows = [timing.Contender("ours", work("ours", 1.0)), timing.Contender("peer", work("peer", 3.0))]
    rows.append(timing.contender("absent", missing))
    result = timing.measure("work", rows, budget=0, rounds=(4, 9))
    assert order[4:] == ["ours", "peer"] * 4  # after a warmup and a trial of each
    assert result["ours"].ratio == 1
    assert result["peer"].ratio == pytest.approx(3)
    assert result["peer"].median == pytest.approx(3)
    assert result["absent"].ratio is None
    assert "skipped" in str(result)
    assert "not here" in str(result)


def test_measure_sets_and_restores_threads() -> None:
    before = torch.get_num_threads()
    seen: list[tuple[int, int]] = []
    run = lambda: seen.append((torch.get_num_threads(), sdw_fast.get_num_threads()))  # noqa: E731
    timing.measure("threads", [timing.Contender("one", run, threads=1)], budget=0, rounds=(1, 1), shortest=0)
    assert set(seen) == {(1, 1)}
    assert torch.get_num_threads() == sdw_fast.get_num_threads() == before


def one_array(megabytes: int) -> Any:
    """Builder for the test below: allocates and frees one array."""
    return lambda: np.ones(megabytes * 2**17).sum()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured exactly only on Linux")
def test_peak_memory_sees_a_temporary() -> None:
    assert 60 < timing.peak_memory("tests.test_benchmarks:one_array", megabytes=64) / 2**20 < 80


def test_peak_memory_passes_on_what_is_unavailable_and_what_fails() -> None:
    with pytest.raises(RuntimeError, match="no_such_builder"):
        timing.peak_memory("benchmarks.model:no_such_builder")


def test_a_recorded_table_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = [
        timing.measure(title, [timing.Contender("ours", lambda: None)], budget=0, rounds=(2, 2), shortest=0)
        for title in ("first", "second")
    ]
    tables[1].rows.append(timing.Row("peer", skipped="not here"))
    for measured in tables:
        timing.record(measured, "op/N=1", tmp_path)
    timing.record(tables[0], "other/reference", tmp_path)
    assert [row["title"] for row in table.read(tmp_path / "op.jsonl")] == ["first", "second"]  # nothing is lost
    found = timing.recorded(tmp_path)
    assert found.keys() == {"op/N=1", "other/reference"}
    assert found["op/N=1"][0] == tables[1]  # the newest, with every sample
    assert {"date", "commit", "machine"} <= found["op/N=1"][1].keys()
    run.show(tmp_path, "op/")
    printed = capsys.readouterr().out
    assert str(tables[1]) in printed
    assert "first" not in printed


def test_every_recorded_table_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run.show(table.RESULTS, "")
    printed = capsys.readouterr().out
    assert all(
        f"\n{name}: commit " in printed and str(measured) in printed
        for name, (measured, _) in timing.recorded().items()
    )


@pytest.mark.usefixtures("cuda_on_cpu")
def test_neighbors_on_a_device_beside_their_peers(tmp_path: Path) -> None:
    points = bench_knn_gpu.points_on("cpu", "surface:5", 600)
    table = bench_knn_gpu.compare("surface:5", points, list(bench_knn_gpu.GPU_PEERS), 100, 0.1, tmp_path)
    assert [row.name.split(",")[0].split(" (")[0] for row in table.rows] == ["sdw_fast", *bench_knn_gpu.GPU_PEERS]
    assert all("recall 1.0000" in row.name for row in table.rows[1:] if not row.skipped)
    assert "100 rows 0 differ" in bench_knn.agreement(points, knn(points, k=bench_knn_gpu.K)[1], 100)
    assert "searched again: 0" in bench_knn_gpu.parts_of_the_time(points)
    assert (tmp_path / "knn.jsonl").exists()


def test_every_table_is_found() -> None:
    for mode in ("quick", "full", "sweep"):
        names = [name for name, _ in run.tables(mode)]
        assert {name.split("/")[0] for name in names} >= {"knn", "unrolled_bc", "behavior_matching", "weighted_bc_loss"}
