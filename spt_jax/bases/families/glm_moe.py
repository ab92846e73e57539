"""GLM 4.5 to 4.7."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.experts import WithExperts, check_swiglu, experts_in
from spt_jax.bases.families.family import with_prefix, without_layer
from spt_jax.bases.families.llama import TINY, llama_config
from spt_jax.bases.families.rope import rope_config
from spt_jax.models.config import DecoderConfig
from spt_jax.models.experts_config import ExpertsConfig


class Glm4Moe(WithExperts):
    """GLM 4.5, 4.6 and 4.7 (arXiv 2508.06471): half of each head is rotated, and the first layers have no experts.

    Files also hold one layer after the last, which predicts the token after the next; it is not read.
    """

    model_type: ClassVar[str] = "glm4_moe"
    architecture: ClassVar[str] = "Glm4MoeForCausalLM"
    shared: ClassVar[str] = "mlp.shared_experts"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        check_swiglu(hf)
        renormalize = bool(hf.norm_topk_prob)
        experts = ExpertsConfig(
            experts=hf.n_routed_experts,
            top_k=hf.num_experts_per_tok,
            expert_width=hf.moe_intermediate_size,
            shared_width=hf.moe_intermediate_size * hf.n_shared_experts,
            scoring="sigmoid",
            renormalize=renormalize,
            renormalize_epsilon=1e-20 if renormalize else 0.0,
            correction=True,
            groups=hf.n_group,
            top_groups=hf.topk_group,
            group_score="top2_sum",
            scale=float(hf.routed_scaling_factor),
        )
        count = hf.num_hidden_layers
        return llama_config(
            hf,
            max_length,
            rope=rope_config(hf, max_length),
            qkv_bias=bool(hf.attention_bias),
            qk_norm="head" if hf.use_qk_norm else "none",
            **experts_in(range(hf.first_k_dense_replace, count), count, experts),
        )

    def canonical(self, name: str, config: DecoderConfig) -> str | None:
        """Returns the name in the table of a stored tensor; None for the layer that predicts a second token."""
        return without_layer(config.layers, with_prefix(name, self.prefix))

    def tiny(self) -> Mapping[str, Any]:
        return {
            **TINY,
            "head_dim": 12,
            "attention_bias": True,
            "use_qk_norm": True,
            "first_k_dense_replace": 1,
            "intermediate_size": 24,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "tie_word_embeddings": True,
        }
