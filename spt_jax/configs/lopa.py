"""LoPA on the shipped task.

Virtual tokens that a small network adapts to each request.

    spt-jax train lopa
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import LowRankPromptAdaptation

get_config = variant(Path(__file__).with_name("quickstart.py"), LowRankPromptAdaptation(length=20))
