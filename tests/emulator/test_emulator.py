"""The emulator itself: what it must compute, and the mistakes that it must show."""

import numpy as np
import pytest

SEEDS = range(1, 9)


def wrong_on_some_seed(emulated, run, expected):
    results = []
    for seed in SEEDS:
        emulated.set_seed(seed)
        results.append(run())
    return any(not np.array_equal(result, expected) for result in results)


@pytest.mark.parametrize("warps", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_block_sums(emulated, seed, warps):
    values = np.arange(512, dtype=np.float32)
    emulated.set_seed(seed)
    sums = emulated.block_sum(values, 128, warps, True)
    np.testing.assert_array_equal(sums, values.reshape(4, 128).sum(axis=1))


def test_a_removed_barrier_shows(emulated):
    values = np.arange(512, dtype=np.float32)
    expected = values.reshape(4, 128).sum(axis=1)
    assert wrong_on_some_seed(emulated, lambda: emulated.block_sum(values, 128, False, False), expected)


def ring(values, rounds):
    for _ in range(rounds):
        values = np.roll(values, 1) + np.roll(values, -1)
    return values


def test_cooperative_blocks_meet(emulated):
    values = np.arange(48, dtype=np.float32)
    assert not wrong_on_some_seed(emulated, lambda: emulated.ring(values, 10, True), ring(values, 10))
    assert wrong_on_some_seed(emulated, lambda: emulated.ring(values, 10, False), ring(values, 10))


def test_tensor_core_tile(emulated):
    rng = np.random.default_rng(0)
    a = rng.integers(-9, 9, (16, 8)).astype(np.float32)
    b = rng.integers(-9, 9, (8, 8)).astype(np.float32)
    emulated.set_seed(1)
    np.testing.assert_array_equal(emulated.tile(a, b, True), a @ b)
    # Rounded to nearest: 1 + 2⁻¹¹ up to 1 + 2⁻¹⁰, a little less down to 1.
    for value, rounded in [(1 + 2**-11, 1 + 2**-10), (1 + 2**-11 - 2**-20, 1.0)]:
        one = np.full((16, 8), value, dtype=np.float32)
        np.testing.assert_array_equal(emulated.tile(one, np.eye(8, dtype=np.float32), True)[0], np.float32(rounded))
    unwritten = np.full((16, 8), 0xFFFFFFFF, np.uint32).view(np.float32)  # what memory holds that nobody wrote
    for poison in (unwritten, -unwritten, np.full((16, 8), np.nan, np.float32)):
        assert np.isnan(emulated.tile(poison, b, True)).all()
    infinite = np.where(np.eye(16, 8) > 0, np.float32(np.inf), np.float32(1))
    np.testing.assert_array_equal(emulated.tile(infinite, np.ones((8, 8), np.float32), True)[:8], np.inf)
    assert wrong_on_some_seed(emulated, lambda: emulated.tile(a, b, False), a @ b)


def test_halves_are_those_of_numpy(emulated):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal([emulated.from_half(int(x)) for x in bits], values)
    rng = np.random.default_rng(1)
    between = np.float32(2) ** rng.uniform(-27, 17, 4000).astype(np.float32) * rng.choice([-1, 1], 4000)
    finite = values[np.isfinite(values)]
    ties = (finite[:-1] + finite[1:])[::50] / 2
    for some in (finite, between.astype(np.float32), ties):
        with np.errstate(over="ignore"):
            expected = some.astype(np.float16).view(np.uint16)
        np.testing.assert_array_equal([emulated.to_half(float(x)) for x in some], expected)


def test_warp_and_block_votes(emulated):
    emulated.set_seed(3)
    previous, votes, ballot, _ = emulated.count(0)
    assert previous == 2 * sum(range(31)) + 32 * 31 + 32
    assert votes == 22
    assert ballot & 0xFFFFFFFF == sum(1 << lane for lane in range(0, 32, 3))


@pytest.mark.parametrize(
    ("fault", "message"), [(1, "never reach"), (2, "past its shared memory"), (3, "spin for ever")]
)
def test_faults_end_the_launch(emulated, fault, message):
    emulated.set_seed(1)
    with pytest.raises(RuntimeError, match=message):
        emulated.count(fault)
    assert emulated.count(0)[1] == 22


def test_too_many_threads_are_refused(emulated):
    with pytest.raises(RuntimeError, match="1024 threads"):
        emulated.launch(1025)
