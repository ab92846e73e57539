"""Low-rank prompt tuning: 20 frozen virtual tokens plus a trained matrix of rank 8.

On the shipped model and task:  python train.py configs/low_rank_prompt_tuning.py
"""

import dataclasses
from pathlib import Path

from spt_jax.config import ExperimentConfig
from spt_jax.experiment.command_line import load_config_file
from spt_jax.prompts import LowRankPromptTuning


def get_config() -> ExperimentConfig[LowRankPromptTuning]:
    """The quickstart's data and steps, with this method and its default optimizer."""
    quickstart = load_config_file(Path(__file__).with_name("quickstart.py"))
    return dataclasses.replace(quickstart, method=LowRankPromptTuning(length=20))
