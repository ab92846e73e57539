"""LLaMA-Adapter on the shipped task.

20 rows in each of the last layers, scaled by a gate that starts closed.

    spt-jax train llama_adapter
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import LlamaAdapter

get_config = variant(Path(__file__).with_name("quickstart.py"), LlamaAdapter(length=20))
