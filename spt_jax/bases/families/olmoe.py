"""OLMoE."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.experts import WithExperts, check_swiglu
from spt_jax.bases.families.llama import TINY, llama_config
from spt_jax.models.config import DecoderConfig
from spt_jax.models.experts_config import ExpertsConfig


class Olmoe(WithExperts):
    """OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): whole queries and keys are normalized, and then clipped."""

    model_type: ClassVar[str] = "olmoe"
    architecture: ClassVar[str] = "OlmoeForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        check_swiglu(hf)
        bias = bool(hf.attention_bias)
        return llama_config(
            hf,
            max_length,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm="whole",
            clip_qkv=hf.clip_qkv,
            experts=ExpertsConfig(
                experts=hf.num_experts,
                top_k=hf.num_experts_per_tok,
                expert_width=hf.intermediate_size,
                renormalize=bool(hf.norm_topk_prob),
            ),
        )

    def tiny(self) -> Mapping[str, Any]:
        sizes = {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 8, "num_hidden_layers": 2}
        return {**TINY, **sizes, "clip_qkv": 0.8}
