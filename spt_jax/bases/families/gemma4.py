"""Gemma 4: dense, with embeddings by layer, and with experts."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, Part, activation, projections, with_prefix
from spt_jax.bases.families.gemma import Gemma2
from spt_jax.bases.families.llama import TINY, LlamaLike, layers_of_type, llama_config, whole_rope, windows
from spt_jax.bases.families.rope import rope_config
from spt_jax.bases.families.text_part import TextFamily, TextPart
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig, layer_configs
from spt_jax.models.experts_config import ExpertsConfig
from spt_jax.models.per_layer_config import PerLayerConfig
from spt_jax.models.rope import RopeConfig
from spt_jax.models.variant import Variant

_KEYS_VALUES = re.compile(r"\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.")


class Gemma4Text(LlamaLike):
    """Gemma 4: layers without a window have heads of another size, whose values can be their keys.

    In E2B and E4B, each layer has embeddings of its own, and the last layers read the keys and values of earlier ones.
    In 26B-A4B, experts are beside the MLP. Virtual tokens take padding's row of the embeddings by layer.
    """

    model_type: ClassVar[str] = "gemma4_text"
    architecture: ClassVar[str] = "Gemma4ForCausalLM"
    norms: ClassVar[Mapping[str, str]] = Gemma2.norms

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        if hf.use_bidirectional_attention == "all":
            raise ConfigError(f"{hf.model_type} with use_bidirectional_attention 'all' is not supported")
        full = layers_of_type(hf, "full_attention")
        of_full = _config_of_layers(hf, full)
        of_sliding = _config_of_layers(hf, layers_of_type(hf, "sliding_attention") or full)
        experts = _experts(hf)
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
            experts=experts,
            experts_beside_mlp=experts is not None,
            per_layer=_per_layer(hf),
            variants=(variant, *_reading_variants(hf)),
            **windows(hf),
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin | tuple[Origin, ...]]:
        table = dict(super().origins(config))
        if config.per_layer is not None:
            table["per_layer/embedding"] = Origin("model.embed_tokens_per_layer.weight")
            table |= projections([("per_layer/projection", "per_layer_model_projection", False)], "model.")
            table["per_layer/norm/scale"] = Origin("model.per_layer_projection_norm.weight")
        return table

    def layer_origins(self, config: DecoderConfig) -> dict[str, Origin]:
        layer = "model.layers.{i}."
        table = {**super().layer_origins(config), "scale": Origin(f"{layer}layer_scalar")}
        if config.kv_source is not None:
            table = {path: origin for path, origin in table.items() if not path.startswith(_OWN_KEYS_VALUES)}
        if config.experts is not None:
            table |= _experts_origins(config.experts, layer)
        if config.per_layer is not None:
            maps = [("gate", "per_layer_input_gate"), ("down", "per_layer_projection")]
            table |= projections([(f"per_layer/{ours}", theirs, False) for ours, theirs in maps], layer)
            table["per_layer/norm/scale"] = Origin(f"{layer}post_per_layer_input_norm.weight")
        return table

    def canonical(self, name: str, config: DecoderConfig) -> str | None:
        """Returns the name in the table of a stored tensor; None for keys and values of layers that read others'."""
        name = with_prefix(name, self.prefix)
        return None if _unread(name, config) else name

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


_OWN_KEYS_VALUES = ("attention/key", "attention/value")


class Gemma4(TextPart):
    """The language model of Gemma 4."""

    model_type: ClassVar[str] = "gemma4"
    architecture: ClassVar[str] = "Gemma4ForConditionalGeneration"
    prefix: ClassVar[str] = "model.language_model."
    texts: ClassVar[tuple[TextFamily, ...]] = (Gemma4Text(),)

    def canonical(self, name: str, config: DecoderConfig) -> str | None:
        found = super().canonical(name, config)
        return None if found is None or _unread(found, config) else found

    def tiny(self) -> Mapping[str, Any]:
        # transformers looks the embeddings of these ids up, so that they must be in the vocabulary.
        ids = dict.fromkeys(("image_token_id", "video_token_id", "audio_token_id"), 1)
        return {**super().tiny(), **ids, "vision_config": None}


class Gemma4UnifiedText(Gemma4Text):
    """Gemma 4 12B: as Gemma 4, without experts and embeddings by layer."""

    model_type: ClassVar[str] = "gemma4_unified_text"
    architecture: ClassVar[str] = "Gemma4UnifiedForCausalLM"

    def tiny(self) -> Mapping[str, Any]:
        return {name: value for name, value in super().tiny().items() if name != "hidden_size_per_layer_input"}


class Gemma4Unified(Gemma4):
    """The language model of Gemma 4 12B."""

    model_type: ClassVar[str] = "gemma4_unified"
    architecture: ClassVar[str] = "Gemma4UnifiedForConditionalGeneration"
    texts: ClassVar[tuple[TextFamily, ...]] = (Gemma4UnifiedText(),)


