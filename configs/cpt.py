"""Context-aware prompt tuning: the tokens of an instruction, each trained within a ball around its embedding.

On the shipped model and task:  python train.py configs/cpt.py
"""

import dataclasses
from pathlib import Path

from spt_jax.config import ExperimentConfig
from spt_jax.experiment.command_line import load_config_file
from spt_jax.prompts import ContextPromptTuning
from spt_jax.prompts.initializers import text


def get_config() -> ExperimentConfig[ContextPromptTuning]:
    """The quickstart's data and steps, with this method and its default optimizer."""
    quickstart = load_config_file(Path(__file__).with_name("quickstart.py"))
    return dataclasses.replace(
        quickstart,
        method=ContextPromptTuning(
            length=20, init=text("In one word, say what this request to an assistant is about.")
        ),
    )
