"""Decomposed prompt tuning: 20 virtual tokens and a low-rank change of the request's own embeddings.

On the shipped model and task:  python train.py configs/decomposed_prompt_tuning.py
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import DecomposedPromptTuning

get_config = variant(Path(__file__).with_name("quickstart.py"), DecomposedPromptTuning(length=20))
