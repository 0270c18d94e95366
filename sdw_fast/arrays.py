"""The door for arrays of real numbers: any dtype, byte order, subclass, layout and device is decided here.

What passes has every value as it was given; what cannot is refused in one sentence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def unmasked(name: str, x: Any) -> np.ndarray:
    """x as a plain NumPy array, without a copy where it is one.

    Raises:
        ValueError: it has masked values.
    """
    array = np.asanyarray(x)
    if isinstance(array, np.ma.MaskedArray):
        if np.ma.is_masked(array):
            raise ValueError(f"{name} has masked values: leave their rows out, or give them values with .filled()")
        array = array.data
    return np.asarray(array)


def real_numbers(name: str, x: Any) -> Tensor | np.memmap:
    """x as a plain dense tensor of floating point, without a graph; a memory map of floats as it is.

    Integers become float32 where it holds them all, else float64. An array is not copied where PyTorch can take it.

    Raises:
        TypeError: not real numbers, wider than float64, or a tensor that is not dense.
        ValueError: masked values, a tensor without data, or integers that float64 does not hold.
    """
    if not isinstance(x, Tensor):
        array = unmasked(name, x)
        kind = array.dtype.name if array.dtype.kind in "biuf" else str(array.dtype)
        _check_kind(name, kind)
        if isinstance(x, np.memmap) and kind in FLOATS:
            return x
        return _floating(name, tensor_of(array))
    if x.is_nested or x.layout != torch.strided or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(f"{name} must be a plain dense tensor, got {type(x).__name__} of layout {x.layout}")
    _check_kind(name, str(x.dtype).removeprefix("torch."))
    if x.is_meta:
        raise ValueError(f"{name} is a meta tensor, without data")
    return _floating(name, x.detach().as_subclass(Tensor).resolve_neg())


def tensor_of(array: np.ndarray) -> Tensor:
    """A tensor over the memory of a plain array of numbers, or over a copy where PyTorch could not take it as it is."""
    native = np.require(array, array.dtype.newbyteorder("="), ["A", "W", "E"])
    if any(stride < 0 or stride % native.itemsize for stride in native.strides):
        native = native.copy()
    return torch.from_numpy(native)


def _check_kind(name: str, kind: str) -> None:
    if kind not in FLOATS + INTEGERS:
        raise TypeError(f"{name} must hold real numbers, as float16, float32, float64 or integers, got {kind}")


def _floating(name: str, x: Tensor) -> Tensor:
    if x.is_floating_point():
        return x
    wide = x.to(torch.float64)
    largest = float(wide.abs().max()) if x.numel() else 0.0
    if largest >= 2**53:
        raise ValueError(f"{name} has integers of 2^53 and more, which float64 does not hold: subtract an offset first")
    return wide.float() if largest <= 2**24 else wide
