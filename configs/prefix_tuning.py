"""Prefix tuning: keys and values of every layer at 20 positions before the request.

On the shipped model and task:  python train.py configs/prefix_tuning.py
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import PrefixTuning

get_config = variant(Path(__file__).with_name("quickstart.py"), PrefixTuning(length=20))
