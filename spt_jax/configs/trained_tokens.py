"""Trained tokens on the shipped task.

The input embeddings of the words of the topics and of the newline at the end of the prompt.

    spt-jax train trained_tokens
"""

from pathlib import Path

from spt_jax.config import variant
from spt_jax.prompts import TrainedTokens

# Most words of the vocabulary include the space before them.
_TOPICS = (" money", " meeting", " film", " music", " cook", " weather")
get_config = variant(Path(__file__).with_name("quickstart.py"), TrainedTokens(tokens=("\n", *_TOPICS)))
