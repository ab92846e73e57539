"""GPT-2."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import OUTPUT_KEY, Origin, Part, activation
from spt_jax.bases.families.gpt import gpt_config
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig


class GPT2:
    """GPT-2 (Radford et al. 2019): learned positions, layer norms, and one tensor for queries, keys and values."""

    model_type: ClassVar[str] = "gpt2"
    architecture: ClassVar[str] = "GPT2LMHeadModel"
    prefix: ClassVar[str] = "transformer."

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        for option in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
            if getattr(hf, option, False):
                raise ConfigError(f"GPT-2 with {option} is not supported")
        if not getattr(hf, "scale_attn_weights", True):
            raise ConfigError("GPT-2 without scale_attn_weights is not supported")
        return gpt_config(
            hf,
            mlp_width=hf.n_inner or 4 * hf.n_embd,
            norm_epsilon=float(hf.layer_norm_epsilon),
            activation=activation(hf.activation_function),
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        layer, width = "transformer.h.{i}.", config.width
        table = {
            "embedding": Origin("transformer.wte.weight"),
            "positions": Origin("transformer.wpe.weight"),
            "final_norm/scale": Origin("transformer.ln_f.weight"),
            "final_norm/bias": Origin("transformer.ln_f.bias"),
        }
        for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            table[f"layers/{ours}/scale"] = Origin(f"{layer}{theirs}.weight")
            table[f"layers/{ours}/bias"] = Origin(f"{layer}{theirs}.bias")
        projections: list[tuple[str, str, Part | None]] = [
            ("attention/query", "attn.c_attn", Part(-1, 0, width)),
            ("attention/key", "attn.c_attn", Part(-1, width, 2 * width)),
            ("attention/value", "attn.c_attn", Part(-1, 2 * width, 3 * width)),
            ("attention/output", "attn.c_proj", None),
            ("mlp/up", "mlp.c_fc", None),
            ("mlp/down", "mlp.c_proj", None),
        ]
        for ours, theirs, part in projections:
            table[f"layers/{ours}/kernel"] = Origin(f"{layer}{theirs}.weight", take=part)
            table[f"layers/{ours}/bias"] = Origin(f"{layer}{theirs}.bias", take=part)
        if not config.tied:
            table["output"] = Origin(OUTPUT_KEY, transpose=True)
        return table

    def tiny(self) -> Mapping[str, Any]:
        return {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
