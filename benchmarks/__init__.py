"""Benchmarks: each op beside its peers, timed in one run (`python -m benchmarks.run`), and studies/."""
