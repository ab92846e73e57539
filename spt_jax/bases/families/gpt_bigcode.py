"""GPTBigCode."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, activation, projections
from spt_jax.bases.families.gpt import GptLike, fused_attention, gpt_config, norms, output
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig


class GPTBigCode(GptLike):
    """SantaCoder and StarCoder (Li et al. 2023, arXiv 2305.06161): a GPT-2 with one key/value head."""

    model_type: ClassVar[str] = "gpt_bigcode"
    architecture: ClassVar[str] = "GPTBigCodeForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        if hf.add_cross_attention:
            raise ConfigError("GPTBigCode with add_cross_attention is not supported")
        return gpt_config(
            hf,
            kv_heads=1 if hf.multi_query else hf.n_head,
            mlp_width=hf.n_inner or 4 * hf.n_embd,
            norm_epsilon=float(hf.layer_norm_epsilon),
            activation=activation(hf.activation_function),
            score_scale=None if hf.scale_attn_weights else 1.0,
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        layer = "transformer.h.{i}."
        linear = [
            ("layers/attention/output", "attn.c_proj", True),
            ("layers/mlp/up", "mlp.c_fc", True),
            ("layers/mlp/down", "mlp.c_proj", True),
        ]
        normed = [
            ("layers/attention_norm", layer + "ln_1"),
            ("layers/mlp_norm", layer + "ln_2"),
            ("final_norm", "transformer.ln_f"),
        ]
        return {
            "embedding": Origin("transformer.wte.weight"),
            "positions": Origin("transformer.wpe.weight"),
            **norms(config, normed),
            **fused_attention(config, layer + "attn.c_attn"),
            **projections(linear, layer),
            **output(config),
        }

    def tiny(self) -> Mapping[str, Any]:
        return {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 64}
