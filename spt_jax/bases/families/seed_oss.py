"""Seed-OSS."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config
from spt_jax.models.config import DecoderConfig


class SeedOss(LlamaLike):
    """Seed-OSS 36B: Llama with biases of queries, keys and values, and heads of their own size."""

    model_type: ClassVar[str] = "seed_oss"
    architecture: ClassVar[str] = "SeedOssForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(
            hf,
            max_length,
            qkv_bias=bool(hf.attention_bias),
            output_bias=bool(hf.attention_out_bias),
            mlp_bias=bool(hf.mlp_bias),
        )

    def tiny(self) -> Mapping[str, Any]:
        return {**TINY, "head_dim": 12}
