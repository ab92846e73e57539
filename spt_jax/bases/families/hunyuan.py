"""Hunyuan without experts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig


class HunYuanDense(LlamaLike):
    """Hunyuan 0.5B to 7B: queries and keys are normalized after RoPE, whose theta can be stretched by a factor."""

    model_type: ClassVar[str] = "hunyuan_v1_dense"
    architecture: ClassVar[str] = "HunYuanDenseV1ForCausalLM"
    qk_norms: ClassVar[tuple[str, str]] = ("query_layernorm", "key_layernorm")

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        bias = bool(hf.attention_bias)
        config = llama_config(hf, max_length, qk_norm="head", qk_norm_after_rope=True, qkv_bias=bias, output_bias=bias)
        alpha, rope = hf.rope_parameters.get("alpha"), config.rope
        if rope is None or rope.kind != "dynamic" or not alpha:
            return config
        # Called "dynamic" in these configs, but the frequencies do not depend on the length.
        size = config.head_size
        if not 0 < alpha < math.inf or size < 4:
            raise ConfigError(
                f"rope_parameters: alpha is {alpha}, for heads of size {size}; it must be a number above 0"
            )
        theta = rope.theta * alpha ** (size / (size - 2))
        static = dataclasses.replace(rope, kind="default", theta=theta, factor=1.0, dynamic_length=0)
        return dataclasses.replace(config, rope=static, max_positions=hf.max_position_embeddings)

    def tiny(self) -> Mapping[str, Any]:
        return {
            **TINY,
            "head_dim": 12,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 1.0, "alpha": 50.0},
        }
