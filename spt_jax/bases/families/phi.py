"""Phi-1 and Phi-2."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, activation, projections
from spt_jax.bases.families.gpt import gpt_config, norms, output
from spt_jax.bases.families.rope import rope_config
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig


class Phi:
    """Phi-1, Phi-1.5 and Phi-2 (Li et al. 2023, arXiv 2309.05463): attention and MLP read one norm; partial RoPE."""

    model_type: ClassVar[str] = "phi"
    architecture: ClassVar[str] = "PhiForCausalLM"
    prefix: ClassVar[str] = "model."

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        if hf.qk_layernorm:
            raise ConfigError("Phi with qk_layernorm is not supported")
        rope = rope_config(hf, max_length)
        return gpt_config(
            hf,
            kv_heads=hf.num_key_value_heads,
            head_size=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            mlp_width=hf.intermediate_size,
            norm_epsilon=float(hf.layer_norm_eps),
            parallel=True,
            shared_norm=True,
            activation=activation(hf.hidden_act),
            logit_bias=True,
            rope=rope,
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        layer = "model.layers.{i}."
        linear = [
            ("layers/attention/query", "self_attn.q_proj", True),
            ("layers/attention/key", "self_attn.k_proj", True),
            ("layers/attention/value", "self_attn.v_proj", True),
            ("layers/attention/output", "self_attn.dense", True),
            ("layers/mlp/up", "mlp.fc1", True),
            ("layers/mlp/down", "mlp.fc2", True),
        ]
        normed = [("layers/attention_norm", layer + "input_layernorm"), ("final_norm", "model.final_layernorm")]
        return {
            "embedding": Origin("model.embed_tokens.weight"),
            **norms(config, normed),
            **projections(linear, layer),
            **output(config),
        }

    def tiny(self) -> Mapping[str, Any]:
        return {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "partial_rotary_factor": 0.5,
        }
