"""T5Gemma."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import OUTPUT_KEY, Origin, activation
from spt_jax.bases.families.llama import windows
from spt_jax.bases.families.rope import rope_config
from spt_jax.errors import ConfigError
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig

_HEAD = "lm_head.out_proj.weight"
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
        encoder, decoder = hf.encoder, hf.decoder
        for name in _SHARED:
            sizes = getattr(encoder, name), getattr(decoder, name)
            if sizes[0] != sizes[1]:
                raise ConfigError(
                    f"{self.model_type} whose sides differ in {name}, {sizes[0]} and {sizes[1]}, is not supported"
                )
        if not hf.is_encoder_decoder:
            raise ConfigError(f"{self.model_type} with is_encoder_decoder false, an encoder, is not supported")
        if encoder.attention_bias or decoder.attention_bias:
            raise ConfigError(f"{self.model_type} with attention_bias is not supported")
        rope, sides = rope_config(encoder, max_length), (windows(encoder), windows(decoder))
        start = getattr(hf, "decoder_start_token_id", None)
        start = decoder.bos_token_id if start is None else start
        if start is None:
            raise ConfigError(f"{self.model_type} without decoder_start_token_id and decoder.bos_token_id; set one")
        return EncoderDecoderConfig(
            family=self.model_type,
            vocab_size=decoder.vocab_size,
            width=decoder.hidden_size,
            encoder_layers=encoder.num_hidden_layers,
            decoder_layers=decoder.num_hidden_layers,
            heads=decoder.num_attention_heads,
            kv_heads=decoder.num_key_value_heads,
            head_size=decoder.head_dim,
            mlp_width=decoder.intermediate_size,
            max_positions=max(decoder.max_position_embeddings, rope.dynamic_length),
            start_id=start,
            norm_epsilon=float(decoder.rms_norm_eps),
            norm_offset=1.0,
            norm_place="around",
            input_scale=decoder.hidden_size**0.5,
            decoder_embedding=True,
            activation=activation(decoder.hidden_activation),
            gated_mlp=True,
            score_scale=decoder.query_pre_attn_scalar**-0.5,
            score_cap=decoder.attn_logit_softcapping,
            logit_cap=decoder.final_logit_softcapping,
            positions="rope",
            rope=rope,
            window=max(side.get("window", 0) for side in sides),
            encoder_windows=sides[0].get("window_layers", ()),
            decoder_windows=sides[1].get("window_layers", ()),
            tied=bool(hf.tie_word_embeddings),
        )

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
            **_side("encoder", config.encoder_layers, {"attention": "self"}),
            **_side("decoder", config.decoder_layers, {"attention": "self", "cross_attention": "cross"}),
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


def _side(side: str, count: int, attentions: Mapping[str, str]) -> dict[str, Origin]:
    layers, layer = tuple(range(count)), f"model.{side}.layers.{{i}}."
    found = {f"{side}/final_norm/scale": Origin(f"model.{side}.norm.weight")}

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
