"""Falcon-H1."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin
from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config
from spt_jax.bases.families.recurrent import mamba_config, mamba_origins
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig

_LAYER = "model.layers.{i}."


class FalconH1(LlamaLike):
    """Falcon-H1 (arXiv 2507.22448): attention beside Mamba-2 in each layer, and factors of most linear maps.

    PEFT leaves out the factor of the embeddings, so that its prompts belong to another function.
    """

    model_type: ClassVar[str] = "falcon_h1"
    architecture: ClassVar[str] = "FalconH1ForCausalLM"
    norms: ClassVar[Mapping[str, str]] = {"attention_norm": "input_layernorm", "mlp_norm": "pre_ff_layernorm"}

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        for name, count in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
            if len(getattr(hf, name)) != count:
                raise ConfigError(f"{name} has {len(getattr(hf, name))} numbers; {hf.model_type} needs {count}")
        of_gate, of_mlp = map(float, hf.mlp_multipliers)
        norm = "gate_last" if hf.mamba_norm_before_gate else "gate_first"
        mamba = mamba_config(
            hf,
            hf.mamba_expand * hf.hidden_size if hf.mamba_d_ssm is None else hf.mamba_d_ssm,
            output_bias=bool(hf.projectors_bias),
            norm=norm if hf.mamba_rms_norm else "none",
            beside_attention=True,
            input_scale=float(hf.ssm_in_multiplier),
            part_scales=tuple(map(float, hf.ssm_multipliers)),
            output_scale=float(hf.ssm_out_multiplier),
        )
        return llama_config(
            hf,
            max_length,
            qkv_bias=bool(hf.attention_bias),
            output_bias=bool(hf.attention_bias),
            mlp_bias=bool(hf.mlp_bias),
            mamba=mamba,
            # Of the embedding table only: transformers does not scale inputs that are no tokens.
            embedding_scale=float(hf.embedding_multiplier),
            attention_input_scale=float(hf.attention_in_multiplier),
            attention_output_scale=float(hf.attention_out_multiplier),
            key_scale=float(hf.key_multiplier),
            mlp_gate_scale=of_gate,
            mlp_output_scale=of_mlp,
            logit_scale=float(hf.lm_head_multiplier),
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin | tuple[Origin, ...]]:
        return {**super().origins(config), "final_norm/scale": Origin("model.final_layernorm.weight")}

    def layer_origins(self, config: DecoderConfig) -> dict[str, Origin]:
        assert config.mamba is not None
        table = super().layer_origins(config)
        mamba = mamba_origins(config.mamba, f"{_LAYER}mamba.")
        return {
            path: dataclasses.replace(origin, key=origin.key.replace(".mlp.", ".feed_forward.", 1))
            for path, origin in table.items()
        } | {f"mamba/{path}": origin for path, origin in mamba.items()}

    def tiny(self) -> Mapping[str, Any]:
        return {
            **TINY,
            "num_hidden_layers": 2,
            "rms_norm_eps": 0.1,
            "mamba_d_ssm": 24,
            "mamba_n_heads": 4,
            "mamba_n_groups": 2,
            "mamba_d_state": 6,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "embedding_multiplier": 3.0,
            "lm_head_multiplier": 0.8,
            "key_multiplier": 0.6,
            "attention_in_multiplier": 1.3,
            "attention_out_multiplier": 0.7,
            "ssm_in_multiplier": 0.9,
            "ssm_out_multiplier": 1.4,
            "ssm_multipliers": [0.6, 1.5, 0.8, 1.2, 0.7],
            "mlp_multipliers": [1.2, 0.6],
        }
