"""Mistral: Llama with a sliding window in every layer."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config
from spt_jax.models.config import DecoderConfig


class Mistral(LlamaLike):
    """Mistral 7B and its relatives (Jiang et al. 2023, arXiv 2310.06825)."""

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        window = hf.sliding_window or 0
        layers = tuple(range(hf.num_hidden_layers)) if window else ()
        return llama_config(hf, max_length, window=window, window_layers=layers)

    def tiny(self) -> Mapping[str, Any]:
        return {**TINY, "sliding_window": 7}
