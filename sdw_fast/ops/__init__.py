"""The ops: one kernel each, with a pure-PyTorch twin beside it."""

from sdw_fast.ops.behavior_matching import behavior_matching
from sdw_fast.ops.knn import knn
from sdw_fast.ops.unrolled_bc import unrolled_bc
from sdw_fast.ops.unrolled_bc_memory import unrolled_bc_memory
from sdw_fast.ops.weighted_bc_loss import weighted_bc_loss

__all__ = ["behavior_matching", "knn", "unrolled_bc", "unrolled_bc_memory", "weighted_bc_loss"]
