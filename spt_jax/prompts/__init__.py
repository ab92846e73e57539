"""The soft-prompt family: one file per method, and the initializers they share."""

from typing import Any

from spt_jax.prompts.method import Method, PromptParams
from spt_jax.prompts.prefix_tuning import PrefixTuning
from spt_jax.prompts.prompt_tuning import PromptTuning
from spt_jax.prompts.virtual import VirtualPrompt

__all__ = ["METHODS", "Method", "PrefixTuning", "PromptParams", "PromptTuning", "VirtualPrompt"]

METHODS: dict[str, Any] = {"prompt_tuning": PromptTuning, "prefix_tuning": PrefixTuning}
