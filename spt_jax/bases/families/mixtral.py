"""Mixtral."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.experts import WithExperts, check_swiglu
from spt_jax.bases.families.llama import TINY, llama_config
from spt_jax.models.config import DecoderConfig
from spt_jax.models.experts_config import ExpertsConfig


class Mixtral(WithExperts):
    """Mixtral 8x7B and 8x22B (Jiang et al. 2024, arXiv 2401.04088): Mistral with experts in every layer.

    `router_jitter_noise` is noise during the training of the base, and has no effect on a frozen one.
    """

    model_type: ClassVar[str] = "mixtral"
    architecture: ClassVar[str] = "MixtralForCausalLM"
    router: ClassVar[str] = "block_sparse_moe.gate"
    experts: ClassVar[str] = "block_sparse_moe.experts."
    projections: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        check_swiglu(hf)
        window = hf.sliding_window or 0
        return llama_config(
            hf,
            max_length,
            window=window,
            window_layers=tuple(range(hf.num_hidden_layers)) if window else (),
            experts=ExpertsConfig(
                experts=hf.num_local_experts,
                top_k=hf.num_experts_per_tok,
                expert_width=hf.intermediate_size,
                renormalize=True,
            ),
        )

    def tiny(self) -> Mapping[str, Any]:
        sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "num_hidden_layers": 2}
        return {**TINY, **sizes, "sliding_window": 9}
