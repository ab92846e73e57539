"""Gemma 1 to 3."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import activation
from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config, ropes_by_type, windows
from spt_jax.bases.families.text_part import TextFamily, TextPart
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig


def _fields(hf: Any) -> dict[str, Any]:
    """Returns what all of these families have: norms with an offset of 1, and embeddings scaled by the table."""
    if getattr(hf, "use_bidirectional_attention", None) and hf.model_type != "gemma3_text":
        raise ConfigError(f"{hf.model_type} with use_bidirectional_attention is not supported")
    return {
        "qkv_bias": bool(hf.attention_bias),
        "output_bias": bool(hf.attention_bias),
        "norm_offset": 1.0,
        "embedding_scale": hf.hidden_size**0.5,
    }


def _fields_of_2(hf: Any) -> dict[str, Any]:
    """Returns what Gemma 2 and 3 have: norms before and after each half of a layer, windows and soft caps."""
    return {
        **_fields(hf),
        "activation": activation(hf.hidden_activation),
        "norm_place": "around",
        "score_scale": hf.query_pre_attn_scalar**-0.5,
        "score_cap": hf.attn_logit_softcapping,
        "logit_cap": hf.final_logit_softcapping,
        **windows(hf),
    }


class Gemma(LlamaLike):
    """Gemma 1 (arXiv 2403.08295): heads of their own size, a GELU gate, and scaled embeddings."""

    model_type: ClassVar[str] = "gemma"
    architecture: ClassVar[str] = "GemmaForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(hf, max_length, **_fields(hf))

    def tiny(self) -> Mapping[str, Any]:
        return {**TINY, "head_dim": 12, "tie_word_embeddings": True}


class Gemma2(LlamaLike):
    """Gemma 2 (arXiv 2408.00118): norms before and after each half of a layer, scaled embeddings, capped logits."""

    model_type: ClassVar[str] = "gemma2"
    architecture: ClassVar[str] = "Gemma2ForCausalLM"
    norms: ClassVar[Mapping[str, str]] = {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(hf, max_length, **_fields_of_2(hf))

    def tiny(self) -> Mapping[str, Any]:
        return {
            **TINY,
            "num_hidden_layers": 4,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 7,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": True,
        }


class Gemma3Text(Gemma2):
    """Gemma 3 270M and 1B (arXiv 2503.19786): norms of queries and keys, and another RoPE in layers with a window.

    EmbeddingGemma (arXiv 2509.20354) is this model as an encoder.
    """

    model_type: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        if hf.attn_logit_softcapping is not None:
            raise ConfigError(f"{hf.model_type} with attn_logit_softcapping is not supported; transformers ignores it")
        encoder = {}
        if hf.use_bidirectional_attention:
            # transformers itself makes of the window in config.json the part on one side, with the token itself.
            bare = "Gemma3TextModel" in (hf.architectures or ())
            encoder = {"causal": False, "pooling": "mean", "output_head": "none" if bare else "matrix"}
        fields = {**_fields_of_2(hf), **ropes_by_type(hf, max_length), **encoder}
        return llama_config(hf, max_length, qk_norm="head", **fields)

    def tiny(self) -> Mapping[str, Any]:
        return {
            **TINY,
            "num_hidden_layers": 4,
            "head_dim": 12,
            "query_pre_attn_scalar": 80,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "tie_word_embeddings": True,
        }


class Gemma3(TextPart):
    """The language model of Gemma 3 4B to 27B."""

    model_type: ClassVar[str] = "gemma3"
    architecture: ClassVar[str] = "Gemma3ForConditionalGeneration"
    texts: ClassVar[tuple[TextFamily, ...]] = (Gemma3Text(),)

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        if hf.text_config.final_logit_softcapping is not None:
            raise ConfigError("gemma3 with final_logit_softcapping is not supported; transformers ignores it there")
        return super().config(hf, max_length)
