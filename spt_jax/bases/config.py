"""Reads `config.json` into the config of a decoder or an encoder-decoder."""

from collections.abc import Mapping
from typing import Any

from spt_jax.bases.families import family_of
from spt_jax.bases.quantized_files import file_quantization
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.model_config import ModelConfig
from spt_jax.runtime.hf_library import import_transformers

# Fields of config.json that sizes are made of, and the least and largest values that any decoder has. transformers and
# this library make lists as long as the model has layers, so that these are checked before either reads the rest.
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), (1, 10_000)),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), (1, 10_000)),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), (1, 1 << 16)),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), (1, 1 << 24)),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "n_embed", "word_embed_proj_dim", "embedding_size", "dim", "d_model"), (1, 1 << 20)
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_global_key_value_heads"), (1, 1 << 16)
    ),
    **dict.fromkeys(("num_heads", "num_kv_heads", "d_kv"), (1, 1 << 16)),
    **dict.fromkeys(("head_dim", "global_head_dim", "query_pre_attn_scalar", "rotary_dim"), (1, 1 << 16)),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim", "d_ff"), (1, 1 << 24)),
    "vocab_size": (1, 1 << 28),
    "type_vocab_size": (0, 1 << 16),
    "local_attention": (2, 1 << 30),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "original_max_position_embeddings"), (1, 1 << 30)),
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), (1, 1 << 16)),
    **dict.fromkeys(("sliding_window", "max_window_layers"), (0, 1 << 30)),
    **dict.fromkeys(("seq_length", "window_size"), (1, 1 << 30)),
    **dict.fromkeys(("no_rope_layer_interval", "full_attention_interval", "decoder_sparse_step"), (1, 10_000)),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), (1, 1 << 16)),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"), (1, 1 << 16)),
    **dict.fromkeys(("mamba_n_heads", "mamba_n_groups", "mamba_d_head", "mamba_d_conv", "mamba_expand"), (1, 1 << 16)),
    **dict.fromkeys(("mamba_d_ssm", "mamba_d_state"), (1, 1 << 24)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), (0, 1 << 16)),
    **dict.fromkeys(("n_group", "topk_group"), (1, 1 << 16)),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), (0, 1 << 24)),
    **dict.fromkeys(("hidden_size_per_layer_input", "top_k_experts"), (0, 1 << 16)),
    "vocab_size_per_layer_input": (1, 1 << 28),
    "num_kv_shared_layers": (0, 10_000),
    "shared_intermediate_size": (0, 1 << 24),
    "n_shared_experts": (0, 1 << 10),
    "first_k_dense_replace": (0, 10_000),
}
# What transformers builds for classifiers (a name for each of `num_labels`), code that it would ask to run, and the
# configs of parts that are not loaded.
_UNREAD = ("num_labels", "id2label", "label2id", "auto_map", "vision_config", "audio_config")
# The config of the language model inside a model that also reads images, and those of the sides of T5Gemma.
_INNER = ("text_config", "encoder", "decoder")


def hf_config(fields: Mapping[str, Any]) -> Any:
    """The transformers config object of a `config.json`, whose sizes are checked first.

    Raises:
      ConfigError: the architecture is not supported, or a size is not an integer in its range.
      Exception: whatever transformers raises for other fields that are wrong.
    """
    transformers = import_transformers()
    model_type = str(fields.get("model_type"))
    family_of(model_type)
    return transformers.CONFIG_MAPPING[model_type].from_dict(_checked(_with_floats(fields)))


def _with_floats(value: Any) -> Any:
    """Replaces {"__float__": "Infinity"}, as transformers writes numbers that JSON does not have, by the number."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {name: _with_floats(own) for name, own in value.items()}
    return [_with_floats(own) for own in value] if isinstance(value, list) else value


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Checks sizes, those of the inner language model among them, and leaves out what is not read."""
    for name, (least, most) in _SIZES.items():
        value = fields.get(name)
        if name == "mamba_d_head" and value == "auto":  # transformers computes it.
            continue
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise ConfigError(f"{name!r} is {value!r:.40}; it must be an integer from {least} to {most:,}")
    _check_repeats(fields.get("attention_types"))
    kept = {name: value for name, value in fields.items() if name not in _UNREAD}
    return kept | {name: _checked(kept[name]) for name in _INNER if isinstance(kept.get(name), Mapping)}


def _check_repeats(types: Any) -> None:
    """Checks `attention_types` of GPT-Neo, [[kinds, repeats], ...], of which transformers makes a list of layers.

    Raises:
      ConfigError: the list would be longer than that of any decoder, or is not one of such pairs.
    """
    if types is None:
        return
    most = _SIZES["num_layers"][1]
    pairs = [pair for pair in types if isinstance(pair, list) and len(pair) == 2] if isinstance(types, list) else []
    if any(not isinstance(kinds, list) or type(count) is not int or count < 0 for kinds, count in pairs):
        pairs = []
    if not pairs or len(pairs) != len(types) or sum(len(kinds) * count for kinds, count in pairs) > most:
        raise ConfigError(
            f"'attention_types' is {types!r:.60}; it must be a list of pairs of a list and a number, for at most"
            f" {most:,} layers"
        )


def decoder_config(hf: Any, *, max_length: int | None = None) -> DecoderConfig:
    """Reads a transformers config object of a model with one side; see `model_config`.

    Raises:
      ConfigError: as in `model_config`, and for an encoder-decoder.
    """
    config = model_config(hf, max_length=max_length)
    if not isinstance(config, DecoderConfig):
        raise ConfigError(f"{config.family} is an encoder-decoder, and not a decoder")
    return config


def model_config(hf: Any, *, max_length: int | None = None) -> ModelConfig:
    """Reads a transformers config object.

    Args:
      hf: what `transformers.AutoConfig.from_pretrained` returned.
      max_length: the longest sequence of the run; only `dynamic` RoPE depends on it (transformers itself changes its
        frequencies with the longest sequence seen so far, which a compiled program cannot).

    Raises:
      ConfigError: for an architecture or an option of one that this library does not have.
    """
    family = family_of(hf.model_type)
    file_quantization(getattr(hf, "quantization_config", None))
    return family.config(hf, max_length)
