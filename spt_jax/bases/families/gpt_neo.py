"""GPT-Neo."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, activation, projections
from spt_jax.bases.families.gpt import GptLike, gpt_config, norms, output
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig


class GPTNeo(GptLike):
    """GPT-Neo (Black et al. 2021): a GPT-2 with windows in every second layer, and without a scale of the scores."""

    model_type: ClassVar[str] = "gpt_neo"
    architecture: ClassVar[str] = "GPTNeoForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        kinds = hf.attention_layers
        unknown = sorted(set(kinds) - {"global", "local"})
        if unknown:
            raise ConfigError(f"attention_layers of kind {unknown[0]!r:.60} are not supported; there are global, local")
        local = tuple(i for i, kind in enumerate(kinds) if kind == "local")
        return gpt_config(
            hf,
            mlp_width=hf.intermediate_size or 4 * hf.hidden_size,
            norm_epsilon=float(hf.layer_norm_epsilon),
            activation=activation(hf.activation_function),
            window=hf.window_size if local else 0,
            window_layers=local,
            score_scale=1.0,
            qkv_bias=False,
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        layer = "transformer.h.{i}."
        linear = [
            ("layers/attention/query", "attn.attention.q_proj", False),
            ("layers/attention/key", "attn.attention.k_proj", False),
            ("layers/attention/value", "attn.attention.v_proj", False),
            ("layers/attention/output", "attn.attention.out_proj", True),
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
            **projections(linear, layer),
            **output(config),
        }

    def tiny(self) -> Mapping[str, Any]:
        return {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 3,
            "num_heads": 4,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], 1], [["global"], 1]],
            "window_size": 7,
        }
