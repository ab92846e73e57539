"""Low-rank prompt tuning on the shipped task.

20 frozen virtual tokens plus a trained matrix of rank 8.

    spt-jax train low_rank_prompt_tuning
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import LowRankPromptTuning

get_config = variant(Path(__file__).with_name("quickstart.py"), LowRankPromptTuning(length=20))
