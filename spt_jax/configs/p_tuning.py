"""P-tuning on the shipped task.

20 virtual tokens computed by a small network, which is dropped when the prompt is saved.

    spt-jax train p_tuning
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import PTuning

get_config = variant(Path(__file__).with_name("quickstart.py"), PTuning(length=20))
