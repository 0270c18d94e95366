"""sdw_fast: offline behavior distillation with state-density weights, on compiled kernels."""

from sdw_fast import density, diversity, ops
from sdw_fast.config import DistillConfig, TeacherConfig
from sdw_fast.data import TransitionDataset, concatenate
from sdw_fast.density import density_weights, log_density
from sdw_fast.distiller import Distiller
from sdw_fast.evaluation import Evaluation, evaluate, evaluate_synthetic
from sdw_fast.objectives import OuterProblem, outer_problem
from sdw_fast.policy import MLPPolicy, behavior_clone
from sdw_fast.readers import load_dataset
from sdw_fast.run import distill, run
from sdw_fast.runtime import get_num_threads, set_num_threads, show_config
from sdw_fast.suite import collect
from sdw_fast.synthetic import SyntheticDataset, real_pairs
from sdw_fast.teacher import Teacher
from sdw_fast.training import train_teacher
from sdw_fast.units import Affine, Units
from sdw_fast.version import __version__

__all__ = [
    "Affine",
    "DistillConfig",
    "Distiller",
    "Evaluation",
    "MLPPolicy",
    "OuterProblem",
    "SyntheticDataset",
    "Teacher",
    "TeacherConfig",
    "TransitionDataset",
    "Units",
    "__version__",
    "behavior_clone",
    "collect",
    "concatenate",
    "density",
    "density_weights",
    "distill",
    "diversity",
    "evaluate",
    "evaluate_synthetic",
    "get_num_threads",
    "load_dataset",
    "log_density",
    "ops",
    "outer_problem",
    "real_pairs",
    "run",
    "set_num_threads",
    "show_config",
    "train_teacher",
]
