"""The stages of benchmarks/gpu_check.sh that are Python: `python -m benchmarks.gpu STAGE --out FOLDER`.

touch      every op once on small shapes, forward and backward: what compute-sanitizer watches
ops        every op beside its peers, timed by CUDA events; one table each
distill    hopper-medium for real, with the shipped teacher: steps a second, and the return of its clones
summary    one table of all that was measured

With --device cpu the same code runs on tiny shapes, to show that it runs: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sdw_fast as sdw
from benchmarks import bench_behavior_matching, bench_unrolled_bc, bench_weighted_bc_loss
from benchmarks.model import Problem, cuda_graph
from benchmarks.profile_distill import random_dataset
from benchmarks.table import append, latest, machine, origin, read
from benchmarks.timing import Contender, Sampler, Table, contender, format_seconds, measure, record, recorded
from sdw_fast.networks import orthogonal_parameters
from sdw_fast.run import new_distiller, run

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


def compare(title: str, builders: Builders, problem: Problem, budget: float) -> Table:
    """Times all builders' calls in turns; the first is ours. What raises is skipped, and remembered if it is ours."""
    sample: Sampler | None = event_sample if problem.device != "cpu" else None
    rows = [tried(name, build, problem) for name, build in builders.items()]
    if problem.device == "cpu":
        return measure(title, rows, budget=0, rounds=(2, 2), shortest=0, sample=sample)
    return measure(title, rows, budget=budget, shortest=0.02, warmup=3, sample=sample)


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


