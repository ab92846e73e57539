"""BERT and encoders like it: RoBERTa, XLM-RoBERTa, DistilBERT, ELECTRA and ALBERT."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.encoder import EncoderLike, linear_maps, output_head
from spt_jax.bases.families.family import Origin, Part, activation, by_stack
from spt_jax.bases.families.gpt import gpt_config, norms
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig

_TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def _config(hf: Any, **changes: Any) -> DecoderConfig:
    """The config of an encoder with norms after each residual addition, and learned positions."""
    if getattr(hf, "position_embedding_type", None) not in (None, "absolute"):
        raise ConfigError(f"{hf.model_type} with position_embedding_type {hf.position_embedding_type!r} is unsupported")
    if getattr(hf, "is_decoder", False) or getattr(hf, "add_cross_attention", False):
        raise ConfigError(f"{hf.model_type} as a decoder (is_decoder, add_cross_attention) is not supported")
    head = output_head(hf)
    if head == "masked" and not hf.tie_word_embeddings:
        raise ConfigError(f"{hf.model_type} with tie_word_embeddings false is not supported")
    fields = {
        "causal": False,
        "pooling": "first",
        "output_head": head,
        "logit_bias": head == "masked",
        "norm_place": "sum",
        "final_norm": False,
        "embedding_norm": True,
        "token_types": getattr(hf, "type_vocab_size", 0),
        "norm_epsilon": hf.layer_norm_eps if hasattr(hf, "layer_norm_eps") else 1e-12,
        "activation": activation(hf.hidden_act if hasattr(hf, "hidden_act") else hf.activation),
    }
    return gpt_config(hf, **{**fields, **changes})


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Names of the modules of a layer."""

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"


class Bert(EncoderLike):
    """BERT (Devlin et al. 2019, arXiv 1810.04805). All tokens have the first token type."""

    model_type: ClassVar[str] = "bert"
    architecture: ClassVar[str] = "BertForMaskedLM"
    prefix: ClassVar[str] = "bert."
    head: ClassVar[tuple[str, str, str]] = (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
    )
    decoder: ClassVar[str] = "cls.predictions.decoder"
    layer: ClassVar[str] = "encoder.layer.{i}."
    embedding_map: ClassVar[str] = "embeddings_project"
    modules: ClassVar[_Layer] = _Layer()
    first_position: ClassVar[int] = 0
    shared_layers: ClassVar[bool] = False

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        narrow = getattr(hf, "embedding_size", hf.hidden_size)
        return _config(
            hf,
            mlp_width=hf.intermediate_size,
            max_positions=hf.max_position_embeddings - self.first_position,
            embedding_width=None if narrow == hf.hidden_size else narrow,
            input_map_bias=narrow != hf.hidden_size,
            **self.changes(hf),
        )

    def changes(self, hf: Any) -> Mapping[str, Any]:
        """Returns the fields of `DecoderConfig` in which the family differs from BERT."""
        del hf
        return {}

    def layer_origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        """Returns where the parameters of a layer are stored, by their paths in the layer.

        Args:
          config: of the layer.
        """
        layer, names = self.prefix + self.layer, self.modules
        layers = tuple(range(config.layers)) if self.shared_layers else None
        maps = [
            ("attention/query", layer + names.query),
            ("attention/key", layer + names.key),
            ("attention/value", layer + names.value),
            ("attention/output", layer + names.output),
            ("mlp/up", layer + names.up),
            ("mlp/down", layer + names.down),
        ]
        normed = [("attention_sum_norm", layer + names.attention_norm), ("mlp_sum_norm", layer + names.mlp_norm)]
        return {
            **linear_maps(maps, layers),
            **{path: dataclasses.replace(origin, layers=layers) for path, origin in norms(config, normed).items()},
        }

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin | tuple[Origin, ...]]:
        embeddings = f"{self.prefix}embeddings."
        first, last = self.first_position, self.first_position + config.max_positions
        used = Part(0, first, last) if first else None
        found: dict[str, Origin | tuple[Origin, ...]] = {
            "embedding": Origin(embeddings + "word_embeddings.weight"),
            "positions": Origin(embeddings + "position_embeddings.weight", take=used),
            **norms(config, [("embedding_norm", embeddings + "LayerNorm")]),
            **by_stack(config, self.layer_origins),
            **self.head_origins(config),
        }
        if config.token_types:
            found["token_types"] = Origin(embeddings + "token_type_embeddings.weight")
        if config.embedding_width is not None:
            found |= linear_maps([("input_map", self.prefix + self.embedding_map)])
        return found

    def tiny(self) -> Mapping[str, Any]:
        return _TINY


