"""GLM 4."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config
from spt_jax.bases.families.rope import rope_config
from spt_jax.models.config import DecoderConfig


class Glm(LlamaLike):
    """GLM 4 9B of 2024 (arXiv 2406.12793): RoPE turns neighbours in the first half of each head."""

    model_type: ClassVar[str] = "glm"
    architecture: ClassVar[str] = "GlmForCausalLM"
    fused_mlp: ClassVar[str | None] = "mlp.gate_up_proj"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(hf, max_length, **_fields(hf, max_length))

    def tiny(self) -> Mapping[str, Any]:
        return {**TINY, "head_dim": 12}


class Glm4(Glm):
    """GLM 4 9B and 32B of April 2025: GLM with norms after attention and MLP as well."""

    model_type: ClassVar[str] = "glm4"
    architecture: ClassVar[str] = "Glm4ForCausalLM"
    norms: ClassVar[Mapping[str, str]] = {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_self_attn_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_mlp_layernorm",
    }

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(hf, max_length, norm_place="around", **_fields(hf, max_length))


def _fields(hf: Any, max_length: int | None) -> dict[str, Any]:
    """Returns what both have."""
    return {"qkv_bias": bool(hf.attention_bias), "rope": rope_config(hf, max_length, interleaved=True)}
