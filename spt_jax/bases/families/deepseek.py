"""DeepSeek V2 and V3."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.experts import WithExperts, check_swiglu, experts_in
from spt_jax.bases.families.family import Origin, Part, joined_projection, projections, with_prefix, without_layer
from spt_jax.bases.families.llama import TINY, llama_config
from spt_jax.bases.families.rope import rope_config
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.experts_config import ExpertsConfig
from spt_jax.models.latent_config import LatentConfig

_TINY: Mapping[str, Any] = {
    **{name: value for name, value in TINY.items() if name != "num_key_value_heads"},
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
    },
}


class DeepseekV2(WithExperts):
    """DeepSeek V2 and V2 Lite (arXiv 2405.04434): latent attention, and experts after the first layers."""

    model_type: ClassVar[str] = "deepseek_v2"
    architecture: ClassVar[str] = "DeepseekV2ForCausalLM"
    shared: ClassVar[str] = "mlp.shared_experts"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        if hf.topk_method not in ("greedy", "group_limited_greedy"):
            raise ConfigError(f"DeepSeek V2 with topk_method {hf.topk_method!r} is not supported")
        grouped = hf.topk_method == "group_limited_greedy"
        _check_present(hf, "num_experts_per_tok", *(("n_group", "topk_group") if grouped else ()))
        experts = ExpertsConfig(
            **_sizes(hf),
            groups=hf.n_group if grouped else 1,
            top_groups=hf.topk_group if grouped else 1,
        )
        return _config(hf, max_length, experts, interleaved=True, mlp_bias=bool(hf.mlp_bias))

    def canonical(self, name: str, config: DecoderConfig) -> str | None:
        """Returns the name in the table of a stored tensor; None for the layer that predicts a second token."""
        return without_layer(config.layers, with_prefix(name, self.prefix))

    def layer_origins(self, config: DecoderConfig) -> dict[str, Origin]:
        layer = "model.layers.{i}."
        table = {
            "attention_norm/scale": Origin(layer + "input_layernorm.weight"),
            "mlp_norm/scale": Origin(layer + "post_attention_layernorm.weight"),
            **_attention_origins(config, layer + "self_attn."),
        }
        if config.experts is not None:
            return table | self.experts_origins(config.experts, layer)
        mlp = ("gate", "up", "down")
        return table | projections([(f"mlp/{name}", f"mlp.{name}_proj", config.mlp_bias) for name in mlp], layer)

    def tiny(self) -> Mapping[str, Any]:
        return {**_TINY, "q_lora_rank": None, "topk_method": "group_limited_greedy"}


class DeepseekV3(DeepseekV2):
    """DeepSeek V3 and R1 (arXiv 2412.19437): experts are chosen by corrected sigmoid scores."""

    model_type: ClassVar[str] = "deepseek_v3"
    architecture: ClassVar[str] = "DeepseekV3ForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        experts = ExpertsConfig(
            **_sizes(hf),
            scoring="sigmoid",
            correction=True,
            groups=hf.n_group,
            top_groups=hf.topk_group,
            group_score="top2_sum",
            renormalize=bool(hf.norm_topk_prob),
            renormalize_epsilon=1e-20 if hf.norm_topk_prob else 0.0,
        )
        if not hf.rope_interleave:
            raise ConfigError("DeepSeek V3 without rope_interleave is not supported")
        return _config(hf, max_length, experts, interleaved=True)

    def tiny(self) -> Mapping[str, Any]:
        return {**_TINY, "q_lora_rank": 14, "num_key_value_heads": 4, "norm_topk_prob": True}


def _check_present(hf: Any, *names: str) -> None:
    """Raises ConfigError where a field is None, as transformers fills in what config.json of DeepSeek V2 leaves out."""
    for name in names:
        if getattr(hf, name) is None:
            raise ConfigError(f"the config of {hf.model_type} does not say {name!r}")


def _sizes(hf: Any) -> dict[str, Any]:
    """Returns the fields of the experts that both have."""
    check_swiglu(hf)
    return {
        "experts": hf.n_routed_experts,
        "top_k": hf.num_experts_per_tok,
        "expert_width": hf.moe_intermediate_size,
        "shared_width": hf.moe_intermediate_size * (hf.n_shared_experts or 0),
        "scale": float(hf.routed_scaling_factor),
    }


def _config(hf: Any, max_length: int | None, experts: ExpertsConfig, **changes: Any) -> DecoderConfig:
    rope = rope_config(hf, max_length, interleaved=changes.pop("interleaved"))
    if rope.fraction != 1:
        raise ConfigError(f"{hf.model_type} with a partial rotary embedding is not supported")
    latent = LatentConfig(
        rank=hf.kv_lora_rank,
        query_rank=hf.q_lora_rank,
        plain_size=hf.qk_nope_head_dim,
        rotated_size=hf.qk_rope_head_dim,
        value_size=hf.v_head_dim,
    )
    scale = (hf.qk_nope_head_dim + hf.qk_rope_head_dim) ** -0.5
    all_dim = hf.rope_parameters.get("mscale_all_dim")
    if rope.kind != "default" and all_dim and rope.factor > 1:
        scale *= (0.1 * all_dim * math.log(rope.factor) + 1.0) ** 2
    count = hf.num_hidden_layers
    sparse = range(hf.first_k_dense_replace or 0, count)
    return llama_config(
        hf,
        max_length,
        kv_heads=hf.num_attention_heads,
        head_size=hf.qk_rope_head_dim,
        qkv_bias=bool(hf.attention_bias),
        output_bias=bool(hf.attention_bias),
        rope=rope,
        score_scale=scale,
        latent=latent,
        **experts_in(sparse, count, experts),
        **changes,
    )


def _attention_origins(config: DecoderConfig, module: str) -> dict[str, Origin]:
    """Returns where the parameters of the attention of a layer are stored."""
    assert config.latent is not None
    latent = config.latent
    parts = [("attention/latent", latent.rank), ("attention/rotated_key", latent.rotated_size)]
    table = {
        "attention/latent_norm/scale": Origin(module + "kv_a_layernorm.weight"),
        **joined_projection(parts, module + "kv_a_proj_with_mqa", config.qkv_bias),
        **projections([("attention/output", "o_proj", config.output_bias)], module),
    }
    # Within each head, the rows of the keys come before those of the values.
    both = latent.plain_size + latent.value_size
    view, shape, start = (config.heads, both, latent.rank), (config.heads * both, latent.rank), 0
    for name, size in (("key_up", latent.plain_size), ("value_up", latent.value_size)):
        part = Part(1, start, start + size)
        table[f"attention/{name}/kernel"] = Origin(
            module + "kv_b_proj.weight", transpose=True, view=view, take=part, shape=shape
        )
        start += size
    if latent.query_rank is None:
        return table | projections([("attention/query", "q_proj", False)], module)
    queries = [("attention/query_latent", "q_a_proj", config.qkv_bias), ("attention/query", "q_b_proj", False)]
    return {
        **table,
        **projections(queries, module),
        "attention/query_latent_norm/scale": Origin(module + "q_a_layernorm.weight"),
    }
