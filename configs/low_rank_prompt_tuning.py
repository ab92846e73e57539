"""Low-rank prompt tuning: 20 frozen virtual tokens plus a trained matrix of rank 8.

On the shipped model and task:  python train.py configs/low_rank_prompt_tuning.py
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import LowRankPromptTuning

get_config = variant(Path(__file__).with_name("quickstart.py"), LowRankPromptTuning(length=20))
