"""The door for arrays: every kind of number, memory and tensor is taken exactly or refused, by every caller."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast.arrays import real_numbers
from sdw_fast.density import flow_log_density, knn_log_density
from sdw_fast.ops import knn

# 1,000 away from the origin and 1e-6 apart: float32 would make all of them one.
FAR = 1000 + 1e-6 * np.random.default_rng(0).normal(size=(60, 3))
PLAIN = np.random.default_rng(1).normal(size=(60, 3)).astype(np.float32)


class Meters(np.ndarray):
    """A subclass that does not index as an array does."""

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError("the door leaves the subclass behind")


class Frame:
    """Like a table of pandas: no array, but it makes one."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values


def frozen(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def unaligned(x: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"?" + x.tobytes(), x.dtype, offset=1).reshape(x.shape)


def within_records(x: np.ndarray) -> np.ndarray:
    """Rows 25 or 13 bytes apart, which no stride in numbers says."""
    records = np.zeros(len(x), [("flag", "i1"), ("x", x.dtype, 3)])
    records["x"] = x
    return records["x"]


SAME_ARRAYS: dict[str, Callable[[np.ndarray], Any]] = {
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "big-endian, every other column": lambda x: np.repeat(x, 2, 1).astype(x.dtype.newbyteorder(">"))[:, ::2],
    "masked, but nothing is": lambda x: np.ma.masked_array(x, mask=np.zeros(x.shape, bool)),
    "matrix": lambda x: x.view(np.matrix),
    "subclass": lambda x: x.view(Meters),
    "backwards": lambda x: x[::-1].copy()[::-1],
    "columns backwards": lambda x: x[:, ::-1].copy()[:, ::-1],
    "transposed": lambda x: x.T.copy().T,
    "read-only": frozen,
    "unaligned": unaligned,
    "within records": within_records,
}
SAME_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "transposed tensor": lambda x: x.T.contiguous().T,
    "requires grad": lambda x: x.clone().requires_grad_(),
    "parameter": lambda x: torch.nn.Parameter(x),
    "imaginary part of a conjugate": lambda x: torch.complex(x, -x).conj().imag,
    "negative view": lambda x: torch._neg_view(-x),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
}


