"""Runs an op once for every request for memory or a thread that it makes of the system, with that request refused.

    LD_PRELOAD=LIBRARY python refusals.py OP
    LD_PRELOAD=LIBRARY python refusals.py forks
    LD_PRELOAD=LIBRARY python refusals.py shared

LIBRARY is refusals.cpp, which `build` builds. The op must raise MemoryError or, where only a thread was refused, give
the same answer; and give that answer the next time in any case. Each time in a forked child, which starts its own
threads. Prints how many requests were refused, and how often it still answered. With "forks", forks while another
thread frees memory, slowly, and prints how many children computed. With "shared", refuses every thread, OpenMP's too,
where the op would run in those of PyTorch, whose runtime ends the process if it cannot start them, and prints 1 if the
op still answered.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from sdw_fast import _C, ops, set_num_threads

LIBRARY = ctypes.CDLL(None)  # of the names of this process, those of the library that was loaded first among them
EACH = 50  # requests that are refused one by one; of those beyond, about as many in all
FOREVER = 1 << 40


def watch_the_core() -> None:
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in maps if line.endswith(_C.__file__)]
    LIBRARY.watch(ctypes.c_size_t(int(spans[0][0], 16)), ctypes.c_size_t(int(spans[-1][1], 16)))


def knn() -> Callable[[], list[torch.Tensor]]:
    states = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    return lambda: [*ops.knn(states, k=3), *ops.knn(states[:5_000], states, k=3)]


def unrolled_bc() -> Callable[[], list[torch.Tensor]]:
    observations, actions, *params = _network(64)
    trained = ops.unrolled_bc(observations, actions, params, steps=5, lr=0.1, momentum=0.9, tape="recompute")
    inputs = [observations, actions, *params]

    def work() -> list[torch.Tensor]:
        again = ops.unrolled_bc(observations, actions, params, steps=5, lr=0.1)
        loss = sum(tensor.square().sum() for tensor in trained)
        return [*again, *torch.autograd.grad(loss, inputs, retain_graph=True)]

    return work


def behavior_matching() -> Callable[[], list[torch.Tensor]]:
    states, targets, *params = _network(600)
    states, targets = states.detach(), targets.detach()

    def work() -> list[torch.Tensor]:
        loss = ops.behavior_matching(params, states, targets, torch.ones(600))
        return [loss, *torch.autograd.grad(loss, params)]

    return work


def weighted_bc_loss() -> Callable[[], list[torch.Tensor]]:
    pred, target = torch.randn(2, 200_000, 6, generator=torch.Generator().manual_seed(0)).unbind()
    pred = pred.clone().requires_grad_()

    def work() -> list[torch.Tensor]:
        loss = ops.weighted_bc_loss(pred, target, torch.ones(200_000))
        return [loss, *torch.autograd.grad(loss, pred)]

    return work


def _network(rows: int) -> list[torch.Tensor]:
    """States and actions, and the parameters of an MLP."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 11), (rows, 3), (64, 11), (64,), (64, 64), (64,), (3, 64), (3,)]
    return [(torch.randn(shape, generator=generator) / 8).requires_grad_() for shape in shapes]


def forks() -> None:
    def work(width: int = 1) -> None:
        weights, bias = torch.zeros(width, width), torch.zeros(width)
        ops.behavior_matching([weights, bias], bias[None], bias[None], torch.ones(1))

    def free_memory() -> None:
        while not done.is_set():
            for width in (1, 700, 1_200, 1_900, 2_800):  # more kinds of blocks than are kept
                work(width)

    set_num_threads(1)
    LIBRARY.delay(50)
    done = threading.Event()
    other = threading.Thread(target=free_memory)
    other.start()
    computed = 0
    for _ in range(10):
        time.sleep(0.05)  # else it forks as soon as the other lets go of the interpreter, which is too early
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # the end of one that waits
            work()
            os._exit(0)
        computed += os.waitpid(child, 0)[1] == 0
    done.set()
    other.join()
    print(computed)


def shared() -> None:
    torch.set_num_threads(3)
    set_num_threads(3)
    answers = []

    def call(refused: bool) -> None:
        work = behavior_matching()  # too small for PyTorch's own operations to want threads
        LIBRARY.refuse_threads(int(refused))
        answers.append(work())
        LIBRARY.refuse_threads(0)

    for refused in (False, True):  # each time in a thread that has called no op before
        caller = threading.Thread(target=call, args=(refused,))
        caller.start()
        caller.join()
    print(int(all(torch.equal(a, b) for a, b in zip(*answers, strict=True))))


def build(folder: Path) -> Path:
    """The library, built in a folder."""
    path = folder / "refusals.so"
    source = Path(__file__).with_suffix(".cpp")
    compiler = [os.environ.get("CXX", "c++"), "-O1", "-fPIC", "-shared", "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler, str(source), "-ldl", "-o", str(path)], check=True)
    return path


def refuse(first: int, last: int) -> None:
    LIBRARY.refuse(ctypes.c_long(first), ctypes.c_long(last))


def refusing(op: str) -> tuple[int, int, Callable[[int], int]]:
    """How many requests an op makes, the first of them for a thread, and what refuses the n-th, from 1 on: how often it
    still answered."""
    torch.set_num_threads(1)
    set_num_threads(3)
    watch_the_core()
    work = globals()[op]()
    expected = work()

    def answers() -> bool:
        return all(torch.equal(a, b) for a, b in zip(work(), expected, strict=True))

    def counted(count: Callable[[], int]) -> int:
        refuse(0, 0)
        assert answers()
        return count()

    def answers_without(first: int, last: int) -> int:
        refuse(first, last)
        try:
            same, answered = answers(), 1
        except MemoryError:
            same, answered = True, 0
        assert same, f"another answer after request {first} was refused"
        refuse(0, 0)
        assert answers(), f"another answer, one call after request {first} was refused"
        return answered

    def trial(number: int) -> int:  # this one alone, or memory is at an end
        return sum(in_a_child(partial(answers_without, number, last)) for last in (number, FOREVER))

    requests, for_thread = (
        in_a_child(partial(counted, count)) for count in (LIBRARY.requests, LIBRARY.request_for_thread)
    )
    return requests, for_thread, trial


def in_a_child(work: Callable[[], int]) -> int:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(work()).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="ascii") as answer:
        number = answer.read()
    os.waitpid(child, 0)
    if not number:
        sys.exit("a child has failed")
    return int(number)


def main() -> None:
    if sys.argv[1] == "forks":
        torch.set_num_threads(1)
        watch_the_core()
        return forks()
    if sys.argv[1] == "shared":
        return shared()
    requests, for_thread, trial = refusing(sys.argv[1])
    each = range(1, min(requests, EACH) + 1)
    numbers = sorted({for_thread, *each, *range(EACH + 1, requests + 1, max(1, requests // EACH))})
    print(2 * len(numbers), sum(map(trial, numbers)))


if __name__ == "__main__":
    main()
