"""Arcee's AFM."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config
from spt_jax.models.config import DecoderConfig


class Arcee(LlamaLike):
    """AFM 4.5B: Llama whose MLP has no gate and squares its ReLU."""

    model_type: ClassVar[str] = "arcee"
    architecture: ClassVar[str] = "ArceeForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        bias = bool(hf.attention_bias)
        return llama_config(
            hf, max_length, gated_mlp=False, qkv_bias=bias, output_bias=bias, mlp_bias=bool(hf.mlp_bias)
        )

    def tiny(self) -> Mapping[str, Any]:
        return TINY
