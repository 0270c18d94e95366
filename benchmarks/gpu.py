"""The stages of benchmarks/gpu_check.sh that are Python: `python -m benchmarks.gpu STAGE --out FOLDER`.

touch           every op once on small shapes, forward and backward: what compute-sanitizer watches; or the named ops
table NAME …    ours, then each peer beside ours, timed by CUDA events; printed and recorded row by row
summary         one table of all that was measured

A table is a process: what hangs or runs out of memory costs itself. bench_knn_gpu.py has the neighbors, gpu_distill.py
a whole distillation. With --device cpu the same code runs on tiny shapes, to show that it runs: its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import gc
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import sdw_fast as sdw
from benchmarks import bench_behavior_matching, bench_unrolled_bc, bench_weighted_bc_loss
from benchmarks.model import Problem, cuda_graph
from benchmarks.profile_distill import random_dataset
from benchmarks.table import latest, machine, read
from benchmarks.timing import Contender, Row, Table, cells, contender, format_seconds, measure, record, recorded
from sdw_fast.networks import orthogonal_parameters
from sdw_fast.run import new_distiller

Builders = dict[str, Callable[[Problem], Callable[[], Any]]]

TOGETHER = 8  # problems in one launch
failures: list[str] = []  # rows of ours that raised
TINY = Problem(size=8, state=3, action=2, hidden=(8, 8), steps=3, batch=20)


def event_sample(run: Callable[[], object], repeats: int) -> float:
    """Seconds a call by CUDA events around `repeats` calls; what waits by itself (JAX) is timed as well."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def compare(title: str, builders: Builders, problem: Problem, budget: float, save: Callable[[Table], None]) -> Table:
    """Times ours, all in turns, and then one peer after the other in turns with the first of ours.

    Everything is printed and saved as soon as it is known, so that a peer that hangs takes nothing with it. What raises
    is skipped, and remembered if it is ours.

    Args:
        budget: Seconds for ours, and again for all peers together.
    """
    real = problem.device != "cpu"
    options: dict[str, Any] = {"sample": event_sample if real else None, "rounds": (3, 30) if real else (2, 2)}
    options["shortest"] = 0.02 if real else 0
    peers = [name for name in builders if not name.startswith("sdw_fast")]
    ours = [tried(name, builders[name], problem) for name in builders if name not in peers]
    table = measure(title, ours, budget=budget if real else 0, warmup=3, **options)
    print(f"\n{table}", flush=True)
    save(table)
    for name in peers:
        peer = tried(name, builders[name], problem)
        row = Row(name, skipped=peer.skipped)
        if peer.run is not None:
            row = measure("", [*ours[:1], peer], budget=budget / len(peers) if real else 0, **options).rows[-1]
        if not any(one.run for one in ours[:1]):
            row.ratio = None
        del peer
        gc.collect()
        if real:
            torch.cuda.empty_cache()
        table.rows.append(row)
        print("  ".join(cells(row, memory=False)), flush=True)
        save(table)
    return table


def tried(name: str, build: Callable[[Problem], Callable[[], Any]], problem: Problem) -> Contender:
    """The contender after a first call; one peer's failure (for one, out of memory) costs its own row only."""
    try:
        row = contender(name, build, problem)
        if row.run is not None:
            row.run()
        return row
    except Exception as error:  # whatever a peer's library raises
        if name.startswith("sdw_fast"):
            failures.append(f"{name}: {error}")
            traceback.print_exc()
        return Contender(name, None, skipped=f"{type(error).__name__}: {error}")


def graphed(build: Callable[[Problem], Callable[[], Any]]) -> Callable[[Problem], Callable[[], Any]]:
    """The same contender as a CUDA graph."""
    return lambda problem: cuda_graph(build(problem), problem.device)


def narrow(problem: Problem) -> Problem:
    """The same with the hidden layers of the default settings."""
    return replace(problem, hidden=(64, 64, 64))


