"""Granite 3 with experts."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.experts import WithExperts, check_swiglu
from spt_jax.bases.families.family import Origin, Part, projections
from spt_jax.bases.families.llama import TINY, llama_config
from spt_jax.models.config import DecoderConfig
from spt_jax.models.experts_config import ExpertsConfig


class GraniteMoe(WithExperts):
    """Granite 3 1B-A400M and 3B-A800M: factors of inputs, virtual tokens among them, residuals, scores and logits."""

    model_type: ClassVar[str] = "granitemoe"
    architecture: ClassVar[str] = "GraniteMoeForCausalLM"
    router: ClassVar[str] = "block_sparse_moe.router.layer"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        check_swiglu(hf)
        bias = bool(hf.attention_bias)
        return llama_config(
            hf,
            max_length,
            qkv_bias=bias,
            output_bias=bias,
            input_scale=float(hf.embedding_multiplier),
            residual_scale=float(hf.residual_multiplier),
            score_scale=float(hf.attention_multiplier),
            logit_scale=1 / hf.logits_scaling,
            experts=ExpertsConfig(
                experts=hf.num_local_experts,
                top_k=hf.num_experts_per_tok,
                expert_width=hf.intermediate_size,
                shared_width=getattr(hf, "shared_intermediate_size", 0) if hf.model_type == "granitemoeshared" else 0,
                scoring="softmax_of_chosen",
            ),
        )

    def experts_origins(self, experts: ExpertsConfig, layer: str) -> dict[str, Origin]:
        """Returns where the experts are stored: the rows of gate and up one after the other, in one tensor for all."""
        table = projections([("mlp/router", self.router, False)], layer)
        parts = [("experts", "block_sparse_moe", experts.expert_width)]
        if experts.shared_width:
            parts.append(("shared", "shared_mlp", experts.shared_width))
        for ours, theirs, hidden in parts:
            inwards, outwards = (f"{layer}{theirs}.{name}_linear.weight" for name in ("input", "output"))
            for at, name in enumerate(("gate", "up")):
                take = Part(-2, at * hidden, (at + 1) * hidden)
                table[f"mlp/{ours}/{name}/kernel"] = Origin(inwards, transpose=True, take=take)
            table[f"mlp/{ours}/down/kernel"] = Origin(outwards, transpose=True)
        return table

    def tiny(self) -> Mapping[str, Any]:
        return {
            **TINY,
            "num_hidden_layers": 2,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "intermediate_size": 8,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.7,
            "tie_word_embeddings": True,
        }


class GraniteMoeShared(GraniteMoe):
    """Granite 3 with experts, and a shared MLP beside them."""

    model_type: ClassVar[str] = "granitemoeshared"
    architecture: ClassVar[str] = "GraniteMoeSharedForCausalLM"

    def tiny(self) -> Mapping[str, Any]:
        return {**super().tiny(), "shared_intermediate_size": 12}