class Roberta(Bert):
    """RoBERTa (Liu et al. 2019, arXiv 1907.11692): positions are counted from the one after the padding token's id."""

    model_type: ClassVar[str] = "roberta"
    architecture: ClassVar[str] = "RobertaForMaskedLM"
    prefix: ClassVar[str] = "roberta."
    head: ClassVar[tuple[str, str, str]] = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
    decoder: ClassVar[str] = "lm_head.decoder"
    first_position: ClassVar[int] = 2

    def changes(self, hf: Any) -> Mapping[str, Any]:
        if hf.pad_token_id != self.first_position - 1:
            raise ConfigError(f"{hf.model_type} with pad_token_id {hf.pad_token_id} is not supported; it must be 1")
        if hf.hidden_act != "gelu":
            raise ConfigError(f"{hf.model_type} with hidden_act {hf.hidden_act!r} is not supported; it must be 'gelu'")
        return {}

    def tiny(self) -> Mapping[str, Any]:
        return {**_TINY, "max_position_embeddings": 130, "pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}


class XlmRoberta(Roberta):
    """XLM-RoBERTa (Conneau et al. 2020, arXiv 1911.02116)."""

    model_type: ClassVar[str] = "xlm-roberta"
    architecture: ClassVar[str] = "XLMRobertaForMaskedLM"


class DistilBert(Bert):
    """DistilBERT (Sanh et al. 2019, arXiv 1910.01108): BERT without token types."""

    model_type: ClassVar[str] = "distilbert"
    architecture: ClassVar[str] = "DistilBertForMaskedLM"
    prefix: ClassVar[str] = "distilbert."
    head: ClassVar[tuple[str, str, str]] = ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")
    decoder: ClassVar[str] = "vocab_projector"
    layer: ClassVar[str] = "transformer.layer.{i}."
    modules: ClassVar[_Layer] = _Layer(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        mlp_norm="output_layer_norm",
    )

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return _config(hf, mlp_width=hf.hidden_dim)

    def tiny(self) -> Mapping[str, Any]:
        return {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 128}


class Electra(Bert):
    """ELECTRA (Clark et al. 2020, arXiv 2003.10555). Its discriminator, the usual base, does not predict tokens."""

    model_type: ClassVar[str] = "electra"
    architecture: ClassVar[str] = "ElectraForMaskedLM"
    prefix: ClassVar[str] = "electra."
    head: ClassVar[tuple[str, str, str]] = (
        "generator_predictions.dense",
        "generator_predictions.LayerNorm",
        "generator_lm_head.bias",
    )
    decoder: ClassVar[str] = "generator_lm_head"

    def changes(self, hf: Any) -> Mapping[str, Any]:
        if hf.hidden_act != "gelu":
            raise ConfigError(f"{hf.model_type} with hidden_act {hf.hidden_act!r} is not supported; it must be 'gelu'")
        return {}

    def tiny(self) -> Mapping[str, Any]:
        return {**_TINY, "embedding_size": 16}


class Albert(Bert):
    """ALBERT (Lan et al. 2020, arXiv 1909.11942): all layers have the same parameters, which are copied here."""

    model_type: ClassVar[str] = "albert"
    architecture: ClassVar[str] = "AlbertForMaskedLM"
    prefix: ClassVar[str] = "albert."
    head: ClassVar[tuple[str, str, str]] = ("predictions.dense", "predictions.LayerNorm", "predictions.bias")
    decoder: ClassVar[str] = "predictions.decoder"
    layer: ClassVar[str] = "encoder.albert_layer_groups.0.albert_layers.0."
    embedding_map: ClassVar[str] = "encoder.embedding_hidden_mapping_in"
    shared_layers: ClassVar[bool] = True
    modules: ClassVar[_Layer] = _Layer(
        query="attention.query",
        key="attention.key",
        value="attention.value",
        output="attention.dense",
        attention_norm="attention.LayerNorm",
        up="ffn",
        down="ffn_output",
        mlp_norm="full_layer_layer_norm",
    )

    def changes(self, hf: Any) -> Mapping[str, Any]:
        if hf.num_hidden_groups != 1 or hf.inner_group_num != 1:
            raise ConfigError("albert with several groups of layers is not supported")
        if hf.embedding_size == hf.hidden_size:
            raise ConfigError("albert with an embedding_size equal to hidden_size is not supported")
        return {}

    def tiny(self) -> Mapping[str, Any]:
        return {**_TINY, "embedding_size": 16}
