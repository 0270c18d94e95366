"""sdw_fast: offline behavior distillation with state-density weights, on compiled kernels.

What is not named here lies in the module that its name says: `sdw_fast.density`, `sdw_fast.diversity`, `sdw_fast.data`,
`sdw_fast.units`, `sdw_fast.run`, and the ops in `sdw_fast.ops`. Importing needs numpy and torch only.
"""

from sdw_fast import data, density, distributed, diversity, ops, run, units
from sdw_fast.config import DistillConfig
from sdw_fast.data import TransitionDataset
from sdw_fast.density import density_weights, log_density
from sdw_fast.distiller import Distiller
from sdw_fast.evaluation import evaluate, evaluate_synthetic
from sdw_fast.objectives import OuterProblem, outer_problem
from sdw_fast.policy import MLPPolicy, behavior_clone
from sdw_fast.readers import load_dataset
from sdw_fast.run import distill
from sdw_fast.runtime import get_num_threads, set_num_threads, show_config
from sdw_fast.suite import collect
from sdw_fast.synthetic import SyntheticDataset, real_pairs
from sdw_fast.teacher import Teacher
from sdw_fast.training import train_teacher
from sdw_fast.units import Units
from sdw_fast.version import __version__

__all__ = [  # noqa: RUF022 (in the order of use)
    # dataset
    "collect",
    "load_dataset",
    "TransitionDataset",
    "Units",
    # teacher, densities, the outer problem
    "Teacher",
    "train_teacher",
    "log_density",
    "density_weights",
    "OuterProblem",
    "outer_problem",
    # the synthetic set
    "DistillConfig",
    "distill",
    "Distiller",
    "SyntheticDataset",
    "real_pairs",
    # policy and evaluation
    "behavior_clone",
    "MLPPolicy",
    "evaluate",
    "evaluate_synthetic",
    # the installation
    "show_config",
    "get_num_threads",
    "set_num_threads",
    "__version__",
    # modules
    "data",
    "density",
    "distributed",
    "diversity",
    "ops",
    "run",
    "units",
]
