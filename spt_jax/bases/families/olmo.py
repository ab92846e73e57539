"""OLMo 1 to 3."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config, ropes_by_type, windows
from spt_jax.models.config import DecoderConfig


class Olmo(LlamaLike):
    """OLMo 1 (arXiv 2402.00838): LayerNorms without parameters, and clipped queries, keys and values."""

    model_type: ClassVar[str] = "olmo"
    architecture: ClassVar[str] = "OlmoForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        bias = bool(hf.attention_bias)
        return llama_config(
            hf,
            max_length,
            norm="layer",
            norm_epsilon=1e-5,
            norm_scale=False,
            norm_bias=False,
            qkv_bias=bias,
            output_bias=bias,
            clip_qkv=hf.clip_qkv,
        )

    def tiny(self) -> Mapping[str, Any]:
        return {**TINY, "clip_qkv": 1.0}


class Olmo2(LlamaLike):
    """OLMo 2 (arXiv 2501.00656): norms of the outputs of attention and MLP, and of whole queries and keys."""

    model_type: ClassVar[str] = "olmo2"
    architecture: ClassVar[str] = "Olmo2ForCausalLM"
    norms: ClassVar[Mapping[str, str]] = {
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(hf, max_length, **_fields_of_2(hf))

    def tiny(self) -> Mapping[str, Any]:
        return TINY


class Olmo3(Olmo2):
    """OLMo 3: OLMo 2 with a sliding window and another RoPE in most layers."""

    model_type: ClassVar[str] = "olmo3"
    architecture: ClassVar[str] = "Olmo3ForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(hf, max_length, **_fields_of_2(hf), **windows(hf), **ropes_by_type(hf, max_length))

    def tiny(self) -> Mapping[str, Any]:
        yarn = {"rope_type": "yarn", "rope_theta": 1_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
        return {
            **TINY,
            "num_hidden_layers": 4,
            "sliding_window": 7,
            "rope_parameters": {
                "full_attention": yarn,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
            },
        }


def _fields_of_2(hf: Any) -> dict[str, Any]:
    bias = bool(hf.attention_bias)
    return {"norm_place": "after", "qk_norm": "whole", "qkv_bias": bias, "output_bias": bias}
