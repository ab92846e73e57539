"""ReFT on the shipped task.

Low-rank edits of hidden states after each layer.

    spt-jax train reft
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import RepresentationFinetuning

get_config = variant(Path(__file__).with_name("quickstart.py"), RepresentationFinetuning())
