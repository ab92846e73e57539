"""GPT-NeoX."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import OUTPUT_KEY, Origin, activation, projections, with_prefix
from spt_jax.bases.families.gpt import fused_attention, gpt_config, norms, output
from spt_jax.bases.families.rope import rope_config
from spt_jax.models.config import DecoderConfig


class GPTNeoX:
    """GPT-NeoX (Black et al. 2022, arXiv 2204.06745) and Pythia: attention and MLP in parallel, each with a norm."""

    model_type: ClassVar[str] = "gpt_neox"
    architecture: ClassVar[str] = "GPTNeoXForCausalLM"
    prefix: ClassVar[str] = "gpt_neox."

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        rope = rope_config(hf, max_length)
        return gpt_config(
            hf,
            mlp_width=hf.intermediate_size,
            norm_epsilon=float(hf.layer_norm_eps),
            parallel=bool(hf.use_parallel_residual),
            activation=activation(hf.hidden_act),
            qkv_bias=bool(hf.attention_bias),
            output_bias=bool(hf.attention_bias),
            rope=rope,
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        layer = "gpt_neox.layers.{i}."
        linear = [
            ("layers/attention/output", "attention.dense", config.output_bias),
            ("layers/mlp/up", "mlp.dense_h_to_4h", True),
            ("layers/mlp/down", "mlp.dense_4h_to_h", True),
        ]
        normed = [
            ("layers/attention_norm", layer + "input_layernorm"),
            ("layers/mlp_norm", layer + "post_attention_layernorm"),
            ("final_norm", "gpt_neox.final_layer_norm"),
        ]
        return {
            "embedding": Origin("gpt_neox.embed_in.weight"),
            **norms(config, normed),
            **fused_attention(config, layer + "attention.query_key_value"),
            **projections(linear, layer),
            **output(config),
        }

    def canonical(self, name: str, config: DecoderConfig) -> str:
        """Returns the name in the table of a stored tensor; transformers 4 wrote the output matrix by another name."""
        return with_prefix(OUTPUT_KEY if name == "embed_out.weight" else name, self.prefix)

    def tiny(self) -> Mapping[str, Any]:
        return {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
            "rotary_pct": 0.25,
        }
