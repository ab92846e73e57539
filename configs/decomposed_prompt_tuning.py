"""Decomposed prompt tuning: 20 virtual tokens and a low-rank change of the request's own embeddings.

On the shipped model and task:  python train.py configs/decomposed_prompt_tuning.py
"""

import dataclasses
from pathlib import Path

from spt_jax.config import ExperimentConfig
from spt_jax.experiment.command_line import load_config_file
from spt_jax.prompts import DecomposedPromptTuning


def get_config() -> ExperimentConfig[DecomposedPromptTuning]:
    """The quickstart's data and steps, with this method and its default optimizer."""
    quickstart = load_config_file(Path(__file__).with_name("quickstart.py"))
    return dataclasses.replace(quickstart, method=DecomposedPromptTuning(length=20))
