"""Benchmarks: each op beside its peers, timed in one run. `python -m benchmarks.run` prints the table."""
