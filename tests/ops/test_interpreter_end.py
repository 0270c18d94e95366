"""The interpreter ends while daemon threads are inside a kernel: quietly, and with its own exit status."""

from __future__ import annotations

import os
import subprocess
import sys

# The core's own door, without PyTorch, whose ops end the process here themselves (a plain matrix product does).
PROGRAM = """
import sys, threading, time
import numpy as np
from sdw_fast import _C

rows, weights = np.zeros((200_000, 3), np.float32), np.ones(200_000, np.float32)

def for_ever():
    loss = np.zeros(1, np.float32)
    while True:
        _C.weighted_bc_loss_cpu(rows, rows, weights, loss, None)

for _ in range(3):
    threading.Thread(target=for_ever, daemon=True).start()
time.sleep(0.2)
sys.exit(3)
"""


def test_daemon_threads_inside_a_kernel_do_not_disturb_the_end() -> None:
    packages = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=packages, timeout=200)
    assert (done.returncode, done.stderr) == (3, "")
