"""Residual prompt tuning on the shipped task.

20 virtual tokens plus the output of a small network applied to them.

    spt-jax train residual_prompt_tuning
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import ResidualPromptTuning

get_config = variant(Path(__file__).with_name("quickstart.py"), ResidualPromptTuning(length=20))
