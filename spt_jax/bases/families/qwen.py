"""Qwen 2 and 3: Llama with biases, or with norms of queries and keys."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config, windows
from spt_jax.models.config import DecoderConfig


class Qwen2(LlamaLike):
    """Qwen 2 and 2.5 (arXiv 2407.10671): biases of queries, keys and values."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(hf, max_length, qkv_bias=True, **windows(hf))

    def tiny(self) -> Mapping[str, Any]:
        return {**TINY, "tie_word_embeddings": True}


class Qwen3(LlamaLike):
    """Qwen 3 (arXiv 2505.09388): queries and keys of each head are normalized before RoPE."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        bias = bool(hf.attention_bias)
        return llama_config(hf, max_length, qkv_bias=bias, output_bias=bias, qk_norm="head", **windows(hf))

    def tiny(self) -> Mapping[str, Any]:
        return {**TINY, "head_dim": 12, "tie_word_embeddings": True}
