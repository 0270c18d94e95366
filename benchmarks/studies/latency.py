"""What the latency of a network costs two ranks: an outer step's messages, and the exact neighbors of all rows.

sudo python -m benchmarks.studies.latency --delays 0 1 10 --rows 2e4

Each rank lives in a network namespace of its own. What passes between the two goes through this program, which hands
every packet on after the delay (milliseconds, one way), as `tc netem` does in kernels that have it. Linux, and root. A
row a delay goes to results/latency.jsonl; a step is the fastest of many, and the relay itself is included (delay 0).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.bench_knn import K, source
from benchmarks.studies.work import one_thread
from benchmarks.table import RESULTS, append, origin
from sdw_fast import distributed
from sdw_fast.ranks import Ranks, close_group

NAMES = ("sdw0", "sdw1")  # of the namespaces, and of the device in each
MESSAGE = 256 * (17 + 6) + 4  # floats: the hypergradient of 256 HalfCheetah pairs, and the figures of a step
REPEATS = 30
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_SET_DEVICE, _PACKETS = 0x400454CA, 0x1001  # TUNSETIFF; IFF_TUN | IFF_NO_PI


@contextlib.contextmanager
def network(delay: float) -> Iterator[None]:
    """Two namespaces, and between them a link of so many seconds one way."""
    devices = [os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK) for _ in NAMES]
    stop = threading.Event()
    passing = threading.Thread(target=pass_on, args=(devices, delay, stop))
    try:
        for number, name in enumerate(NAMES):
            fcntl.ioctl(devices[number], _SET_DEVICE, struct.pack("16sH", name.encode(), _PACKETS))
            address = f"10.77.0.{number + 1} peer 10.77.0.{2 - number}"
            for line in (
                f"ip netns add {name}",
                f"ip link set {name} netns {name}",
                f"ip -n {name} addr add {address} dev {name}",
                f"ip -n {name} link set {name} mtu 9000 up",
                f"ip -n {name} link set lo up",
            ):
                subprocess.run(line.split(), check=True)
        passing.start()
        yield
    finally:
        stop.set()
        if passing.ident:
            passing.join()
        for name, device in zip(NAMES, devices, strict=True):
            os.close(device)
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def pass_on(devices: list[int], delay: float, stop: threading.Event) -> None:
    """Reads packets from each device and writes them to the other when they are due."""
    waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while not stop.is_set():
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.1
        for device in select.select(devices, [], [], patience)[0]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = os.read(device, 1 << 16)
                    waiting.append((time.monotonic() + delay, devices[device == devices[0]], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, device, packet = waiting.popleft()
            with contextlib.suppress(OSError):  # a device that is not up yet, or full: TCP sends it again
                os.write(device, packet)


def enter(name: str) -> None:
    """Moves this process, and the threads that it will start, to a namespace."""
    with Path("/var/run/netns", name).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "cannot enter the namespace", name)


def timed(work: Callable[[], object], repeats: int) -> float:
    """The least of the seconds that it takes, after one that warms up: what else the machine does only adds to them."""
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def measure(rank: int, folder: Path, rows: int) -> None:
    """A rank's seconds."""
    one_thread()
    enter(NAMES[rank])
    os.environ["GLOO_SOCKET_IFNAME"] = NAMES[rank]
    points = torch.from_numpy(source("surface:17", rows)).tensor_split(2)[rank].clone()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    ranks, message = Ranks(), torch.zeros(MESSAGE)

    figures = {
        "step": timed(lambda: ranks.add([message]), REPEATS),
        "knn": timed(lambda: distributed.knn(points, k=K), 1),
    }
    torch.save(figures, folder / f"{rank}.pt")
    close_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 1, 10], help="milliseconds, one way")
    parser.add_argument("--rows", type=float, default=2e4)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for delay in options.delays:
        with network(delay / 1000), tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (Path(folder), int(options.rows)), nprocs=2)
            found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
        row = {"study": "latency", "delay_ms": delay, "rows": int(options.rows)}
        row |= {f"{name}_seconds": round(max(each[name] for each in found), 4) for name in ("step", "knn")}
        print(row, flush=True)
        append(RESULTS / "latency.jsonl", {**row, **origin()})


if __name__ == "__main__":
    main()
