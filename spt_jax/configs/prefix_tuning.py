"""Prefix tuning on the shipped task.

Keys and values of every layer at 20 positions before the request.

    spt-jax train prefix_tuning
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import PrefixTuning

get_config = variant(Path(__file__).with_name("quickstart.py"), PrefixTuning(length=20))
