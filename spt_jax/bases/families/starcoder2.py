"""StarCoder2."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, activation, projections
from spt_jax.bases.families.gpt import gpt_config, norms, output, whole_head_rope
from spt_jax.models.config import DecoderConfig


class Starcoder2:
    """StarCoder2 (Lozhkov et al. 2024, arXiv 2402.19173): LayerNorms, biases and a window in every layer."""

    model_type: ClassVar[str] = "starcoder2"
    architecture: ClassVar[str] = "Starcoder2ForCausalLM"
    prefix: ClassVar[str] = "model."

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        rope, bias, window = whole_head_rope(hf, max_length), bool(hf.use_bias), hf.sliding_window
        return gpt_config(
            hf,
            kv_heads=hf.num_key_value_heads,
            head_size=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            mlp_width=hf.intermediate_size,
            norm_epsilon=float(hf.norm_epsilon),
            activation=activation(hf.hidden_act),
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=bias,
            rope=rope,
            window=window or 0,
            window_layers=() if window is None else tuple(range(hf.num_hidden_layers)),
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        layer = "model.layers.{i}."
        linear = [
            ("layers/attention/query", "self_attn.q_proj", config.qkv_bias),
            ("layers/attention/key", "self_attn.k_proj", config.qkv_bias),
            ("layers/attention/value", "self_attn.v_proj", config.qkv_bias),
            ("layers/attention/output", "self_attn.o_proj", config.output_bias),
            ("layers/mlp/up", "mlp.c_fc", config.mlp_bias),
            ("layers/mlp/down", "mlp.c_proj", config.mlp_bias),
        ]
        normed = [
            ("layers/attention_norm", layer + "input_layernorm"),
            ("layers/mlp_norm", layer + "post_attention_layernorm"),
            ("final_norm", "model.norm"),
        ]
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
            "sliding_window": 7,
        }