def unrolled_bc_builders() -> Builders:
    suite = bench_unrolled_bc
    return {
        "sdw_fast": suite.ours,
        "sdw_fast, float32 throughout": partial(suite.ours, precision="ieee"),
        f"sdw_fast, {TOGETHER} problems at once": partial(suite.ours_together, count=TOGETHER),
        "sdw_fast, unrolled_bc alone": suite.ours_alone,
        "sdw_fast, its forward pass": partial(suite.ours_alone, back=False),
        "sdw_fast, unrolled_bc alone, hidden 64×64×64": lambda problem: suite.ours_alone(narrow(problem)),
        "autograd double backward (papers)": suite.autograd,
        "JAX jit(grad(scan))": suite.jax_scan,
        "closed form in PyTorch (twin)": suite.twin,
        "closed form in PyTorch, CUDA graph": suite.twin_graph,
        "floor: the bare products, CUDA graph": graphed(suite.gemm_floor),
    }


def behavior_matching_builders() -> Builders:
    suite = bench_behavior_matching
    return {
        "sdw_fast": suite.ours,
        "sdw_fast, float32 throughout": partial(suite.ours, precision="ieee"),
        "eager PyTorch": suite.eager,
        "eager PyTorch, CUDA graph": graphed(suite.eager),
        "JAX jit(value_and_grad)": suite.jax_grad,
        "floor: the bare products, CUDA graph": graphed(suite.gemm_floor),
    }


def weighted_bc_loss_builders() -> Builders:
    suite = bench_weighted_bc_loss
    return {
        "sdw_fast": suite.ours,
        "eager PyTorch": suite.eager,
        "torch.compile": suite.torch_compile,
        "JAX jit(value_and_grad)": suite.jax_grad,
        suite.COPY_FLOOR: suite.copy_floor,
    }


def initialization_builders() -> Builders:
    def draw(problem: Problem, runs: int) -> Callable[[], Any]:
        generators = [torch.Generator(problem.device).manual_seed(seed) for seed in range(runs)]
        sizes = (problem.state, *problem.hidden, problem.action)
        return lambda: orthogonal_parameters(sizes, gain=1.0, generators=generators)

    def householder(problem: Problem) -> Callable[[], Any]:
        normal = [problem.normal(max(layer), min(layer)) for layer in problem.layers]
        return lambda: [torch.linalg.qr(x) for x in normal]

    return {
        "sdw_fast": partial(draw, runs=1),
        f"sdw_fast, {TOGETHER} runs": partial(draw, runs=TOGETHER),
        "torch.linalg.qr, the draw not counted": householder,
    }


@cache
def dataset(rows: int) -> sdw.TransitionDataset:
    return random_dataset(rows)


def outer_step_builders() -> Builders:
    """The whole outer step, as a run takes it, in the papers' configuration and in the default one."""

    def step(problem: Problem, preset: str, n_runs: int | None, **settings: Any) -> Callable[[], Any]:
        tiny = {} if problem.device != "cpu" else {"size": 8, "hidden": (8, 8), "inner_steps": 3}
        config = sdw.DistillConfig.preset(preset, objective="dbc", steps=50_000, **{**settings, **tiny})
        data = dataset(1_000_000 if problem.device != "cpu" else 1_000)
        return new_distiller(data, None, config, device=problem.device, n_runs=n_runs).advance

    return {
        "sdw_fast, the papers' settings": partial(step, preset="paper", n_runs=None),
        f"sdw_fast, the papers' settings, {TOGETHER} runs": partial(step, preset="paper", n_runs=TOGETHER),
        "sdw_fast, default settings": partial(step, preset="default", n_runs=None),
        f"sdw_fast, default settings, {TOGETHER} runs": partial(step, preset="default", n_runs=TOGETHER),
    }


def reference(device: str, **shape: Any) -> Problem:
    return replace(bench_unrolled_bc.REFERENCE, device=device, **shape) if device != "cpu" else TINY


Save = Callable[[str, Table], None]  # (case, table)


def outer_step(device: str, save: Save) -> None:
    compare("an outer step, whole", outer_step_builders(), reference(device), 8, partial(save, device))


