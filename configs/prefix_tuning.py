"""Prefix tuning: keys and values of every layer at 20 positions before the request.

On the shipped model and task:  python train.py configs/prefix_tuning.py
"""

import dataclasses
from pathlib import Path

from spt_jax.config import ExperimentConfig
from spt_jax.experiment.command_line import load_config_file
from spt_jax.prompts import PrefixTuning


def get_config() -> ExperimentConfig[PrefixTuning]:
    """The quickstart's data and steps, with this method and its default optimizer."""
    quickstart = load_config_file(Path(__file__).with_name("quickstart.py"))
    return dataclasses.replace(quickstart, method=PrefixTuning(length=20))