def log_density(x: Any) -> Any:
    return knn_log_density(x, k=4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("states", [FAR, PLAIN], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("kind", [*SAME_ARRAYS, *SAME_TENSORS, "memory map", "big-endian memory map"])
def test_the_same_numbers_in_another_form(kind: str, backend: str, states: np.ndarray, tmp_path: Path) -> None:
    if "memory map" in kind:
        given = np.memmap(tmp_path / "x", (">" if "big" in kind else "<") + states.dtype.str[1:], "w+", shape=(60, 3))
        given[:] = states
        given = np.memmap(tmp_path / "x", given.dtype, "r", shape=(60, 3))
    else:
        given = SAME_ARRAYS[kind](states) if kind in SAME_ARRAYS else SAME_TENSORS[kind](torch.from_numpy(states))
    torch.set_warn_always(True)
    try:
        distances, indices = knn(given, k=4, backend=backend)
        across, _ = knn(given, given, k=4, backend=backend)
        density = log_density(given)
    finally:
        torch.set_warn_always(False)
    expected, expected_indices = knn(states, k=4, backend=backend)
    assert isinstance(distances, torch.Tensor) == (kind in SAME_TENSORS)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(distances, expected)
    np.testing.assert_array_equal(across[:, 1:], expected[:, :3])
    np.testing.assert_array_equal(density, log_density(states))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_no_strides(backend: str) -> None:
    # One row, and one number a row, stand for many.
    row = torch.tensor([1.0, 2.0]).expand(5, 2)
    assert knn(row, k=2, backend=backend)[0].tolist() == [[0, 0]] * 5
    column = torch.tensor([[1.0], [4.0], [5.0]]).expand(3, 2)
    expected = knn(column.contiguous(), k=2, backend=backend)
    for given in (column, np.broadcast_to(column[:, :1].numpy(), (3, 2))):
        np.testing.assert_array_equal(knn(given, k=2, backend=backend)[0], expected[0])
        np.testing.assert_array_equal(knn(given, k=2, backend=backend)[1], expected[1])


@pytest.mark.parametrize("dtype", [np.float16, torch.float16, torch.bfloat16])
def test_short_floats_lose_nothing(dtype: Any) -> None:
    states = (PLAIN * 0.01).astype(dtype) if isinstance(dtype, type) else torch.from_numpy(PLAIN * 0.01).to(dtype)
    wide = states.astype(np.float64) if isinstance(dtype, type) else states.double()
    for found, expected in zip(knn(states, k=4), knn(wide, k=4), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(log_density(states), log_density(wide))


@pytest.mark.parametrize("dtype", ["bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))])
def test_densities_take_integers_exactly(dtype: str) -> None:
    rng = np.random.default_rng(2)
    top = 2 if dtype == "bool" else min(int(np.iinfo(dtype).max), 2**53 - 1)
    states = (top - 1 - rng.integers(0, min(top, 1000), (60, 12))).astype(dtype)
    expected = log_density(states.astype(np.float64))
    np.testing.assert_array_equal(log_density(states), expected)
    np.testing.assert_array_equal(log_density(torch.from_numpy(states)), expected)
    np.testing.assert_array_equal(real_numbers("x", states).double().numpy(), states.astype(np.float64))


@pytest.mark.parametrize("value", [2**53, 2**53 + 1, -(2**63), 2**63 - 1])
def test_integers_that_no_float_holds_are_refused(value: int) -> None:
    states = np.zeros((9, 2), np.int64)
    states[3, 1] = value
    for given in (states, torch.from_numpy(states)):
        with pytest.raises(ValueError, match=r"observations has integers of 2\^53 and more"):
            log_density(given)
    with pytest.raises(ValueError, match="integers"):
        log_density(np.full((9, 2), 2**64 - 1, np.uint64))


class Wrapper(torch.Tensor):
    """A tensor that only its own rules know how to read."""

    @staticmethod
    def __new__(cls) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, (9, 2), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("not asked for its numbers")


def refused_tensors() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some kinds are called prototypes
        x = torch.eye(9)
        return {
            "sparse": x.to_sparse(),
            "rows of a sparse one": x.to_sparse_csr(),
            "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
            "nested": torch.nested.nested_tensor([x, x]),
            "masked": torch.masked.masked_tensor(x, x > 0),
            "complex": x.to(torch.complex64),
            "eight bits": x.to(torch.float8_e4m3fn),
            "meta": x.to("meta"),
            "wrapper": Wrapper(),
        }


@pytest.mark.parametrize("kind", refused_tensors())
@pytest.mark.parametrize("search", [lambda x: knn(x, k=2), log_density], ids=["knn", "density"])
def test_refused_tensors(kind: str, search: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"queries|observations") as refusal:
        search(refused_tensors()[kind])
    assert "\n" not in str(refusal.value)


REFUSED_ARRAYS = {
    "masked": np.ma.masked_invalid(np.where(np.eye(9) > 0, np.nan, 1.0)),
    "masked by a number": np.ma.masked_equal(np.eye(9), 1.0),
    "complex": np.eye(9, dtype=complex),
    "objects": np.eye(9).astype(object),
    "text": np.eye(9).astype(str),
    "dates": np.zeros((9, 2), "datetime64[s]"),
    "records": np.zeros((9, 2), [("x", float)]),
}
if np.dtype(np.longdouble).itemsize > 8:
    REFUSED_ARRAYS["long double"] = np.eye(9, dtype=np.longdouble)


@pytest.mark.parametrize("kind", REFUSED_ARRAYS)
@pytest.mark.parametrize(
    "search",
    [lambda x: knn(x, k=2), lambda x: knn(np.eye(9), x, k=2), log_density, flow_log_density],
    ids=["queries", "references", "density", "flow"],
)
def test_refused_arrays(kind: str, search: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError if "masked" in kind else TypeError, match=r"queries|references|observations"):
        search(REFUSED_ARRAYS[kind])


def test_what_makes_an_array() -> None:
    np.testing.assert_array_equal(log_density(Frame(FAR)), log_density(FAR))
    with pytest.raises(TypeError, match=r"queries must be a NumPy array or a torch tensor, got Frame"):
        knn(Frame(FAR), k=2)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="masked"):
        log_density(Frame(REFUSED_ARRAYS["masked"]))
    with pytest.raises(TypeError, match="object"):
        log_density(Frame(np.eye(9).astype(object)))


def test_datasets_and_weights_refuse_masked_values(small_data: sdw.TransitionDataset) -> None:
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    arrays = {name: getattr(small_data, name) for name in names}
    arrays["next_observations"] = small_data.next_observations()
    for name, array in list(arrays.items())[:-1]:
        nothing = np.ma.masked_array(array, mask=np.zeros(array.shape, bool))
        np.testing.assert_array_equal(getattr(sdw.load_dataset(arrays | {name: nothing}), name), array)
        something = nothing.copy()
        something[3] = np.ma.masked
        with pytest.raises(ValueError, match=f"{name} has masked values"):
            sdw.load_dataset(arrays | {name: something})
    with pytest.raises(ValueError, match="masked"):
        sdw.density_weights(np.ma.masked_less(np.linspace(-3, 3, 50), 0), ess=0.5)


def test_out_is_written_where_it_can_be_read() -> None:
    x, indices = torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.int64)
    for distances in (
        torch.zeros(1).expand(5, 2),
        torch.zeros(5, 2, requires_grad=True),
        torch.zeros(5, 2, dtype=torch.complex64).conj().imag,
        torch.zeros(5, 2).to_sparse(),
    ):
        with pytest.raises(ValueError, match="out distances must be writable"):
            knn(x, k=2, out=(distances, indices))
    array, places = x.numpy(), indices.numpy()
    with pytest.raises(TypeError, match="out distances must be of the kind of queries, got MaskedArray"):
        knn(array, k=2, out=(np.ma.zeros((5, 2), np.float32), places))
    for bad in (unaligned(np.zeros((5, 2), np.float32)), within_records(np.zeros((5, 3), np.float32))[:, :2]):
        with pytest.raises(ValueError, match="out distances must be writable"):
            knn(array, k=2, out=(bad, places))
    with pytest.raises(ValueError, match="out distances must be float32"):
        knn(array, k=2, out=(np.zeros((5, 2), ">f4"), places))