def unrolled_bc_builders() -> Builders:
    suite = bench_unrolled_bc
    return {
        "sdw_fast": suite.ours,
        "sdw_fast, float32 throughout": partial(suite.ours, precision="ieee"),
        f"sdw_fast, {TOGETHER} problems at once": partial(suite.ours_together, count=TOGETHER),
        "sdw_fast, unrolled_bc alone": suite.ours_alone,
        "closed form in PyTorch (twin)": suite.twin,
        "closed form in PyTorch, CUDA graph": suite.twin_graph,
        "autograd double backward (papers)": suite.autograd,
        "JAX jit(grad(scan))": suite.jax_scan,
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


def outer_step_builders(steps: int) -> Builders:
    """The whole outer step in the papers' configuration, as a run takes it."""

    def step(problem: Problem, n_runs: int | None) -> Callable[[], Any]:
        config = sdw.DistillConfig.preset(
            "paper", objective="dbc", size=problem.size, hidden=problem.hidden, inner_steps=problem.steps, steps=steps
        )
        data = random_dataset(1_000_000 if problem.device != "cpu" else 1_000)
        return new_distiller(data, None, config, device=problem.device, n_runs=n_runs).advance

    return {
        "sdw_fast": partial(step, n_runs=None),
        f"sdw_fast, {TOGETHER} runs at once": partial(step, n_runs=TOGETHER),
    }


def op_tables(device: str) -> Iterator[tuple[str, Table]]:
    """Yields (name, table) of every comparison; a name is "<op>/<device>", and what else tells it apart."""
    real = device != "cpu"
    reference = replace(bench_unrolled_bc.REFERENCE, device=device) if real else TINY
    million = replace(reference, batch=1_000_000) if real else TINY
    elements = replace(reference, batch=16_000_000) if real else TINY
    yield f"ceilings/{device}", ceilings(device)
    yield (
        f"unrolled_bc/{device}",
        compare(f"one outer step: {bench_unrolled_bc.describe(reference)}", unrolled_bc_builders(), reference, 20),
    )
    for problem in (reference, million):
        yield (
            f"behavior_matching/{device},M={problem.batch}",
            compare(bench_behavior_matching.describe(problem), behavior_matching_builders(), problem, 5),
        )
    for problem in (reference, elements):
        title = f"weighted_bc_loss, loss and gradient: M = {problem.batch:,}, A = {problem.action}"
        yield f"weighted_bc_loss/{device},M={problem.batch}", compare(title, weighted_bc_loss_builders(), problem, 5)
    yield f"initialization/{device}", compare("θ_0: orthogonal weights", initialization_builders(), reference, 5)
    yield f"outer_step/{device}", compare("outer step of the papers, whole", outer_step_builders(50_000), reference, 5)


def ceilings(device: str) -> Table:
    """What the device can do: a copy of a GiB, and products of 8,192³ in tf32 and in float32."""
    count, side = (2**28, 8_192) if device != "cpu" else (2**10, 64)
    source = torch.randn(count, device=device)
    buffer = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    out = torch.empty_like(a)

    def product(precision: str) -> None:
        torch.set_float32_matmul_precision(precision)
        torch.mm(a, b, out=out)

    before = torch.get_float32_matmul_precision()
    calls: dict[str, tuple[Callable[[], Any], float, str]] = {
        "copy": (lambda: buffer.copy_(source), 8 * count / 1e12, "TB/s"),
        "product in tf32": (partial(product, "high"), 2 * side**3 / 1e12, "TFLOP/s"),
        "product in float32": (partial(product, "highest"), 2 * side**3 / 1e12, "TFLOP/s"),
    }
    builders: Builders = {name: lambda _, call=call: call for name, (call, _, _) in calls.items()}
    table = compare("ceilings", builders, replace(TINY, device=device), 3)
    torch.set_float32_matmul_precision(before)
    for row in table.rows:
        _, work, unit = calls[row.name]
        row.name += f": {work / row.median:.3g} {unit}" if row.median else ""
        row.ratio = None
    return table


def ops(out: Path, device: str) -> None:
    """Measures every table. PyTorch's own products may use tf32, as ours and JAX's do by default."""
    torch.set_float32_matmul_precision("high")
    print("\n".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    for name, table in op_tables(device):
        print(f"\n{table}", flush=True)
        record(table, name, out)
    if failures:
        raise SystemExit("failed: " + "; ".join(failures))


def touch(out: Path, device: str) -> None:
    """Calls every op in all its forms; checks only that results are finite (the tests compare them)."""
    problem = replace(TINY, device=device, size=40, hidden=(24, 40), batch=70)
    for precision in ("tf32", "ieee"):
        for build in (bench_unrolled_bc.ours, partial(bench_unrolled_bc.ours_together, count=3)):
            check_finite(build(problem, precision=precision)())
        check_finite(bench_behavior_matching.ours(problem, precision=precision)())
    observations, actions = (x.clone().requires_grad_() for x in problem.synthetic)
    for options in ({"window": 2}, {"tape": "recompute"}):
        trained = sdw.ops.unrolled_bc(observations, actions, problem.params, steps=5, lr=0.1, **options)
        check_finite(torch.autograd.grad(sum(p.sum() for p in trained), [observations, actions]))
    check_finite(bench_behavior_matching.ours(replace(problem, hidden=(900, 500)))())
    check_finite(bench_weighted_bc_loss.ours(replace(problem, batch=5_000))())
    points = problem.normal(3_000, 11)
    check_finite(sdw.ops.knn(points, k=10)[0], sdw.ops.knn(points[:100], points, k=10)[0])
    print("every op was called")


def check_finite(*results: Any) -> None:
    for result in results:
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if not tensor.isfinite().all():
                raise RuntimeError("an op returned numbers that are not finite")


def distill(out: Path, device: str) -> None:
    """Collects hopper-medium, distills it with SDW, and runs clones of the result and of random real pairs."""
    real = device != "cpu"
    os.environ.setdefault("MINARI_DATASETS_PATH", str(out / "minari"))
    transitions, steps, clones, episodes = (50_000, 1_500, 10, 20) if real else (2_000, 3, 1, 1)
    settings: dict[str, Any] = {"size": 256} if real else {"size": 8, "hidden": (8,), "inner_steps": 3}
    sdw.collect("hopper/medium", steps=transitions, seed=0, overwrite=True)
    data = sdw.load_dataset("hopper/medium")
    teacher = sdw.Teacher.pretrained("hopper/medium")
    config = sdw.DistillConfig(objective="sdw", steps=steps, **settings)
    distiller = new_distiller(data, teacher, config, device=device)
    results: dict[str, Any] = {"transitions": transitions, "steps": steps, "device": device, **settings}

    def score(pairs: sdw.SyntheticDataset) -> list[float]:
        result = sdw.evaluate_synthetic(pairs, clones=clones, episodes=episodes, seed=10_000)
        return [float(x) for x in (result.normalized_mean, result.normalized_std)]

    results["random_pairs"] = score(distiller.synthetic)  # what a distillation starts from
    distiller.step()
    began = time.perf_counter()
    best = run(distiller)[0]
    results["steps_per_second"] = (steps - 1) / (time.perf_counter() - began)
    results["distilled"] = score(best)
    print(json.dumps(results, indent=2))
    append(out / "distill.jsonl", {**results, **origin()})


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
    for results in latest(filter(young, read(out / "distill.jsonl")), "device").values():
        print(f"\nhopper-medium, {results['steps']} outer steps at {results['steps_per_second']:.1f} a second")
        for name in ("random_pairs", "distilled"):
            mean, std = results[name]
            print(f"  {name.replace('_', ' '):<20} D4RL-normalized return {mean:.1f} ± {std:.1f} over episodes")


STAGES = {"touch": touch, "ops": ops, "distill": distill, "summary": summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/gpu"), help="folder of the tables of results"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--since", type=float, default=0, help="of the summary: leave out what is older than this time")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False")
    options.out.mkdir(parents=True, exist_ok=True)
    arguments = {"since": options.since} if options.stage == "summary" else {}
    STAGES[options.stage](options.out, options.device, **arguments)


if __name__ == "__main__":
    main()
