"""Two processes at once beside one, each on a core of its own: the most that a second thread can gain on this machine.

Cores may be threads of one, or share its clock and caches: then two processes that have nothing to do with each other
take longer than one alone, and a call of several problems, a thread each, cannot do better.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

import sdw_fast
from benchmarks.bench_unrolled_bc import DEFAULT, REFERENCE, clones, ours_together
from benchmarks.model import Problem, multiply, product
from benchmarks.timing import Contender, Row, Table, contender, measure

Run = Callable[[], Any]
Build = Callable[..., Run]


def products(problem: Problem, count: int) -> Run:
    """`count` products of 512 × 512 by torch.mm: bound by the fused multiply-adds."""
    return multiply([product(problem, 512, 512, 512)] * count)


def at_once(workers: Sequence[Connection]) -> Run:
    """Has each worker do its call, and waits for all."""

    def run() -> None:
        for worker in workers:
            worker.send(True)
        for worker in workers:
            worker.recv()

    return run


def _work(orders: Connection, core: int, build: Build, problem: Problem) -> None:
    """What a worker does: a call of one problem on one thread of its core, as often as it is told to."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    sdw_fast.set_num_threads(1)
    run = build(problem, 1)
    while orders.recv():
        run()
        orders.send(True)


def _two(title: str, build: Build, problem: Problem, counts: Sequence[int]) -> Table:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        return Table(title, [Row("one process", skipped="needs two cores")])
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in cores]
    started = [
        context.Process(target=_work, args=(theirs, core, build, problem), daemon=True)
        for (_, theirs), core in zip(pipes, cores, strict=True)
    ]
    for process in started:
        process.start()
    ends = [own for own, _ in pipes]
    try:
        rows = [
            Contender("one process, one problem", at_once(ends[:1])),
            Contender("two processes, a problem each", at_once(ends)),
            *(contender(f"one call, two threads, {n} problems", build, problem, n, threads=2) for n in counts),
        ]
        return measure(title, rows, budget=20, rounds=(3, 50))
    finally:
        for end in ends:
            end.send(False)
        for process in started:
            process.join()


def tables(mode: str) -> Iterator[tuple[str, Callable[[], Table]]]:
    """Yields (name, measurement), the same for every mode."""
    yield "unrolled_bc/cores,products", partial(_two, "products of 512³, torch.mm", products, DEFAULT, ())
    yield "unrolled_bc/cores,default", partial(_two, "default outer step", ours_together, DEFAULT, (2,))
    yield "unrolled_bc/cores,clones", partial(_two, "clones of 256 units", clones, REFERENCE, (2, 10))
