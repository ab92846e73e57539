"""Mistral and Ministral: Llama with a sliding window, or with queries that grow with their position."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config, window_of_all, windows
from spt_jax.bases.families.rope import rope_config
from spt_jax.bases.families.text_part import TextFamily, TextPart
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig


class Mistral(LlamaLike):
    """Mistral 7B and its relatives (Jiang et al. 2023, arXiv 2310.06825)."""

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(hf, max_length, **window_of_all(hf))

    def tiny(self) -> Mapping[str, Any]:
        return {**TINY, "sliding_window": 7}


class Ministral(LlamaLike):
    """Ministral 8B of 2024: a sliding window in some layers."""

    model_type: ClassVar[str] = "ministral"
    architecture: ClassVar[str] = "MinistralForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(hf, max_length, **windows(hf))

    def tiny(self) -> Mapping[str, Any]:
        return {
            **TINY,
            "head_dim": 12,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        }


class Ministral3(LlamaLike):
    """The language model of Ministral 3: YaRN, and queries that grow with their position."""

    model_type: ClassVar[str] = "ministral3"
    architecture: ClassVar[str] = "Ministral3ForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        rope = rope_config(hf, max_length)
        if rope.fraction != 1:
            raise ConfigError("ministral3 with partial_rotary_factor is not supported")
        return llama_config(hf, max_length, rope=rope, **window_of_all(hf))

    def tiny(self) -> Mapping[str, Any]:
        return {
            **TINY,
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        }


class Mistral3(TextPart):
    """The language model of Mistral Small 3.1 and later, and of Ministral 3."""

    model_type: ClassVar[str] = "mistral3"
    architecture: ClassVar[str] = "Mistral3ForConditionalGeneration"
    texts: ClassVar[tuple[TextFamily, ...]] = (Mistral(), Ministral3())
