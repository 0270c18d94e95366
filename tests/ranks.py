"""Runs a function on several ranks of a gloo process group, in forked processes of one thread each."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sdw_fast.ranks import close_group


def on_ranks(size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(rank, *arguments) returned on each of `size` ranks."""
    meeting = folder / f"rendezvous-{uuid.uuid4()}"  # that of an earlier call may still be there
    mp.start_processes(_rank, (size, folder, meeting, function, arguments), nprocs=size, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(
    rank: int, size: int, folder: Path, meeting: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)  # PyTorch's OpenMP threads do not survive a fork
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    finally:
        close_group()
