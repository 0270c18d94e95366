"""The memory of an unroll, before it runs."""

from __future__ import annotations

from collections.abc import Sequence

from sdw_fast.ops._backend import _C
from sdw_fast.ops._mlp import check_tape


def unrolled_bc_memory(
    rows: int,
    widths: Sequence[int],
    *,
    steps: int,
    window: int | None = None,
    tape: str = "full",
    problems: int = 1,
    device: str = "cpu",
) -> int:
    """Returns the bytes of memory that `unrolled_bc` and its backward pass need beside their tensors.

    Args:
        rows: N of the observations (N, D) and actions (N, A).
        widths: [D, hidden widths …, A] of the policy.
        steps, window, tape: As `unrolled_bc` takes them.
        problems: R, if every tensor has a leading dimension.
        device: "cpu" or, where the CUDA kernels are compiled, "cuda".

    Raises:
        ValueError: a number is not as said, or there are no kernels for the device.
    """
    check_tape(steps, window, tape)
    if device not in ("cpu", "cuda") or not hasattr(_C, f"unrolled_bc_{device}"):
        raise ValueError(f"unrolled_bc_memory: there are no kernels for device {device!r} in this build")
    options = _C.UnrolledBCOptions(
        problems=problems,
        rows=rows,
        widths=list(widths),
        steps=steps,
        window=window or steps,
        head="tanh",
        momentum=0.0,
        keep_tape=True,
        recompute=tape == "recompute",
        ieee=False,
    )
    return _C.unrolled_bc_cpu_memory(options) if device == "cpu" else _C.unrolled_bc_cuda_workspace(options)