def unrolled_bc(device: str, save: Save) -> None:
    problem = reference(device)
    title = f"one outer step: {bench_unrolled_bc.describe(problem)}"
    compare(title, unrolled_bc_builders(), problem, 10, partial(save, device))


def behavior_matching(device: str, save: Save, rows: int = 2_560) -> None:
    problem = reference(device, batch=rows)
    title = bench_behavior_matching.describe(problem)
    compare(title, behavior_matching_builders(), problem, 5, partial(save, f"{device},M={rows}"))


def weighted_bc_loss(device: str, save: Save, rows: int = 2_560) -> None:
    problem = reference(device, batch=rows)
    title = f"weighted_bc_loss, loss and gradient: M = {rows:,}, A = {problem.action}"
    compare(title, weighted_bc_loss_builders(), problem, 4, partial(save, f"{device},M={rows}"))


def initialization(device: str, save: Save) -> None:
    compare("θ_0: orthogonal weights", initialization_builders(), reference(device), 4, partial(save, device))


def ceilings(device: str, save: Save) -> None:
    """What the device can do: a copy of a GiB, and products of 8,192³ in tf32 and in float32."""
    count, side = (2**28, 8_192) if device != "cpu" else (2**10, 64)
    source = torch.randn(count, device=device)
    buffer = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    out = torch.empty_like(a)

    def product(precision: str) -> None:
        torch.set_float32_matmul_precision(precision)
        torch.mm(a, b, out=out)

    calls: dict[str, tuple[Callable[[], Any], float, str]] = {
        "copy": (lambda: buffer.copy_(source), 8 * count / 1e12, "TB/s"),
        "product in tf32": (partial(product, "high"), 2 * side**3 / 1e12, "TFLOP/s"),
        "product in float32": (partial(product, "highest"), 2 * side**3 / 1e12, "TFLOP/s"),
    }

    def named(table: Table) -> None:
        for row in table.rows:
            if row.name in calls and row.median:
                _, work, unit = calls[row.name]
                row.name += f": {work / row.median:.3g} {unit}"
            row.ratio = None
        save(device, table)

    before = torch.get_float32_matmul_precision()
    builders: Builders = {name: lambda _, call=call: call for name, (call, _, _) in calls.items()}
    print(compare("ceilings", builders, replace(TINY, device=device), 3, named))
    torch.set_float32_matmul_precision(before)


TABLES: dict[str, tuple[str, Callable[[str, Save], None]]] = {  # name: op and measurement
    "outer_step": ("outer_step", outer_step),
    "unrolled_bc": ("unrolled_bc", unrolled_bc),
    "behavior_matching": ("behavior_matching", behavior_matching),
    "behavior_matching_million": ("behavior_matching", partial(behavior_matching, rows=1_000_000)),
    "weighted_bc_loss": ("weighted_bc_loss", weighted_bc_loss),
    "weighted_bc_loss_16_million": ("weighted_bc_loss", partial(weighted_bc_loss, rows=16_000_000)),
    "initialization": ("initialization", initialization),
    "ceilings": ("device", ceilings),  # not those of returns, of the study of that name
}


