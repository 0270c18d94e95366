import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdw_fast import show_config

CONFIG = show_config("dicts") or {}


@pytest.mark.parametrize("isa", CONFIG["instruction_sets_available"])
def test_compiled_ops_on_every_instruction_set(isa):
    # The choice is made once a process. The one in use is tested by the other files.
    if isa == CONFIG["instruction_set"]:
        pytest.skip("in use: covered by the other tests")
    chosen = "(compiled or cpu) and not (isa or emulated or cuda)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    environment = {**os.environ, "SDW_ISA": isa}
    done = subprocess.run([*command, str(Path(__file__).parent)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_instruction_set_is_refused():
    environment = {**os.environ, "SDW_ISA": "sse9"}
    done = subprocess.run(
        [sys.executable, "-c", "import sdw_fast; sdw_fast.show_config()"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "SDW_ISA=sse9 is not available; this machine has: portable" in done.stderr
