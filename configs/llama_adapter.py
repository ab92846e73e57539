"""LLaMA-Adapter: 20 rows in each of the last layers, scaled by a gate that starts closed.

On the shipped model and task:  python train.py configs/llama_adapter.py
"""

import dataclasses
from pathlib import Path

from spt_jax.config import ExperimentConfig
from spt_jax.experiment.command_line import load_config_file
from spt_jax.prompts import LlamaAdapter


def get_config() -> ExperimentConfig[LlamaAdapter]:
    """The quickstart's data and steps, with this method and its default optimizer."""
    quickstart = load_config_file(Path(__file__).with_name("quickstart.py"))
    return dataclasses.replace(quickstart, method=LlamaAdapter(length=20))
