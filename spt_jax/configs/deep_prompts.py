"""Deep prompts on the shipped task.

Keys and values of every layer, and a classification head that reads the request's last token.

    spt-jax train deep_prompts
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import DeepPrompts

get_config = variant(Path(__file__).with_name("quickstart.py"), DeepPrompts(length=20))
