"""Decomposed prompt tuning on the shipped task.

20 virtual tokens and a low-rank change of the request's own embeddings.

    spt-jax train decomposed_prompt_tuning
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import DecomposedPromptTuning

get_config = variant(Path(__file__).with_name("quickstart.py"), DecomposedPromptTuning(length=20))
