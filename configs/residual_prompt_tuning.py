"""Residual prompt tuning: 20 virtual tokens plus the output of a small network applied to them.

On the shipped model and task:  python train.py configs/residual_prompt_tuning.py
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import ResidualPromptTuning

get_config = variant(Path(__file__).with_name("quickstart.py"), ResidualPromptTuning(length=20))
