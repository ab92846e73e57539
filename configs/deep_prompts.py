"""Deep prompts: keys and values of every layer, and a classification head that reads the request's last token.

On the shipped model and task:  python train.py configs/deep_prompts.py
"""

import dataclasses
from pathlib import Path

from spt_jax.config import ExperimentConfig
from spt_jax.experiment.command_line import load_config_file
from spt_jax.prompts import DeepPrompts


def get_config() -> ExperimentConfig[DeepPrompts]:
    """The quickstart's data and steps, with this method and its default optimizer."""
    quickstart = load_config_file(Path(__file__).with_name("quickstart.py"))
    return dataclasses.replace(quickstart, method=DeepPrompts(length=20))
