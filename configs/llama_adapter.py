"""LLaMA-Adapter: 20 rows in each of the last layers, scaled by a gate that starts closed.

On the shipped model and task:  python train.py configs/llama_adapter.py
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import LlamaAdapter

get_config = variant(Path(__file__).with_name("quickstart.py"), LlamaAdapter(length=20))
