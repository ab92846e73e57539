"""Progressive prompts on the shipped task.

20 virtual tokens, before those of an earlier task's prompt if one is given.

    spt-jax train progressive_prompts --method.previous out/first/prompt
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import ProgressivePrompts

get_config = variant(Path(__file__).with_name("quickstart.py"), ProgressivePrompts())
