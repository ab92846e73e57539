"""Granite 4."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin
from spt_jax.bases.families.granite import granite_scales
from spt_jax.bases.families.granite_moe import GraniteMoe, granite_experts, joined_mlp
from spt_jax.bases.families.llama import layers_of_type, llama_config
from spt_jax.bases.families.recurrent import mamba_config, mamba_origins
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.variant import Variant

_LAYER = "model.layers.{i}."


class GraniteMoeHybrid(GraniteMoe):
    """Granite 4: layers of Mamba-2 (arXiv 2405.21060) or attention, mostly without RoPE, and experts in some models."""

    model_type: ClassVar[str] = "granitemoehybrid"
    architecture: ClassVar[str] = "GraniteMoeHybridForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        unknown = sorted(set(hf.layer_types) - {"full_attention", "linear_attention"})
        if unknown:
            raise ConfigError(f"layer types {unknown} are not supported for {hf.model_type}")
        if len(hf.layer_types) != hf.num_hidden_layers:
            raise ConfigError(
                f"layer_types has {len(hf.layer_types)} layers; num_hidden_layers is {hf.num_hidden_layers}"
            )
        if hf.position_embedding_type not in ("rope", "nope", None):
            raise ConfigError(
                f"position_embedding_type {hf.position_embedding_type!r} is not supported for {hf.model_type}"
            )
        changes: dict[str, Any] = {}
        if hf.position_embedding_type != "rope":
            changes |= {"rope": None, "positions": "none"}
        recurrent = layers_of_type(hf, "linear_attention")
        if recurrent:
            mamba = mamba_config(hf, hf.mamba_expand * hf.hidden_size)
            changes["variants"] = (Variant(name="mamba", layers=recurrent, mamba=mamba),)
        return llama_config(
            hf,
            max_length,
            qkv_bias=bool(hf.attention_bias),
            output_bias=bool(hf.attention_bias),
            mlp_width=hf.shared_intermediate_size,
            experts=granite_experts(hf, hf.shared_intermediate_size) if hf.num_local_experts else None,
            **granite_scales(hf),
            **changes,
        )

    def layer_origins(self, config: DecoderConfig) -> dict[str, Origin]:
        table = super().layer_origins(config)
        if config.experts is None:
            table |= joined_mlp("mlp", f"{_LAYER}shared_mlp", config.mlp_width)
        if config.mamba is None:
            return table
        kept = {path: origin for path, origin in table.items() if not path.startswith("attention/")}
        maps = mamba_origins(config.mamba, f"{_LAYER}mamba.")
        return kept | {f"mamba/{path}": origin for path, origin in maps.items()}

    def tiny(self) -> Mapping[str, Any]:
        return {
            **super().tiny(),
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "shared_intermediate_size": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_expand": 1,
            "mamba_n_heads": 4,
            "mamba_n_groups": 2,
            "mamba_d_state": 6,
            # A norm of small numbers would magnify rounding errors.
            "rms_norm_eps": 0.1,
        }
