"""StableLM."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, activation, projections
from spt_jax.bases.families.gpt import gpt_config, norms, output
from spt_jax.bases.families.rope import rope_config
from spt_jax.models.config import DecoderConfig


class StableLm:
    """StableLM 2 (Bellagente et al. 2024, arXiv 2402.17834): a Llama with LayerNorms and partial RoPE.

    The 12B model reads one norm in attention and MLP, and normalizes queries and keys with a scale for each head.
    """

    model_type: ClassVar[str] = "stablelm"
    architecture: ClassVar[str] = "StableLmForCausalLM"
    prefix: ClassVar[str] = "model."

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        rope, parallel = rope_config(hf, max_length), bool(hf.use_parallel_residual)
        return gpt_config(
            hf,
            kv_heads=hf.num_key_value_heads,
            mlp_width=hf.intermediate_size,
            norm_epsilon=float(hf.layer_norm_eps),
            parallel=parallel,
            shared_norm=parallel,
            activation=activation(hf.hidden_act),
            qkv_bias=bool(hf.use_qkv_bias),
            qk_norm="heads" if hf.qk_layernorm else "none",
            rope=rope,
            gated_mlp=True,
            output_bias=False,
            mlp_bias=False,
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        layer = "model.layers.{i}."
        linear = [
            ("layers/attention/query", "self_attn.q_proj", config.qkv_bias),
            ("layers/attention/key", "self_attn.k_proj", config.qkv_bias),
            ("layers/attention/value", "self_attn.v_proj", config.qkv_bias),
            ("layers/attention/output", "self_attn.o_proj", False),
            ("layers/mlp/gate", "mlp.gate_proj", False),
            ("layers/mlp/up", "mlp.up_proj", False),
            ("layers/mlp/down", "mlp.down_proj", False),
        ]
        normed = [("layers/attention_norm", layer + "input_layernorm"), ("final_norm", "model.norm")]
        if not config.shared_norm:
            normed.append(("layers/mlp_norm", layer + "post_attention_layernorm"))
        table = {
            "embedding": Origin("model.embed_tokens.weight"),
            **norms(config, normed),
            **projections(linear, layer),
            **output(config),
        }
        if config.qk_norm == "heads":  # One tensor per head, which is numbered as experts are.
            for ours, theirs, heads in (("query", "q", config.heads), ("key", "k", config.kv_heads)):
                key = f"{layer}self_attn.{theirs}_layernorm.norms.{{e}}.weight"
                table[f"layers/attention/{ours}_norm/scale"] = Origin(key, experts=heads)
        return table

    def tiny(self) -> Mapping[str, Any]:
        return {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "partial_rotary_factor": 0.25,
            "use_qkv_bias": True,
            "qk_layernorm": True,
        }
