"""OPT."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, Part, activation, projections
from spt_jax.bases.families.gpt import gpt_config, norms, output
from spt_jax.models.config import DecoderConfig

# The first rows of the table of positions, which the model does not use.
_UNUSED_POSITIONS = 2


class OPT:
    """OPT (Zhang et al. 2022, arXiv 2205.01068): learned positions and ReLU.

    OPT-350m maps embeddings to and from the width of the layers, and normalizes after each residual addition.
    """

    model_type: ClassVar[str] = "opt"
    architecture: ClassVar[str] = "OPTForCausalLM"
    prefix: ClassVar[str] = "model."

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        before, bias = bool(hf.do_layer_norm_before), bool(hf.enable_bias)
        return gpt_config(
            hf,
            mlp_width=hf.ffn_dim,
            embedding_width=None if hf.word_embed_proj_dim == hf.hidden_size else hf.word_embed_proj_dim,
            norm_scale=bool(hf.layer_norm_elementwise_affine),
            norm_bias=bool(hf.layer_norm_elementwise_affine),
            norm_place="before" if before else "sum",
            final_norm=before and not hf._remove_final_layer_norm,
            activation=activation(hf.activation_function),
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=bias,
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        decoder, layer = "model.decoder.", "model.decoder.layers.{i}."
        linear = [
            ("layers/attention/query", "self_attn.q_proj", config.qkv_bias),
            ("layers/attention/key", "self_attn.k_proj", config.qkv_bias),
            ("layers/attention/value", "self_attn.v_proj", config.qkv_bias),
            ("layers/attention/output", "self_attn.out_proj", config.output_bias),
            ("layers/mlp/up", "fc1", config.mlp_bias),
            ("layers/mlp/down", "fc2", config.mlp_bias),
        ]
        first, second = ("attention_norm", "mlp_norm")
        if config.norm_place == "sum":
            first, second = ("attention_sum_norm", "mlp_sum_norm")
        normed = [
            (f"layers/{first}", layer + "self_attn_layer_norm"),
            (f"layers/{second}", layer + "final_layer_norm"),
        ]
        if config.final_norm:
            normed.append(("final_norm", decoder + "final_layer_norm"))
        maps = [("input_map", "project_in", False), ("output_map", "project_out", False)]
        used = Part(0, _UNUSED_POSITIONS, _UNUSED_POSITIONS + config.max_positions)
        return {
            "embedding": Origin(decoder + "embed_tokens.weight"),
            "positions": Origin(decoder + "embed_positions.weight", take=used),
            **norms(config, normed),
            **projections(linear, layer),
            **(projections(maps, decoder) if config.embedding_width else {}),
            **output(config),
        }

    def tiny(self) -> Mapping[str, Any]:
        return {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        }
