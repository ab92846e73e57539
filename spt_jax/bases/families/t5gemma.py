"""T5Gemma and T5Gemma 2."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import OUTPUT_KEY, Origin, activation
from spt_jax.bases.families.llama import ropes_by_type, windows
from spt_jax.bases.families.rope import rope_config
from spt_jax.bases.families.text_part import TINY_VISION
from spt_jax.errors import ConfigError
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.rope import RopeConfig

_HEAD = "lm_head.out_proj.weight"
_TEXT = "model.encoder.text_model."
# The model of images, and copies of the embedding table.
_LEFT_OUT = ("model.encoder.vision_tower.", "model.encoder.multi_modal_projector.", "model.decoder.embed_tokens.")
# What both sides must have in common; `model_type` and the number of layers may differ.
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_activation", "rms_norm_eps", "query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping",
    "rope_parameters", "max_position_embeddings",
)  # fmt: skip
_LINEAR = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj"))


class T5Gemma:
    """T5Gemma (Zhang et al. 2025, arXiv 2504.06225): both sides are Gemma 2, each with an embedding table of its own.

    The sides of 9B-2B have unequal widths, which is not supported.
    """

    model_type: ClassVar[str] = "t5gemma"
    architecture: ClassVar[str] = "T5GemmaForConditionalGeneration"
    prefix: ClassVar[str] = "model."

    def config(self, hf: Any, max_length: int | None) -> EncoderDecoderConfig:
        if not hf.is_encoder_decoder:
            raise ConfigError(f"{self.model_type} with is_encoder_decoder false, an encoder, is not supported")
        rope, reach = rope_config(hf.encoder, max_length), windows(hf.encoder).get("window", 0)
        return self.of_sides(
            hf,
            hf.encoder,
            rope=rope,
            input_scale=hf.decoder.hidden_size**0.5,
            decoder_embedding=True,
            encoder_reach=(reach, reach),  # Both ends, while the decoder's window has one.
            score_cap=hf.decoder.attn_logit_softcapping,
        )

    def of_sides(self, hf: Any, encoder: Any, *, rope: RopeConfig, **changes: Any) -> EncoderDecoderConfig:
        """Returns what T5Gemma and T5Gemma 2 have in common.

        Args:
          hf: the config.
          encoder: that of the encoder's language model.
          rope: the rotary embedding.
          **changes: other fields.

        Raises:
          ConfigError: for sides of unequal sizes, and other options that `EncoderDecoder` does not have.
        """
        name, decoder = self.model_type, hf.decoder
        for field in _SHARED:
            sizes = getattr(encoder, field), getattr(decoder, field)
            if sizes[0] != sizes[1]:
                raise ConfigError(f"{name} whose sides differ in {field}, {sizes[0]} and {sizes[1]}, is not supported")
        if encoder.attention_bias or decoder.attention_bias:
            raise ConfigError(f"{name} with attention_bias is not supported")
        start = getattr(hf, "decoder_start_token_id", None)
        start = decoder.bos_token_id if start is None else start
        if start is None:
            raise ConfigError(f"{name} without decoder_start_token_id and decoder.bos_token_id; set one")
        fields = {
            "family": name,
            "vocab_size": decoder.vocab_size,
            "width": decoder.hidden_size,
            "encoder_layers": encoder.num_hidden_layers,
            "decoder_layers": decoder.num_hidden_layers,
            "heads": decoder.num_attention_heads,
            "kv_heads": decoder.num_key_value_heads,
            "head_size": decoder.head_dim,
            "mlp_width": decoder.intermediate_size,
            "max_positions": max(decoder.max_position_embeddings, rope.dynamic_length),
            "start_id": start,
            "norm_epsilon": float(decoder.rms_norm_eps),
            "norm_offset": 1.0,
            "norm_place": "around",
            "activation": activation(decoder.hidden_activation),
            "gated_mlp": True,
            "score_scale": decoder.query_pre_attn_scalar**-0.5,
            "logit_cap": decoder.final_logit_softcapping,
            "positions": "rope",
            "rope": rope,
            "window": windows(decoder).get("window", 0),
            "encoder_windows": windows(encoder).get("window_layers", ()),
            "decoder_windows": windows(decoder).get("window_layers", ()),
            "tied": bool(hf.tie_word_embeddings),
        }
        return EncoderDecoderConfig(**{**fields, **changes})

    def stored(self, config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
        """Returns the config as it is."""
        if any(name.startswith("score.") for name in names):
            raise ConfigError(
                f"the files hold a {config.family} with a classification head (score.*), which is not supported; use"
                " the model that it was made of, and train a task head (task.name)"
            )
        return config

    def origins(self, config: EncoderDecoderConfig) -> Mapping[str, Origin]:
        found = {
            "embedding": Origin("model.encoder.embed_tokens.weight"),
            "decoder/embedding": Origin("model.decoder.embed_tokens.weight"),
            **_side("encoder", "model.encoder.", config.encoder_layers, {"attention": "self"}),
            **_side(
                "decoder", "model.decoder.", config.decoder_layers, {"attention": "self", "cross_attention": "cross"}
            ),
        }
        return found if config.tied else {**found, "output": Origin(_HEAD, transpose=True)}

    def canonical(self, name: str, config: EncoderDecoderConfig) -> str | None:
        """Adds what files without the output matrix lack.

        A stored output matrix that is tied gets the name that it has in other families, by which it is compared with
        the embedding table.
        """
        if name == _HEAD:
            return OUTPUT_KEY if config.tied else _HEAD
        return name if name.startswith(self.prefix) else self.prefix + name

    def tiny(self) -> Mapping[str, Any]:
        side = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 7,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 4.0,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        }
        return {"encoder": {**side, "num_hidden_layers": 3}, "decoder": {**side, "num_hidden_layers": 2}}


class T5Gemma2(T5Gemma):
    """T5Gemma 2 (Zhang et al. 2025, arXiv 2512.14856), without the model of images: both sides are Gemma 3.

    A layer of the decoder attends to its own and the encoder's tokens with one softmax.
    """

    model_type: ClassVar[str] = "t5gemma2"
    architecture: ClassVar[str] = "T5Gemma2ForConditionalGeneration"

    def config(self, hf: Any, max_length: int | None) -> EncoderDecoderConfig:
        encoder = hf.encoder.text_config
        if not hf.tie_word_embeddings:
            raise ConfigError(f"{self.model_type} with tie_word_embeddings false is not supported")
        for side in (encoder, hf.decoder):
            if side.attn_logit_softcapping is not None:
                raise ConfigError(
                    f"{self.model_type} with attn_logit_softcapping is not supported; transformers ignores it"
                )
        window = windows(encoder).get("window", 1)
        return self.of_sides(
            hf,
            encoder,
            **ropes_by_type(encoder, max_length),
            embedding_scale=hf.decoder.hidden_size**0.5,
            encoder_reach=((window + 1) // 2 - 1, window // 2),
            qk_norm=True,
            merged=True,
            own_row_id=hf.encoder.eoi_token_index,
        )

    def origins(self, config: EncoderDecoderConfig) -> Mapping[str, Origin]:
        found = {
            "embedding": Origin(f"{_TEXT}embed_tokens.weight"),
            "own_row": Origin(f"{_TEXT}embed_tokens.eoi_embedding"),
        }
        for side, module, count in (
            ("encoder", _TEXT, config.encoder_layers),
            ("decoder", "model.decoder.", config.decoder_layers),
        ):
            found |= _side(side, module, count, {"attention": "self"})
            for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
                key = f"{module}layers.{{i}}.self_attn.{theirs}.weight"
                found[f"{side}/layers/attention/{ours}/scale"] = Origin(key, layers=tuple(range(count)))
        return found

    def canonical(self, name: str, config: EncoderDecoderConfig) -> str | None:
        """Leaves out the model of images and copies of the embedding table, and adds what files without a head lack."""
        if name == _HEAD:
            return OUTPUT_KEY
        name = name if name.startswith(self.prefix) else self.prefix + name
        return None if name.startswith(_LEFT_OUT) else name

    def tiny(self) -> Mapping[str, Any]:
        sides = super().tiny()
        ropes = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
        changes = {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_parameters": ropes,
            "query_pre_attn_scalar": 80,
        }
        encoder, decoder = (
            {
                **sides[side],
                **changes,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"][:count],
            }
            for side, count in (("encoder", 3), ("decoder", 2))
        )
        vision = {**TINY_VISION, "model_type": "siglip_vision_model"}
        image = {"vision_config": vision, "eoi_token_index": 100, "mm_tokens_per_image": 4}
        return {"encoder": {"text_config": encoder, **image}, "decoder": decoder}


def _side(side: str, module: str, count: int, attentions: Mapping[str, str]) -> dict[str, Origin]:
    layers, layer = tuple(range(count)), f"{module}layers.{{i}}."
    found = {f"{side}/final_norm/scale": Origin(f"{module}norm.weight")}

    def add(path: str, key: str, *, transpose: bool = False) -> None:
        found[f"{side}/layers/{path}"] = Origin(f"{layer}{key}.weight", transpose=transpose, layers=layers)

    for ours, theirs in attentions.items():
        part = ours.removesuffix("_attention")
        add(f"{part}_norm/scale", f"pre_{theirs}_attn_layernorm")
        add(f"{part}_out_norm/scale", f"post_{theirs}_attn_layernorm")
        for name, key in _LINEAR:
            add(f"{ours}/{name}/kernel", f"{theirs}_attn.{key}", transpose=True)
    add("mlp_norm/scale", "pre_feedforward_layernorm")
    add("mlp_out_norm/scale", "post_feedforward_layernorm")
    for name in ("gate", "up", "down"):
        add(f"mlp/{name}/kernel", f"mlp.{name}_proj", transpose=True)
    return found
