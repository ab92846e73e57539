"""Phi 3 and 4."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config, window_of_all
from spt_jax.bases.families.rope import rope_config
from spt_jax.models.config import DecoderConfig


class Phi3(LlamaLike):
    """Phi 3, 3.5, 4 and 4 mini (arXiv 2404.14219): joined projections, and LongRoPE on a part of each head."""

    model_type: ClassVar[str] = "phi3"
    architecture: ClassVar[str] = "Phi3ForCausalLM"
    fused_qkv: ClassVar[str | None] = "self_attn.qkv_proj"
    fused_mlp: ClassVar[str | None] = "mlp.gate_up_proj"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(hf, max_length, rope=rope_config(hf, max_length), **window_of_all(hf))

    def tiny(self) -> Mapping[str, Any]:
        return {
            **TINY,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "sliding_window": 9,
            "original_max_position_embeddings": 128,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1_000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5],
                "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
            },
        }
