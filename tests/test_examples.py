"""The examples that end in seconds do what they say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

OUTER_LOOPS = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "outer_loops.py"))


@pytest.mark.parametrize("learn", ["own_loss", "step_sizes", "pair_weights"])
def test_an_outer_loop_of_ones_own_learns(learn: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = OUTER_LOOPS[learn]()
    assert after < before / 4
    if learn == "pair_weights":
        wrong, right = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
        assert wrong < 0.5 < 1 < right
