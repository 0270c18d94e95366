"""`python -m sdw_fast`: the command `sdw-fast`, for `torchrun -m sdw_fast`."""

from sdw_fast.cli import app

app(prog_name="sdw-fast")
