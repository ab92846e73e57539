"""Llama, and what the families that derive from it share with it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import OUTPUT_KEY, Origin, activation, by_stack, projections
from spt_jax.bases.families.rope import rope_config
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig

TINY: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


class LlamaLike:
    """Base class of families with Llama's tensor names: RMS norms before each half, RoPE and a gated MLP."""

    prefix: ClassVar[str] = "model."

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin | tuple[Origin, ...]]:
        table: dict[str, Origin | tuple[Origin, ...]] = {
            "embedding": Origin("model.embed_tokens.weight"),
            "final_norm/scale": Origin("model.norm.weight"),
            **by_stack(config, self.layer_origins),
        }
        if not config.tied:
            table["output"] = Origin(OUTPUT_KEY, transpose=True)
        return table

    def layer_origins(self, config: DecoderConfig) -> dict[str, Origin]:
        """Returns where the parameters of a layer with this config are stored, by their paths in the layer."""
        layer = "model.layers.{i}."
        table = {
            "attention_norm/scale": Origin(layer + "input_layernorm.weight"),
            "mlp_norm/scale": Origin(layer + "post_attention_layernorm.weight"),
            **projections(
                [
                    ("attention/query", "self_attn.q_proj", config.qkv_bias),
                    ("attention/key", "self_attn.k_proj", config.qkv_bias),
                    ("attention/value", "self_attn.v_proj", config.qkv_bias),
                    ("attention/output", "self_attn.o_proj", config.output_bias),
                    ("mlp/gate", "mlp.gate_proj", config.mlp_bias),
                    ("mlp/up", "mlp.up_proj", config.mlp_bias),
                    ("mlp/down", "mlp.down_proj", config.mlp_bias),
                ],
                layer,
            ),
        }
        if config.qk_norm != "none":
            table["attention/query_norm/scale"] = Origin(layer + "self_attn.q_norm.weight")
            table["attention/key_norm/scale"] = Origin(layer + "self_attn.k_norm.weight")
        return table


class Llama(LlamaLike):
    """Llama 1 to 3 (Touvron et al. 2023, arXiv 2302.13971)."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return llama_config(
            hf,
            max_length,
            qkv_bias=bool(hf.attention_bias),
            output_bias=bool(hf.attention_bias),
            mlp_bias=bool(hf.mlp_bias),
        )

    def tiny(self) -> Mapping[str, Any]:
        return TINY


def llama_config(hf: Any, max_length: int | None, **changes: Any) -> DecoderConfig:
    """The decoder of a config with Llama's field names; `changes` are the fields in which a family differs.

    Raises:
      ConfigError: for a partial rotary embedding, unless the family sets `rope`: Llama's does not have it.
    """
    rope = changes.get("rope") or rope_config(hf, max_length)
    if "rope" not in changes and rope.kind != "proportional" and rope.fraction != 1:
        raise ConfigError(f"partial rotary embeddings are not supported for {hf.model_type!r}")
    fields = {
        "family": hf.model_type,
        "vocab_size": hf.vocab_size,
        "width": hf.hidden_size,
        "layers": hf.num_hidden_layers,
        "heads": hf.num_attention_heads,
        "kv_heads": hf.num_key_value_heads or hf.num_attention_heads,
        "head_size": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "mlp_width": hf.intermediate_size,
        "max_positions": max(hf.max_position_embeddings, rope.dynamic_length),
        "norm_epsilon": float(hf.rms_norm_eps),
        "tied": bool(hf.tie_word_embeddings),
        "rope": rope,
    }
    if "activation" not in changes:
        fields["activation"] = activation(hf.hidden_act)
    return DecoderConfig(**{**fields, **changes})


def windows(hf: Any) -> dict[str, Any]:
    """The fields of the sliding window and its layers, from `sliding_window` and `layer_types`.

    Raises:
      ConfigError: for a type of layer that is neither full nor sliding attention.
    """
    window = hf.sliding_window or 0
    if not window:
        return {}
    unknown = set(hf.layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(f"layer types {sorted(unknown)} are not supported")
    sliding = tuple(i for i, kind in enumerate(hf.layer_types) if kind == "sliding_attention")
    return {"window": window, "window_layers": sliding}
