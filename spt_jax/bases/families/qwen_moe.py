"""Qwen 2 and 3 with experts."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.experts import WithExperts, check_swiglu, experts_in
from spt_jax.bases.families.llama import TINY, llama_config, windows
from spt_jax.models.config import DecoderConfig
from spt_jax.models.experts_config import ExpertsConfig

_TINY_EXPERTS: Mapping[str, Any] = {
    **TINY,
    "num_hidden_layers": 4,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 8,
    "intermediate_size": 24,
    "decoder_sparse_step": 2,
    "tie_word_embeddings": True,
}


class Qwen2Moe(WithExperts):
    """Qwen 1.5 and 2 with experts (arXiv 2407.10671): a shared MLP with a gate beside the experts."""

    model_type: ClassVar[str] = "qwen2_moe"
    architecture: ClassVar[str] = "Qwen2MoeForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        shared = {"shared_width": hf.shared_expert_intermediate_size, "shared_gate": True}
        return llama_config(hf, max_length, qkv_bias=bool(hf.qkv_bias), **windows(hf), **_experts(hf, **shared))

    def tiny(self) -> Mapping[str, Any]:
        return {
            **_TINY_EXPERTS,
            "shared_expert_intermediate_size": 12,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 9,
        }


class Qwen3Moe(WithExperts):
    """Qwen 3 with experts (arXiv 2505.09388): queries and keys of each head are normalized before RoPE."""

    model_type: ClassVar[str] = "qwen3_moe"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        bias, window = bool(hf.attention_bias), hf.sliding_window or 0
        layers = tuple(range(hf.num_hidden_layers)) if window else ()
        return llama_config(
            hf,
            max_length,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm="head",
            window=window,
            window_layers=layers,
            **_experts(hf),
        )

    def tiny(self) -> Mapping[str, Any]:
        return {**_TINY_EXPERTS, "head_dim": 12, "norm_topk_prob": True}


def _experts(hf: Any, **changes: Any) -> dict[str, Any]:
    """Returns the fields of the experts; every `decoder_sparse_step`-th layer has them, unless it is listed."""
    count = hf.num_hidden_layers
    sparse = [i for i in range(count) if i not in hf.mlp_only_layers and (i + 1) % hf.decoder_sparse_step == 0]
    if not (hf.num_experts and sparse):
        return {}
    check_swiglu(hf)
    experts = ExpertsConfig(
        experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        expert_width=hf.moe_intermediate_size,
        renormalize=bool(hf.norm_topk_prob),
        **changes,
    )
    return experts_in(sparse, count, experts)
