"""sdw_fast: offline behavior distillation with state-density weights, on compiled kernels."""

from sdw_fast import ops
from sdw_fast.collect import collect
from sdw_fast.data import Normalizer, TransitionDataset, concatenate, load_dataset, normalized_return
from sdw_fast.density import (
    DensityWeights,
    Diversity,
    coverage,
    density_weights,
    diversity,
    effective_sample_size,
    estimate_dimension,
    flow_log_density,
    kde_log_density,
    knn_log_density,
    log_density,
)
from sdw_fast.distill import DistillConfig, Distiller, distill
from sdw_fast.evaluate import Evaluation, evaluate, evaluate_synthetic
from sdw_fast.objectives import OuterProblem, outer_problem
from sdw_fast.policy import MLPPolicy, behavior_clone
from sdw_fast.runtime import config, get_num_threads, set_num_threads
from sdw_fast.synthetic import SyntheticDataset
from sdw_fast.teacher import Teacher, train_teacher
from sdw_fast.version import __version__

__all__ = [
    "DensityWeights",
    "DistillConfig",
    "Distiller",
    "Diversity",
    "Evaluation",
    "MLPPolicy",
    "Normalizer",
    "OuterProblem",
    "SyntheticDataset",
    "Teacher",
    "TransitionDataset",
    "__version__",
    "behavior_clone",
    "collect",
    "concatenate",
    "config",
    "coverage",
    "density_weights",
    "distill",
    "diversity",
    "effective_sample_size",
    "estimate_dimension",
    "evaluate",
    "evaluate_synthetic",
    "flow_log_density",
    "get_num_threads",
    "kde_log_density",
    "knn_log_density",
    "load_dataset",
    "log_density",
    "normalized_return",
    "ops",
    "outer_problem",
    "set_num_threads",
    "train_teacher",
]
