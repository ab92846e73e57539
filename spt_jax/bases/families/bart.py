"""BART and mBART."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import OUTPUT_KEY, Origin, Part, activation
from spt_jax.errors import ConfigError
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig

# The first rows of the tables of positions, which no token uses.
_UNUSED_POSITIONS = 2
_BIAS = "final_logits_bias"
_PREFIX = "model."
# Copies of the embedding table, and numbers without a meaning in files of older libraries.
_LEFT_OUT = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "encoder.version", "decoder.version")
_CLASSIFIER = "classification_head."
_LINEAR = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "out_proj"))
# Options of older versions of the configs. transformers reads none of them, and takes the values of the models that its
# authors released.
_OLD_OPTIONS = {"normalize_embedding": True, "static_position_embeddings": False, "extra_pos_embeddings": 2}


class Bart:
    """BART (Lewis et al. 2020, arXiv 1910.13461): learned positions, biases, and LayerNorms after each addition."""

    model_type: ClassVar[str] = "bart"
    architecture: ClassVar[str] = "BartForConditionalGeneration"
    prefix: ClassVar[str] = _PREFIX
    norms_before: ClassVar[bool] = False

    def config(self, hf: Any, max_length: int | None) -> EncoderDecoderConfig:
        name = self.model_type
        old = {"normalize_before": self.norms_before, "add_final_layer_norm": self.norms_before, **_OLD_OPTIONS}
        for option, value in old.items():
            if getattr(hf, option, value) != value:
                raise ConfigError(f"{name} with {option} {getattr(hf, option)} is not supported; it must be {value}")
        if not hf.is_encoder_decoder or hf.is_decoder:
            raise ConfigError(f"{name} with one side only (is_encoder_decoder false, or is_decoder) is not supported")
        if not hf.tie_word_embeddings:
            raise ConfigError(f"{name} with tie_word_embeddings false is not supported")
        for option in ("attention_heads", "ffn_dim"):
            sizes = [getattr(hf, f"{side}_{option}") for side in ("encoder", "decoder")]
            if sizes[0] != sizes[1]:
                raise ConfigError(f"{name} with sides of unequal {option}, {sizes[0]} and {sizes[1]}, is not supported")
        if hf.d_model % hf.encoder_attention_heads:
            raise ConfigError(f"d_model {hf.d_model} cannot be shared by {hf.encoder_attention_heads} heads evenly")
        if hf.decoder_start_token_id is None:
            raise ConfigError(
                f"{name} without decoder_start_token_id: the decoder needs a first token; set it in config.json to the"
                " id of the language of the answers, such as that of ro_RO, or to that of </s> for mBART-50"
            )
        head_size = hf.d_model // hf.encoder_attention_heads
        return EncoderDecoderConfig(
            family=name,
            vocab_size=hf.vocab_size,
            width=hf.d_model,
            encoder_layers=hf.encoder_layers,
            decoder_layers=hf.decoder_layers,
            heads=hf.encoder_attention_heads,
            head_size=head_size,
            mlp_width=hf.encoder_ffn_dim,
            max_positions=hf.max_position_embeddings,
            start_id=hf.decoder_start_token_id,
            norm="layer",
            norm_epsilon=1e-5,
            norm_place="before" if self.norms_before else "sum",
            final_norm=self.norms_before,
            embedding_norm=True,
            embedding_scale=hf.d_model**0.5 if hf.scale_embedding else None,
            activation=activation(hf.activation_function),
            biases=True,
            logit_bias=True,
            score_scale=head_size**-0.5,
            positions="learned",
            tied=True,
        )

    def stored(self, config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
        """Returns the config with a bias of the logits if the files hold it; transformers takes 0 otherwise."""
        if any(name.startswith(_CLASSIFIER) for name in names):
            raise ConfigError(
                f"the files hold a {config.family} with a classification head ({_CLASSIFIER}*), which is not supported;"
                " use the model that it was made of, and train a task head (task.name)"
            )
        return dataclasses.replace(config, logit_bias=_BIAS in names)

    def origins(self, config: EncoderDecoderConfig) -> Mapping[str, Origin]:
        found = {
            "embedding": Origin(f"{_PREFIX}shared.weight"),
            **_side(config, "encoder", config.encoder_layers, {"attention": "self_attn"}),
            **_side(
                config, "decoder", config.decoder_layers, {"attention": "self_attn", "cross_attention": "encoder_attn"}
            ),
        }
        if config.logit_bias:
            size = config.vocab_size
            found["logit_bias"] = Origin(_BIAS, view=(size,), shape=(1, size))
        return found

    def canonical(self, name: str, config: EncoderDecoderConfig) -> str | None:
        """Adds what files of the model without its output matrix lack, and leaves out copies of the embedding table."""
        own = name.removeprefix(_PREFIX)
        if own in _LEFT_OUT:
            return None
        return own if own in (OUTPUT_KEY, _BIAS) else _PREFIX + own

    def tiny(self) -> Mapping[str, Any]:
        return {
            "d_model": 32,
            "encoder_layers": 3,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 128,
            "decoder_start_token_id": 2,
            "scale_embedding": True,
        }


class MBart(Bart):
    """mBART (Liu et al. 2020, arXiv 2001.08210) and mBART-50: LayerNorms before each half of a layer, and a last one.

    The first token of the decoder, or the one after it, is that of the language of the answers.
    """

    model_type: ClassVar[str] = "mbart"
    architecture: ClassVar[str] = "MBartForConditionalGeneration"
    norms_before: ClassVar[bool] = True


def _side(config: EncoderDecoderConfig, side: str, count: int, attentions: Mapping[str, str]) -> dict[str, Origin]:
    layers = tuple(range(count))
    used = Part(0, _UNUSED_POSITIONS, _UNUSED_POSITIONS + config.max_positions)
    found = {f"{side}/positions": Origin(f"{_PREFIX}{side}.embed_positions.weight", take=used)}

    def norm(path: str, key: str, of_layers: tuple[int, ...] | None = None) -> None:
        for ours, theirs in (("scale", "weight"), ("bias", "bias")):
            found[f"{side}/{path}/{ours}"] = Origin(f"{_PREFIX}{side}.{key}.{theirs}", layers=of_layers)

    def linear(path: str, key: str) -> None:
        stored = f"{_PREFIX}{side}.layers.{{i}}.{key}"
        found[f"{side}/layers/{path}/kernel"] = Origin(f"{stored}.weight", transpose=True, layers=layers)
        found[f"{side}/layers/{path}/bias"] = Origin(f"{stored}.bias", layers=layers)

    norm("embedding_norm", "layernorm_embedding")
    if config.final_norm:
        norm("final_norm", "layer_norm")
    for ours, theirs in attentions.items():
        norm(f"layers/{ours.removesuffix('_attention')}_norm", f"layers.{{i}}.{theirs}_layer_norm", layers)
        for name, key in _LINEAR:
            linear(f"{ours}/{name}", f"{theirs}.{key}")
    norm("layers/mlp_norm", "layers.{i}.final_layer_norm", layers)
    linear("mlp/up", "fc1")
    linear("mlp/down", "fc2")
    return found
