"""P-tuning: 20 virtual tokens computed by a small network, which is dropped when the prompt is saved.

On the shipped model and task:  python train.py configs/p_tuning.py
"""

import dataclasses
from pathlib import Path

from spt_jax.config import ExperimentConfig
from spt_jax.experiment.command_line import load_config_file
from spt_jax.prompts import PTuning


def get_config() -> ExperimentConfig[PTuning]:
    """The quickstart's data and steps, with this method and its default optimizer."""
    quickstart = load_config_file(Path(__file__).with_name("quickstart.py"))
    return dataclasses.replace(quickstart, method=PTuning(length=20))
