"""The ops: one kernel each, with a pure-PyTorch twin beside it."""

from sdw_fast.ops.knn import knn

__all__ = ["knn"]
