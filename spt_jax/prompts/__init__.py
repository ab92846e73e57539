"""Soft-prompt methods, one file per method, and the initializers they share."""

from typing import Any

from spt_jax.prompts.cpt import ContextPromptTuning
from spt_jax.prompts.decomposed import DecomposedPromptTuning
from spt_jax.prompts.deep_prompts import DeepPrompts
from spt_jax.prompts.llama_adapter import LlamaAdapter
from spt_jax.prompts.lopa import LowRankPromptAdaptation
from spt_jax.prompts.low_rank import LowRankPromptTuning
from spt_jax.prompts.method import Method, PromptParams
from spt_jax.prompts.multitask import MultitaskPromptTuning
from spt_jax.prompts.p_tuning import PTuning
from spt_jax.prompts.prefix_tuning import PrefixTuning
from spt_jax.prompts.prefix_tuning_plus import PrefixTuningPlus
from spt_jax.prompts.progressive import ProgressivePrompts
from spt_jax.prompts.prompt_tuning import PromptTuning
from spt_jax.prompts.reft import RepresentationFinetuning
from spt_jax.prompts.residual import ResidualPromptTuning
from spt_jax.prompts.state_tuning import StateTuning
from spt_jax.prompts.trained_tokens import TrainedTokens
from spt_jax.prompts.virtual import VirtualPrompt

__all__ = [
    "METHODS",
    "ContextPromptTuning",
    "DecomposedPromptTuning",
    "DeepPrompts",
    "LlamaAdapter",
    "LowRankPromptAdaptation",
    "LowRankPromptTuning",
    "Method",
    "MultitaskPromptTuning",
    "PTuning",
    "PrefixTuning",
    "PrefixTuningPlus",
    "ProgressivePrompts",
    "PromptParams",
    "PromptTuning",
    "RepresentationFinetuning",
    "ResidualPromptTuning",
    "StateTuning",
    "TrainedTokens",
    "VirtualPrompt",
]

METHODS: dict[str, Any] = {
    "prompt_tuning": PromptTuning,
    "prefix_tuning": PrefixTuning,
    "prefix_tuning_plus": PrefixTuningPlus,
    "p_tuning": PTuning,
    "residual_prompt_tuning": ResidualPromptTuning,
    "low_rank_prompt_tuning": LowRankPromptTuning,
    "decomposed_prompt_tuning": DecomposedPromptTuning,
    "cpt": ContextPromptTuning,
    "llama_adapter": LlamaAdapter,
    "deep_prompts": DeepPrompts,
    "multitask_prompt_tuning": MultitaskPromptTuning,
    "state_tuning": StateTuning,
    "progressive_prompts": ProgressivePrompts,
    "trained_tokens": TrainedTokens,
    "lopa": LowRankPromptAdaptation,
    "reft": RepresentationFinetuning,
}
