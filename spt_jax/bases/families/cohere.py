"""Cohere's Command R and Aya."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, layers_of_type, llama_config, whole_rope, windows
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig

_TINY = {**{name: value for name, value in TINY.items() if name != "rms_norm_eps"}, "tie_word_embeddings": True}


class Cohere(LlamaLike):
    """Command R and Aya 23: attention and MLP read one LayerNorm, RoPE turns neighbours, and logits are scaled."""

    model_type: ClassVar[str] = "cohere"
    architecture: ClassVar[str] = "CohereForCausalLM"
    norms: ClassVar[Mapping[str, str]] = {"attention_norm": "input_layernorm"}

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(hf, max_length, qk_norm="heads" if hf.use_qk_norm else "none", **_fields(hf, max_length))

    def tiny(self) -> Mapping[str, Any]:
        return {**_TINY, "use_qk_norm": True, "logit_scale": 0.6}


class Cohere2(Cohere):
    """Command R7B and Command A: most layers have a sliding window, the others no RoPE."""

    model_type: ClassVar[str] = "cohere2"
    architecture: ClassVar[str] = "Cohere2ForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        full = layers_of_type(hf, "full_attention")
        return llama_config(hf, max_length, no_rope_layers=full, **windows(hf), **_fields(hf, max_length))

    def tiny(self) -> Mapping[str, Any]:
        return {**_TINY, "num_hidden_layers": 4, "sliding_window": 7, "logit_scale": 0.6}


def _fields(hf: Any, max_length: int | None) -> dict[str, Any]:
    """Returns what both have."""
    if not hf.logit_scale:
        raise ConfigError(f"{hf.model_type} without a logit_scale is not supported")
    return {
        "norm": "layer",
        "norm_epsilon": float(hf.layer_norm_eps),
        "norm_bias": False,
        "parallel": True,
        "shared_norm": True,
        "rope": whole_rope(hf, max_length, interleaved=True),
        "qkv_bias": bool(hf.attention_bias),
        "output_bias": bool(hf.attention_bias),
        "logit_scale": float(hf.logit_scale),
    }