def table(names: list[str], out: Path, device: str) -> None:
    """Measures the named tables. PyTorch's own products may use tf32, as ours and JAX's do by default."""
    torch.set_float32_matmul_precision("high")
    print("\n".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    for name in names or TABLES:
        op, measurement = TABLES[name]
        measurement(device, lambda case, measured, op=op: record(measured, f"{op}/{case}", out))
    if failures:
        raise SystemExit("failed: " + "; ".join(failures))


def touch(names: list[str], out: Path, device: str) -> None:
    """Calls the named ops, or all, in all their forms; checks only that results are finite (the tests compare them)."""
    for name in names or TOUCHED:
        TOUCHED[name](device)
        print(f"{name} was called", flush=True)


def touch_unrolled_bc(device: str) -> None:
    small = replace(TINY, device=device, size=40, hidden=(24, 40), batch=70)
    # Wide enough for clusters of four blocks a tile of rows on sm_90, and of two.
    wide, narrower = (replace(small, size=32, hidden=hidden, steps=3) for hidden in ((256, 256), (128,)))
    for precision in ("tf32", "ieee"):
        for problem in (small, wide, narrower):
            check_finite(bench_unrolled_bc.ours_alone(problem, precision=precision)())
        together = bench_unrolled_bc.ours_together(small, count=3, precision=precision)
        check_finite(together())
    observations, actions = (x.clone().requires_grad_() for x in small.synthetic)
    for options in ({"window": 2}, {"tape": "recompute"}, {"momentum": 0.9}):
        trained = sdw.ops.unrolled_bc(observations, actions, small.params, steps=5, lr=0.1, **options)
        check_finite(torch.autograd.grad(sum(p.sum() for p in trained), [observations, actions]))


def touch_behavior_matching(device: str) -> None:
    # One tile and a part; activations beyond shared memory; more tiles of 32 rows than blocks.
    for hidden, rows in (((24, 40), 70), ((900, 500), 33), ((8,), 128 * 32 + 1)):
        problem = replace(TINY, device=device, hidden=hidden, batch=rows)
        for precision in ("tf32", "ieee"):
            check_finite(bench_behavior_matching.ours(problem, precision=precision)())


def touch_weighted_bc_loss(device: str) -> None:
    for rows in (7, 5_000):
        check_finite(bench_weighted_bc_loss.ours(replace(TINY, device=device, batch=rows))())


def touch_knn(device: str) -> None:
    points = replace(TINY, device=device).normal(2_000, 11)
    points[:100] = points[0]  # lists that run full
    check_finite(sdw.ops.knn(points, k=10)[0], sdw.ops.knn(points[:100], points, k=40)[0])


TOUCHED: dict[str, Callable[[str], None]] = {
    "unrolled_bc": touch_unrolled_bc,
    "behavior_matching": touch_behavior_matching,
    "weighted_bc_loss": touch_weighted_bc_loss,
    "knn": touch_knn,
}


def check_finite(*results: Any) -> None:
    for result in results:
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if not tensor.isfinite().all():
                raise RuntimeError("an op returned numbers that are not finite")


def summary(out: Path, device: str, since: float = 0) -> None:
    """Prints every table in the folder that is younger than `since`: a row's median, and its ratio to ours."""
    if device == "cpu":
        print("a dry run on the CPU, tiny shapes: no figure here means anything")

    def young(row: dict[str, Any]) -> bool:
        return datetime.fromisoformat(row["date"]).timestamp() >= since

    for table, origin_of_table in sorted(recorded(out).values(), key=lambda found: found[1]["date"]):
        if not young(origin_of_table):
            continue
        print(f"\n{table.title}")
        for row in table.rows:
            median = f"skipped ({row.skipped.splitlines()[0][:50]})" if row.skipped else "-"
            median = format_seconds(row.median) if row.median else median
            ratio = f"{row.ratio:.3g}×" if row.ratio else ""
            print(f"  {row.name[:60]:<60} {median:>10} {ratio:>8}")
    for results in latest(filter(young, read(out / "distill.jsonl")), "dataset").values():
        print(f"\n{results['dataset']}: {results['steps']} outer steps, {results['steps_per_second']:.1f} a second")
        for name in ("first_loss", "last_loss", "difference_to_the_cpu", "random_pairs", "distilled"):
            if name in results:
                print(f"  {name.replace('_', ' '):<22} {results[name]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["touch", "table", "summary"])
    parser.add_argument(
        "names", nargs="*", help=f"of tables: {', '.join(TABLES)}; of ops to touch: {', '.join(TOUCHED)}"
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu_check"), help="folder of the tables of results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--since", type=float, default=0, help="of the summary: leave out what is older than this time")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage == "summary":
        summary(options.out, options.device, options.since)
    else:
        known = TABLES if options.stage == "table" else TOUCHED
        if unknown := [name for name in options.names if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
        {"touch": touch, "table": table}[options.stage](options.names, options.out, options.device)


if __name__ == "__main__":
    main()
