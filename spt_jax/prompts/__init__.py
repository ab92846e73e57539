"""The soft-prompt family: one file per method, and the initializers they share."""

from spt_jax.prompts.prompt_tuning import PromptTuning
from spt_jax.prompts.virtual import VirtualPrompt

__all__ = ["METHODS", "PromptTuning", "VirtualPrompt"]

METHODS = {"prompt_tuning": PromptTuning}
