"""Granite 3."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config
from spt_jax.models.config import DecoderConfig


def granite_scales(hf: Any) -> dict[str, float]:
    """Returns the factors of Granite's inputs (virtual tokens among them), residuals, scores and logits."""
    return {
        "input_scale": float(hf.embedding_multiplier),
        "residual_scale": float(hf.residual_multiplier),
        "score_scale": float(hf.attention_multiplier),
        "logit_scale": 1 / hf.logits_scaling,
    }


class Granite(LlamaLike):
    """Granite 3 without experts: Llama with factors of inputs (virtual tokens among them), residuals and logits."""

    model_type: ClassVar[str] = "granite"
    architecture: ClassVar[str] = "GraniteForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        bias = bool(hf.attention_bias)
        return llama_config(
            hf,
            max_length,
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=bool(hf.mlp_bias),
            **granite_scales(hf),
        )

    def tiny(self) -> Mapping[str, Any]:
        return {
            **TINY,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.7,
            "tie_word_embeddings": True,
        }
