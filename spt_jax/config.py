"""What a config file imports: the dataclasses that make up an experiment, and `variant`."""

from spt_jax.evaluation.evaluate import EvaluationConfig
from spt_jax.experiment.config import BaseConfig, DataConfig, ExperimentConfig, TaskConfig
from spt_jax.experiment.config_files import variant
from spt_jax.runtime.sharding import MeshConfig
from spt_jax.training.config import LogConfig, LossConfig, TrainConfig
from spt_jax.training.optimizers import OptimizerConfig

__all__ = [
    "BaseConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "LogConfig",
    "LossConfig",
    "MeshConfig",
    "OptimizerConfig",
    "TaskConfig",
    "TrainConfig",
    "variant",
]
