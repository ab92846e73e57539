"""Llama, and what the families that derive from it share with it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import (
    OUTPUT_KEY,
    Origin,
    activation,
    by_stack,
    joined_projection,
    projections,
)
from spt_jax.bases.families.rope import rope_config
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.rope import RopeConfig

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
    """Base class of families with Llama's tensor names: RMS norms before each half, RoPE and a gated MLP.

    Attributes:
      norms: names of the modules of a layer's norms, by ours.
      qk_norms: names of the norms of queries and keys.
      fused_qkv: name of the module that holds queries, keys and values, in this order; None if each has its own.
      fused_mlp: name of the module that holds the gate and the up projection; None if each has its own.
    """

    prefix: ClassVar[str] = "model."
    norms: ClassVar[Mapping[str, str]] = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    qk_norms: ClassVar[tuple[str, str]] = ("q_norm", "k_norm")
    fused_qkv: ClassVar[str | None] = None
    fused_mlp: ClassVar[str | None] = None

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin | tuple[Origin, ...]]:
        table: dict[str, Origin | tuple[Origin, ...]] = {
            "embedding": Origin("model.embed_tokens.weight"),
            **by_stack(config, self.layer_origins),
        }
        if config.norm_scale:
            table["final_norm/scale"] = Origin("model.norm.weight")
        if not config.tied:
            table["output"] = Origin(OUTPUT_KEY, transpose=True)
        return table

    def layer_origins(self, config: DecoderConfig) -> dict[str, Origin]:
        """Returns where the parameters of a layer with this config are stored, by their paths in the layer."""
        layer = "model.layers.{i}."
        table = {
            **self._projections(config, layer),
            **projections([("attention/output", "self_attn.o_proj", config.output_bias)], layer),
            **projections([("mlp/down", "mlp.down_proj", config.mlp_bias)], layer),
        }
        if config.norm_scale:
            table |= {f"{ours}/scale": Origin(f"{layer}{theirs}.weight") for ours, theirs in self.norms.items()}
        if config.qk_norm != "none":
            for ours, theirs in zip(("query", "key"), self.qk_norms, strict=True):
                table[f"attention/{ours}_norm/scale"] = Origin(f"{layer}self_attn.{theirs}.weight")
        return table

    def _projections(self, config: DecoderConfig, layer: str) -> dict[str, Origin]:
        """Returns the origins of the linear maps that some families join."""
        qkv = ("attention/query", "attention/key", "attention/value")
        if self.fused_qkv is None:
            names = zip(qkv, ("q_proj", "k_proj", "v_proj"), strict=True)
            own = [(ours, f"self_attn.{theirs}", config.qkv_bias) for ours, theirs in names]
            table = projections(own[:2] if config.value_is_key else own, layer)
        else:
            sizes = [heads * config.head_size for heads in (config.heads, config.kv_heads, config.kv_heads)]
            table = joined_projection(zip(qkv, sizes, strict=True), f"{layer}{self.fused_qkv}", config.qkv_bias)
        mlp = ("mlp/gate", "mlp/up") if config.gated_mlp else ("mlp/up",)
        if self.fused_mlp is None:
            names = [(ours, f"{ours.replace('/', '.')}_proj", config.mlp_bias) for ours in mlp]
            return table | projections(names, layer)
        sizes = [config.mlp_width] * len(mlp)
        return table | joined_projection(zip(mlp, sizes, strict=True), f"{layer}{self.fused_mlp}", config.mlp_bias)


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
      ConfigError: for an option that the decoder does not have; unless `changes` has a `rope`, as for `whole_rope`.
    """
    rope = changes["rope"] if "rope" in changes else whole_rope(hf, max_length)
    positions = max(hf.max_position_embeddings, rope.dynamic_length if rope is not None else 0)
    if rope is not None and rope.kind == "longrope" and rope.dynamic_length <= rope.original_max_positions:
        positions = rope.original_max_positions  # Longer sequences have other frequencies.
    fields = {
        "family": hf.model_type,
        "vocab_size": hf.vocab_size,
        "width": hf.hidden_size,
        "layers": hf.num_hidden_layers,
        "heads": hf.num_attention_heads,
        "kv_heads": hf.num_key_value_heads or hf.num_attention_heads,
        "head_size": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "max_positions": positions,
        "tied": bool(hf.tie_word_embeddings),
        "rope": rope,
    }
    if "mlp_width" not in changes:
        fields["mlp_width"] = hf.intermediate_size
    if "norm_epsilon" not in changes:
        fields["norm_epsilon"] = float(hf.rms_norm_eps)
    if "activation" not in changes:
        fields["activation"] = activation(hf.hidden_act)
    return DecoderConfig(**{**fields, **changes})


def windows(hf: Any) -> dict[str, Any]:
    """The fields of the sliding window and its layers, from `sliding_window` and `layer_types`.

    Raises:
      ConfigError: for a type of layer that is neither full nor sliding attention, and for sliding attention without a
        window.
    """
    unknown = set(hf.layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(f"layer types {sorted(unknown)} are not supported")
    sliding = layers_of_type(hf, "sliding_attention")
    if not sliding:
        return {}
    if not hf.sliding_window:
        raise ConfigError("layer_types has sliding attention, but sliding_window is not set")
    return {"window": hf.sliding_window, "window_layers": sliding}


def window_of_all(hf: Any) -> dict[str, Any]:
    """The fields of the sliding window, from `sliding_window`, for families that have it in every layer."""
    return (
        {"window": hf.sliding_window, "window_layers": tuple(range(hf.num_hidden_layers))} if hf.sliding_window else {}
    )


def layers_of_type(hf: Any, kind: str) -> tuple[int, ...]:
    """The layers of one kind in `layer_types`."""
    return tuple(i for i, of_layer in enumerate(hf.layer_types) if of_layer == kind)


def whole_rope(
    hf: Any, max_length: int | None, *, layer_type: str | None = None, interleaved: bool = False
) -> RopeConfig:
    """The RoPE of a family that rotates whole heads and does not scale queries, as `rope_config` returns it.

    Raises:
      ConfigError: as for `rope_config`, and for these two options.
    """
    rope = rope_config(hf, max_length, layer_type=layer_type, interleaved=interleaved)
    if rope.fraction != 1:
        raise ConfigError(f"partial rotary embeddings (partial_rotary_factor) are not supported for {hf.model_type}")
    if rope.query_beta:
        raise ConfigError(f"rope_parameters: 'llama_4_scaling_beta' is not supported for {hf.model_type}")
    return rope


def ropes_by_type(hf: Any, max_length: int | None) -> dict[str, RopeConfig]:
    """The fields of RoPE for a config with `rope_parameters` by type of layer, from `whole_rope`."""
    ropes = {"rope": whole_rope(hf, max_length, layer_type="full_attention")}
    if "sliding_attention" in hf.layer_types:
        ropes["local_rope"] = whole_rope(hf, max_length, layer_type="sliding_attention")
    return ropes
