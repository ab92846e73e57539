"""Gemma 4 without experts and without embeddings by layer."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, activation
from spt_jax.bases.families.gemma import Gemma2
from spt_jax.bases.families.llama import TINY, LlamaLike, layers_of_type, llama_config, whole_rope, windows
from spt_jax.bases.families.rope import rope_config
from spt_jax.bases.families.text_part import TextFamily, TextPart
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig, Variant
from spt_jax.models.rope import RopeConfig


class Gemma4Text(LlamaLike):
    """Gemma 4 31B: layers without a window have heads of another size, whose values can be their keys."""

    model_type: ClassVar[str] = "gemma4_text"
    architecture: ClassVar[str] = "Gemma4ForCausalLM"
    norms: ClassVar[Mapping[str, str]] = Gemma2.norms

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        for option in ("hidden_size_per_layer_input", "num_kv_shared_layers", "enable_moe_block"):
            if getattr(hf, option):
                raise ConfigError(f"{hf.model_type} with {option} is not supported")
        if hf.use_bidirectional_attention == "all":
            raise ConfigError(f"{hf.model_type} with use_bidirectional_attention 'all' is not supported")
        full = layers_of_type(hf, "full_attention")
        of_full = _config_of_layers(hf, full)
        of_sliding = _config_of_layers(hf, layers_of_type(hf, "sliding_attention") or full)
        variant = Variant(
            name="full",
            layers=full,
            head_size=of_full.head_dim,
            kv_heads=of_full.num_key_value_heads,
            rope=_full_rope(hf, max_length),
            value_is_key=bool(hf.attention_k_eq_v),
        )
        return llama_config(
            of_sliding,
            max_length,
            activation=activation(hf.hidden_activation),
            qkv_bias=bool(hf.attention_bias),
            output_bias=bool(hf.attention_bias),
            norm_place="around",
            qk_norm="head",
            value_norm=True,
            rope=whole_rope(hf, max_length, layer_type="sliding_attention"),
            embedding_scale=hf.hidden_size**0.5,
            score_scale=1.0,
            layer_scale=True,
            logit_cap=hf.final_logit_softcapping,
            variants=(variant,),
            **windows(hf),
        )

    def layer_origins(self, config: DecoderConfig) -> dict[str, Origin]:
        return {**super().layer_origins(config), "scale": Origin("model.layers.{i}.layer_scalar")}

    def tiny(self) -> Mapping[str, Any]:
        return {
            **TINY,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.5,
                    "rope_theta": 1_000.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": True,
        }


class Gemma4(TextPart):
    """The language model of Gemma 4 31B."""

    model_type: ClassVar[str] = "gemma4"
    architecture: ClassVar[str] = "Gemma4ForConditionalGeneration"
    prefix: ClassVar[str] = "model.language_model."
    texts: ClassVar[tuple[TextFamily, ...]] = (Gemma4Text(),)

    def tiny(self) -> Mapping[str, Any]:
        # transformers looks the embeddings of these ids up, so that they must be in the vocabulary.
        ids = dict.fromkeys(("image_token_id", "video_token_id", "audio_token_id"), 1)
        return {**super().tiny(), **ids, "vision_config": None}


def _config_of_layers(hf: Any, layers: tuple[int, ...]) -> Any:
    """Returns the config of one of these layers, whose heads must have the same sizes in all of them."""
    configs = [hf.per_layer_config[layer] for layer in layers]
    sizes = {(config.head_dim, config.num_key_value_heads) for config in configs}
    if len(sizes) > 1:
        raise ConfigError(
            f"{hf.model_type} with different heads in layers of one type is not supported: {sorted(sizes)}"
        )
    return configs[0]


def _full_rope(hf: Any, max_length: int | None) -> RopeConfig:
    rope = rope_config(hf, max_length, layer_type="full_attention")
    return rope if rope.kind == "proportional" else whole_rope(hf, max_length, layer_type="full_attention")
