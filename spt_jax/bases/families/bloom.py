"""BLOOM."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, projections
from spt_jax.bases.families.gpt import GptLike, fused_attention, gpt_config, norms, output
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig

_TRAINED_LENGTH = 2048


class Bloom(GptLike):
    """BLOOM and BLOOMZ (Le Scao et al. 2022, arXiv 2211.05100): ALiBi, and a LayerNorm of the embeddings."""

    model_type: ClassVar[str] = "bloom"
    architecture: ClassVar[str] = "BloomForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        if hf.apply_residual_connection_post_layernorm:
            raise ConfigError("BLOOM with apply_residual_connection_post_layernorm is not supported")
        return gpt_config(
            hf,
            mlp_width=4 * hf.hidden_size,
            max_positions=getattr(hf, "seq_length", None) or _TRAINED_LENGTH,
            norm_epsilon=float(hf.layer_norm_epsilon),
            embedding_norm=True,
            activation="gelu_tanh",
            positions="alibi",
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        layer = "transformer.h.{i}."
        linear = [
            ("layers/attention/output", "self_attention.dense", True),
            ("layers/mlp/up", "mlp.dense_h_to_4h", True),
            ("layers/mlp/down", "mlp.dense_4h_to_h", True),
        ]
        normed = [
            ("embedding_norm", "transformer.word_embeddings_layernorm"),
            ("layers/attention_norm", layer + "input_layernorm"),
            ("layers/mlp_norm", layer + "post_attention_layernorm"),
            ("final_norm", "transformer.ln_f"),
        ]
        return {
            "embedding": Origin("transformer.word_embeddings.weight"),
            **norms(config, normed),
            **fused_attention(config, layer + "self_attention.query_key_value"),
            **projections(linear, layer),
            **output(config),
        }

    def tiny(self) -> Mapping[str, Any]:
        # With 6 heads, a power of two and a rest have slopes of their own.
        return {"hidden_size": 36, "n_layer": 2, "n_head": 6, "seq_length": 128}
