"""Runs an op once for every request for memory or a thread that it makes of the system, with that request refused.

    python refusals.py LIBRARY OP
    python refusals.py LIBRARY forks

LIBRARY is refusals.cpp, built. The op must raise MemoryError or, where only a thread was refused, give the same answer;
and give that answer the next time in any case. Each time in a forked child, which starts its own threads. Prints how
many requests were refused, and how often it still answered. With "forks", forks while another thread frees memory,
slowly, and prints how many children computed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

LIBRARY = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before any other C++ library

import torch  # noqa: E402

from sdw_fast import _C, ops, set_num_threads  # noqa: E402

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


def main() -> None:
    torch.set_num_threads(1)
    set_num_threads(3)
    watch_the_core()
    if sys.argv[2] == "forks":
        return forks()
    work = globals()[sys.argv[2]]()
    expected = work()

    def answers() -> bool:
        return all(torch.equal(a, b) for a, b in zip(work(), expected, strict=True))

    def refuse(first: int, last: int) -> None:
        LIBRARY.refuse(ctypes.c_long(first), ctypes.c_long(last))

    def requests() -> int:
        refuse(0, 0)
        assert answers()
        return LIBRARY.requests()

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

    made = in_a_child(requests)
    numbers = [*range(1, min(made, EACH) + 1), *range(EACH + 1, made + 1, max(1, made // EACH))]
    # This one alone, or memory is at an end.
    trials = [partial(answers_without, number, last) for number in numbers for last in (number, FOREVER)]
    print(len(trials), sum(map(in_a_child, trials)))


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


if __name__ == "__main__":
    main()
