"""Context-aware prompt tuning on the shipped task.

The tokens of an instruction, each trained within a ball around its embedding.

    spt-jax train cpt
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import ContextPromptTuning
from spt_jax.prompts.initializers import text

method = ContextPromptTuning(length=20, init=text("In one word, say what this request to an assistant is about."))
get_config = variant(Path(__file__).with_name("quickstart.py"), method)
