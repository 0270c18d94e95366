"""The compiled core by itself, on NumPy's arrays, called by many threads at once; Python goes on during a call."""

from __future__ import annotations

import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier, Event, Thread

import numpy as np
import pytest

from sdw_fast import _C

THREADS = 8
ROUNDS = 40
WIDTHS = [5, 16, 2]
FLAT = sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(WIDTHS))

Array = np.ndarray


@pytest.fixture(autouse=True)
def number_of_threads() -> Iterator[None]:
    before = _C.num_threads()
    _C.set_num_threads(2)
    yield
    _C.set_num_threads(before)


def drawn(seed: int, rows: int = 32) -> tuple[Array, Array, Array]:
    """States (1, rows, 5), actions (1, rows, 2), parameters (1, FLAT)."""
    rng = np.random.default_rng(seed)
    states, actions, params = (rng.standard_normal((1, *s), np.float32) for s in ((rows, 5), (rows, 2), (FLAT,)))
    return states, np.tanh(actions), params / 4


def joined(*arrays: Array) -> Array:
    return np.concatenate([array.ravel().astype(np.float64) for array in arrays])


class Training:
    """A training unrolled over all its steps; the way back through it may be gone many times."""

    def __init__(self, seed: int, rows: int = 32, *, recompute: bool = False) -> None:
        self.states, self.actions, self.params = drawn(seed, rows)
        self.trained = np.empty_like(self.params)
        options = {"problems": 1, "rows": rows, "widths": WIDTHS, "steps": 8, "window": 8, "head": "tanh"}
        options |= {"momentum": 0.5, "keep_tape": True, "recompute": recompute, "ieee": True}
        self.options = _C.UnrolledBCOptions(**options)
        self.run()

    def run(self) -> None:
        lr = np.full(1, 0.1, np.float32)
        self.tape = _C.unrolled_bc_cpu(self.options, self.states, self.actions, self.params, lr, self.trained)

    def back(self) -> Array:
        gradients = [np.zeros_like(x) for x in (self.states, self.actions, self.params)]
        lr = np.zeros(1, np.float32)
        self.tape.backward(self.trained, *gradients, lr)
        return joined(*gradients, lr)


def unrolled_bc(seed: int) -> Array:
    training = Training(seed)
    return joined(training.trained, training.back())


def behavior_matching(seed: int, rows: int = 32) -> Array:
    states, actions, params = drawn(seed, rows)
    loss, gradient = np.zeros(1, np.float32), np.zeros_like(params)
    weights = np.ones((1, rows), np.float32)
    _C.behavior_matching_cpu(WIDTHS, "tanh", params, states, actions, weights, loss, gradient)
    return joined(loss, gradient)


def weighted_bc_loss(seed: int, rows: int = 32) -> Array:
    _, actions, _ = drawn(seed, rows)
    loss, gradient = np.zeros(1, np.float32), np.zeros_like(actions[0])
    _C.weighted_bc_loss_cpu(actions[0], actions[0] / 2, np.ones(rows, np.float32), loss, gradient)
    return joined(loss, gradient)


def knn(seed: int, rows: int = 300) -> Array:
    points = drawn(seed, rows)[0][0]
    join = _C.KnnIndex(points, points, 0.0).self_join(3)
    query, squared, index = np.zeros(rows, np.int64), np.zeros((rows, 3)), np.zeros((rows, 3), np.int64)
    join.search(0, join.groups, query, squared, index)
    return joined(query, squared, index)


OPS: list[Callable[[int], Array]] = [unrolled_bc, behavior_matching, weighted_bc_loss, knn]


def test_threads_that_call_every_op_at_once_get_one_threads_bits() -> None:
    alone = {(op, seed): op(seed) for op in OPS for seed in range(4)}
    shared = Training(9, recompute=True)
    gradient = shared.back()
    at_once = Barrier(THREADS)

    def wrong(thread: int) -> set[str]:
        """The names of ops that gave anything else, while others call them and change the number of threads."""
        names = set()
        at_once.wait()
        for turn in range(thread, thread + ROUNDS):
            op, seed = OPS[turn % len(OPS)], turn // len(OPS) % 4
            if not np.array_equal(op(seed), alone[op, seed]):
                names.add(op.__name__)
            if not np.array_equal(shared.back(), gradient):
                names.add("unrolled_bc's way back through one tape")
            if turn % 10 == 0:
                _C.set_num_threads(1 + turn // 10 % 3)
        return names

    with ThreadPoolExecutor(THREADS) as pool:
        assert set().union(*pool.map(wrong, range(THREADS))) == set()


def calls() -> dict[str, Callable[[], object]]:
    """One call of the core each, of a millisecond or so."""
    training, lr = Training(0, 2_000), np.zeros(1, np.float32)
    states, actions, params = drawn(0, 20_000)
    weights, loss = np.ones((1, 20_000), np.float32), np.zeros(1, np.float32)
    points = states[0, :5_000]
    tree = _C.KnnIndex(points, points, 0.0)
    join = tree.self_join(3)
    found = np.zeros(5_000, np.int64), np.zeros((5_000, 3)), np.zeros((5_000, 3), np.int64)
    return {
        "unrolled_bc": training.run,
        "its way back": lambda: training.tape.backward(training.trained, None, None, None, lr),
        "behavior_matching": lambda: _C.behavior_matching_cpu(
            WIDTHS, "tanh", params, states, actions, weights, loss, None
        ),
        "weighted_bc_loss": lambda: _C.weighted_bc_loss_cpu(actions[0], actions[0], weights[0], loss, None),
        "knn's tree": lambda: _C.KnnIndex(points, points, 0.0),
        "its join": lambda: tree.self_join(3),
        "its search": lambda: join.search(0, join.groups, *found),
    }


@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="this Python has no global lock")
def test_python_goes_on_during_a_call() -> None:
    """Another thread gets the global lock only where this one lets go of it, for none takes it away in the test."""
    turns, ended = 0, Event()

    def turn() -> None:
        nonlocal turns
        while not ended.is_set():
            turns += 1
            time.sleep(0)  # lets go of the lock

    def goes_on(call: Callable[[], object]) -> bool:
        before = turns
        call()
        return turns > before

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e3)
    other = Thread(target=turn)
    other.start()
    try:
        for name, call in calls().items():  # more than once: a busy machine may start the other thread too late
            assert any(goes_on(call) for _ in range(500)), f"{name} keeps the global lock"
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        other.join()
