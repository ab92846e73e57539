"""T5 and its variants."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import OUTPUT_KEY, Origin, activation
from spt_jax.errors import ConfigError
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig

# Relative positions set no limit; a longer sequence than this is most likely a mistake.
_MAX_POSITIONS = 8192
_EMBEDDING = "shared.weight"
# Copies of the embedding table in older files, and a table that no layer reads.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_LINEAR = (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))


class T5:
    """T5 (Raffel et al. 2020, arXiv 1910.10683), T5 1.1, its LM-adapted version (Lester et al. 2021) and Flan-T5.

    T5 1.0 ties the output matrix to the embedding table and scales its input. Later versions do neither, and
    `tie_word_embeddings` in their files says so; transformers keeps that as `scale_decoder_outputs` only.
    """

    model_type: ClassVar[str] = "t5"
    architecture: ClassVar[str] = "T5ForConditionalGeneration"
    prefix: ClassVar[str] = ""
    shared_bias: ClassVar[bool] = True

    def config(self, hf: Any, max_length: int | None) -> EncoderDecoderConfig:
        if not getattr(hf, "is_encoder_decoder", True):
            raise ConfigError(f"{self.model_type} with is_encoder_decoder false, an encoder, is not supported")
        start = getattr(hf, "decoder_start_token_id", None)
        return EncoderDecoderConfig(
            family=self.model_type,
            vocab_size=hf.vocab_size,
            width=hf.d_model,
            encoder_layers=hf.num_layers,
            decoder_layers=hf.num_decoder_layers,
            heads=hf.num_heads,
            head_size=hf.d_kv,
            mlp_width=hf.d_ff,
            max_positions=max(_MAX_POSITIONS, max_length or 0),
            start_id=hf.pad_token_id if start is None else start,
            norm_epsilon=float(hf.layer_norm_epsilon),
            activation=activation(hf.dense_act_fn),
            gated_mlp=hf.is_gated_act,
            bias_buckets=hf.relative_attention_num_buckets,
            bias_max_distance=hf.relative_attention_max_distance,
            shared_bias=self.shared_bias,
            output_scale=hf.d_model**-0.5 if self.scales(hf) else None,
            tied=self.scales(hf),
        )

    def scales(self, hf: Any) -> bool:
        """Returns whether hidden states are scaled before the output matrix."""
        return bool(hf.scale_decoder_outputs)

    def origins(self, config: EncoderDecoderConfig) -> Mapping[str, Origin | tuple[Origin, ...]]:
        found = {
            "embedding": Origin(_EMBEDDING),
            **self._side(config, "encoder", config.encoder_layers, {"attention": "SelfAttention"}),
            **self._side(
                config,
                "decoder",
                config.decoder_layers,
                {"attention": "SelfAttention", "cross_attention": "EncDecAttention"},
            ),
        }
        return found if config.tied else {**found, "output": Origin(OUTPUT_KEY, transpose=True)}

    def _side(
        self, config: EncoderDecoderConfig, side: str, count: int, attentions: Mapping[str, str]
    ) -> dict[str, Origin]:
        layers = tuple(range(count))
        found = {f"{side}/final_norm/scale": Origin(f"{side}.final_layer_norm.weight")}

        def add(path: str, key: str, transpose: bool = False) -> None:
            found[f"{side}/layers/{path}"] = Origin(
                f"{side}.block.{{i}}.layer.{key}.weight", transpose=transpose, layers=layers
            )

        for place, (ours, theirs) in enumerate(attentions.items()):
            norm = "attention_norm" if ours == "attention" else "cross_norm"
            add(f"{norm}/scale", f"{place}.layer_norm")
            for name, key in _LINEAR:
                add(f"{ours}/{name}/kernel", f"{place}.{theirs}.{key}", transpose=True)
        last = len(attentions)
        add("mlp_norm/scale", f"{last}.layer_norm")
        inputs = {"gate": "wi_0", "up": "wi_1"} if config.gated_mlp else {"up": "wi"}
        for name, key in {**inputs, "down": "wo"}.items():
            add(f"mlp/{name}/kernel", f"{last}.DenseReluDense.{key}", transpose=True)
        table = f"{side}.block.{{i}}.layer.0.SelfAttention.relative_attention_bias.weight"
        if config.shared_bias:
            found[f"{side}/relative_bias"] = Origin(table.format(i=0))
        else:
            found[f"{side}/layers/relative_bias"] = Origin(table, layers=layers)
        return found

    def stored(self, config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
        """Returns the config with an output matrix of its own if the files hold one.

        `tie_word_embeddings` does not tell: transformers sets it for all T5 models, and original files have it false
        where they mean that hidden states are not scaled.
        """
        return dataclasses.replace(config, tied=OUTPUT_KEY not in names)

    def canonical(self, name: str, config: EncoderDecoderConfig) -> str | None:
        """Leaves out copies of the embedding table and a table of biases that no layer reads."""
        return None if name in _COPIES or name == _UNUSED else name

    def tiny(self) -> Mapping[str, Any]:
        # Distances beyond 16 share the last bucket, and the sides differ in their numbers of layers.
        return {
            "d_model": 32,
            "d_kv": 4,
            "d_ff": 48,
            "num_layers": 3,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "decoder_start_token_id": 0,
        }


class MT5(T5):
    """mT5 (Xue et al. 2021, arXiv 2010.11934): T5 1.1 with another vocabulary."""

    model_type: ClassVar[str] = "mt5"
    architecture: ClassVar[str] = "MT5ForConditionalGeneration"

    def scales(self, hf: Any) -> bool:
        return False


class UMT5(T5):
    """UMT5 (Chung et al. 2023, arXiv 2304.09151): each layer has relative position biases of its own."""

    model_type: ClassVar[str] = "umt5"
    architecture: ClassVar[str] = "UMT5ForConditionalGeneration"
    shared_bias: ClassVar[bool] = False
