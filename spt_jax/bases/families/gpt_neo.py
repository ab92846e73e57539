"""GPT-Neo."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, activation, projections
from spt_jax.bases.families.gpt import GptLike, norms, output
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
        return DecoderConfig(
            family="gpt_neo",
            vocab_size=hf.vocab_size,
            width=hf.hidden_size,
            layers=hf.num_layers,
            heads=hf.num_heads,
            kv_heads=hf.num_heads,
            head_size=hf.hidden_size // hf.num_heads,
            mlp_width=hf.intermediate_size or 4 * hf.hidden_size,
            max_positions=hf.max_position_embeddings,
            norm="layer",
            norm_epsilon=float(hf.layer_norm_epsilon),
            activation=activation(hf.activation_function),
            gated_mlp=False,
            output_bias=True,
            mlp_bias=True,
            window=hf.window_size if local else 0,
            window_layers=local,
            score_scale=1.0,
            tied=bool(hf.tie_word_embeddings),
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
