"""sdw_fast: offline behavior distillation with state-density weights, on compiled kernels."""

from sdw_fast import ops
from sdw_fast.runtime import config, get_num_threads, set_num_threads
from sdw_fast.version import __version__

__all__ = ["__version__", "config", "get_num_threads", "ops", "set_num_threads"]
