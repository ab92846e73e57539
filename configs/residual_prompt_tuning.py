"""Residual prompt tuning: 20 virtual tokens plus the output of a small network applied to them.

On the shipped model and task:  python train.py configs/residual_prompt_tuning.py
"""

import dataclasses
from pathlib import Path

from spt_jax.config import ExperimentConfig
from spt_jax.experiment.command_line import load_config_file
from spt_jax.prompts import ResidualPromptTuning


def get_config() -> ExperimentConfig[ResidualPromptTuning]:
    """The quickstart's data and steps, with this method and its default optimizer."""
    quickstart = load_config_file(Path(__file__).with_name("quickstart.py"))
    return dataclasses.replace(quickstart, method=ResidualPromptTuning(length=20))
