"""Gemma 2."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, activation
from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config, windows
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig


class Gemma2(LlamaLike):
    """Gemma 2 (arXiv 2408.00118): norms before and after each half of a layer, scaled embeddings, capped logits."""

    model_type: ClassVar[str] = "gemma2"
    architecture: ClassVar[str] = "Gemma2ForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        if getattr(hf, "use_bidirectional_attention", None):
            raise ConfigError("Gemma 2 with use_bidirectional_attention is not supported")
        return llama_config(
            hf,
            max_length,
            activation=activation(hf.hidden_activation),
            qkv_bias=bool(hf.attention_bias),
            output_bias=bool(hf.attention_bias),
            norm_place="around",
            norm_offset=1.0,
            embedding_scale=hf.hidden_size**0.5,
            score_scale=hf.query_pre_attn_scalar**-0.5,
            score_cap=hf.attn_logit_softcapping,
            logit_cap=hf.final_logit_softcapping,
            **windows(hf),
        )

    def layer_origins(self, config: DecoderConfig) -> dict[str, Origin]:
        layer = "model.layers.{i}."
        return {
            **super().layer_origins(config),
            "attention_out_norm/scale": Origin(layer + "post_attention_layernorm.weight"),
            "mlp_norm/scale": Origin(layer + "pre_feedforward_layernorm.weight"),
            "mlp_out_norm/scale": Origin(layer + "post_feedforward_layernorm.weight"),
        }

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
