"""Prefix-Tuning+ on the shipped task.

A trained map of the queries of every layer, outside the softmax of attention.

    spt-jax train prefix_tuning_plus
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import PrefixTuningPlus

get_config = variant(Path(__file__).with_name("quickstart.py"), PrefixTuningPlus())