def _unread(name: str, config: DecoderConfig) -> bool:
    """Returns whether a tensor is of the keys or values of a layer that reads those of another."""
    found = _KEYS_VALUES.search(name)
    layer = int(found[1]) if found else config.layers
    return layer < config.layers and layer_configs(config)[layer].kv_source is not None


def _experts(hf: Any) -> ExpertsConfig | None:
    """Returns the experts beside the MLP of each layer."""
    if not getattr(hf, "enable_moe_block", False):
        return None
    if activation(hf.hidden_activation) != "gelu_tanh":
        raise ConfigError(
            f"hidden_activation {hf.hidden_activation!r} is not supported for experts of {hf.model_type}; they have"
            " 'gelu_pytorch_tanh'"
        )
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        if not getattr(hf, name):
            raise ConfigError(f"{hf.model_type} with enable_moe_block needs {name}")
    return ExpertsConfig(
        experts=hf.num_experts,
        top_k=hf.top_k_experts,
        expert_width=hf.moe_intermediate_size,
        router_norm_epsilon=float(hf.rms_norm_eps),
        renormalize=True,
        expert_scale=True,
        gate="geglu_tanh",
    )


def _experts_origins(experts: ExpertsConfig, layer: str) -> dict[str, Origin]:
    """Returns the origins of the experts beside the MLP: [E, 2 F, D] for gate and up, and [E, D, F] for down."""
    both, width = f"{layer}experts.gate_up_proj", experts.expert_width
    norms = {
        "dense_out_norm": "post_feedforward_layernorm_1",
        "mixture_norm": "pre_feedforward_layernorm_2",
        "mixture_out_norm": "post_feedforward_layernorm_2",
    }
    return {
        **projections([("mixture/router", "router.proj", False)], layer),
        **{f"{ours}/scale": Origin(f"{layer}{theirs}.weight") for ours, theirs in norms.items()},
        "mixture/router/scale": Origin(f"{layer}router.scale"),
        "mixture/scale": Origin(f"{layer}router.per_expert_scale"),
        "mixture/experts/gate/kernel": Origin(both, transpose=True, take=Part(1, 0, width)),
        "mixture/experts/up/kernel": Origin(both, transpose=True, take=Part(1, width, 2 * width)),
        "mixture/experts/down/kernel": Origin(f"{layer}experts.down_proj", transpose=True),
    }


def _per_layer(hf: Any) -> PerLayerConfig | None:
    """Returns the embeddings by layer; virtual tokens take the row that transformers gives to images: padding's."""
    if not getattr(hf, "hidden_size_per_layer_input", 0):
        return None
    if hf.pad_token_id is None:
        raise ConfigError(f"{hf.model_type} with hidden_size_per_layer_input needs pad_token_id, for virtual tokens")
    return PerLayerConfig(
        width=hf.hidden_size_per_layer_input, vocab_size=hf.vocab_size_per_layer_input, virtual_id=hf.pad_token_id
    )


def _reading_variants(hf: Any) -> tuple[Variant, ...]:
    """Returns the last layers, which read the keys and values of the last earlier layer of their type.

    Raises:
      ConfigError: there is no such layer.
    """
    first = hf.num_hidden_layers - hf.num_kv_shared_layers
    if first == hf.num_hidden_layers:
        return ()
    found = []
    for name, kind in (("reading", "sliding_attention"), ("reading_full", "full_attention")):
        layers = layers_of_type(hf, kind)
        reading = tuple(layer for layer in layers if layer >= first)
        if reading and not layers[: len(layers) - len(reading)]:
            raise ConfigError(
                f"num_kv_shared_layers is {hf.num_kv_shared_layers}, but no layer of type {kind!r} comes before these"
                " layers, whose keys and values they could read"
            )
        if reading:
            width = 2 * hf.intermediate_size if hf.use_double_wide_mlp else None
            source = layers[len(layers) - len(reading) - 1]
            found.append(Variant(name=name, layers=reading, kv_source=source, mlp_width=width))
    return tuple(found)


def _config_of_layers(hf: Any, layers: tuple[int, ...]) -> Any:
    """Returns the config of one of these layers, whose heads must have the same sizes in all of them."""
    configs = [hf.per_layer_config[layer] for layer in layers]
    sizes = {(config.head_dim, config.num_key_value_heads) for config in configs}
    if len(sizes) > 1:
        raise ConfigError(f"layers of one type with different heads are not supported; they have {sorted(sizes)}")
    return configs[0]


def _full_rope(hf: Any, max_length: int | None) -> RopeConfig:
    rope = rope_config(hf, max_length, layer_type="full_attention")
    return rope if rope.kind == "proportional" else whole_rope(hf, max_length, layer_type="full_attention")
