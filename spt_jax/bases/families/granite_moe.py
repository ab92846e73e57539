"""Granite 3 with experts."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.experts import WithExperts, check_swiglu
from spt_jax.bases.families.family import Origin, Part, projections
from spt_jax.bases.families.granite import granite_scales
from spt_jax.bases.families.llama import TINY, llama_config
from spt_jax.models.config import DecoderConfig
from spt_jax.models.experts_config import ExpertsConfig


def granite_experts(hf: Any, shared_width: int) -> ExpertsConfig:
    """Returns the experts of a config with Granite's field names."""
    return ExpertsConfig(
        experts=hf.num_local_experts,
        top_k=hf.num_experts_per_tok,
        expert_width=hf.intermediate_size,
        shared_width=shared_width,
        scoring="softmax_of_chosen",
    )


def joined_mlp(path: str, module: str, width: int) -> dict[str, Origin]:
    """Returns where an MLP, or all experts together, are stored: the rows of gate and up in one tensor.

    Args:
      path: of the MLP in the layer.
      module: name of the module that holds it.
      width: hidden width.
    """
    inwards, outwards = (f"{module}.{name}_linear.weight" for name in ("input", "output"))
    table = {f"{path}/down/kernel": Origin(outwards, transpose=True)}
    for at, name in enumerate(("gate", "up")):
        part = Part(-2, at * width, (at + 1) * width)
        table[f"{path}/{name}/kernel"] = Origin(inwards, transpose=True, take=part)
    return table


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
            experts=granite_experts(
                hf, getattr(hf, "shared_intermediate_size", 0) if hf.model_type == "granitemoeshared" else 0
            ),
            **granite_scales(hf),
        )

    def experts_origins(self, experts: ExpertsConfig, layer: str) -> dict[str, Origin]:
        table = projections([("mlp/router", self.router, False)], layer)
        table |= joined_mlp("mlp/experts", f"{layer}block_sparse_moe", experts.expert_width)
        if experts.shared_width:
            table |= joined_mlp("mlp/shared", f"{layer}shared_mlp", experts.shared_width)
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
