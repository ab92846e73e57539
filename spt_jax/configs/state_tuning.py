"""State tuning of Qwen 3.5 on the shipped task.

The initial states of its recurrent layers are trained.

    spt-jax train state_tuning

The shipped model has no recurrent layers, so this config reads a base from the hub: a download of about 1.8 GB on the
first run. No results have been measured yet.
"""

import dataclasses
from pathlib import Path

from spt_jax.config import BaseConfig, ExperimentConfig, variant
from spt_jax.prompts import StateTuning

_on_shipped_task = variant(Path(__file__).with_name("quickstart.py"), StateTuning())


def get_config() -> ExperimentConfig[StateTuning]:
    """The shipped task with another base."""
    return dataclasses.replace(_on_shipped_task(), base=BaseConfig(path="Qwen/Qwen3.5-0.8B-Base"))
