"""DeepSeek V2 and V3."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, Part, projections
from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config
from spt_jax.bases.families.rope import rope_config
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig, Variant
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


class DeepseekV2(LlamaLike):
    """DeepSeek V2 and V2 Lite (arXiv 2405.04434): latent attention, and experts behind the first layers."""

    model_type: ClassVar[str] = "deepseek_v2"
    architecture: ClassVar[str] = "DeepseekV2ForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        if hf.topk_method not in ("greedy", "group_limited_greedy"):
            raise ConfigError(f"DeepSeek V2 with topk_method {hf.topk_method!r} is not supported")
        grouped = hf.topk_method == "group_limited_greedy"
        experts = ExpertsConfig(
            **_sizes(hf),
            groups=hf.n_group if grouped else 1,
            top_groups=hf.topk_group if grouped else 1,
        )
        return _config(hf, max_length, experts, interleaved=True, mlp_bias=bool(hf.mlp_bias))

    def layer_origins(self, config: DecoderConfig) -> dict[str, Origin]:
        assert config.latent is not None
        layer, latent = "model.layers.{i}.", config.latent
        table = {
            "attention_norm/scale": Origin(layer + "input_layernorm.weight"),
            "mlp_norm/scale": Origin(layer + "post_attention_layernorm.weight"),
            "attention/latent_norm/scale": Origin(layer + "self_attn.kv_a_layernorm.weight"),
            **_split("attention", ("latent", "rotated_key"), (latent.rank, latent.rotated_size),
                     layer + "self_attn.kv_a_proj_with_mqa", bias=config.qkv_bias),
            **_by_head("attention", ("key_up", "value_up"), (latent.plain_size, latent.value_size),
                       layer + "self_attn.kv_b_proj", config),
            **projections([("attention/output", "self_attn.o_proj", config.output_bias)], layer),
        }  # fmt: skip
        if latent.query_rank is None:
            table |= projections([("attention/query", "self_attn.q_proj", False)], layer)
        else:
            table |= projections([("attention/query_latent", "self_attn.q_a_proj", config.qkv_bias)], layer)
            table |= projections([("attention/query", "self_attn.q_b_proj", False)], layer)
            table["attention/query_latent_norm/scale"] = Origin(layer + "self_attn.q_a_layernorm.weight")
        return table | (self._dense(config, layer) if config.experts is None else self._sparse(config, layer))

    def _dense(self, config: DecoderConfig, layer: str) -> dict[str, Origin]:
        return projections([(f"mlp/{name}", f"mlp.{name}_proj", config.mlp_bias) for name in _LINEAR], layer)

    def _sparse(self, config: DecoderConfig, layer: str) -> dict[str, Origin]:
        assert config.experts is not None
        of_expert = layer + "mlp.experts.{e}."
        table = {"mlp/router/kernel": Origin(layer + "mlp.gate.weight", transpose=True)}
        for name in _LINEAR:
            key = f"{of_expert}{name}_proj.weight"
            table[f"mlp/experts/{name}/kernel"] = Origin(key, transpose=True, experts=config.experts.experts)
        if config.experts.shared_width:
            shared = [(f"mlp/shared/{name}", f"mlp.shared_experts.{name}_proj", False) for name in _LINEAR]
            table |= projections(shared, layer)
        if config.experts.correction:
            table["mlp/correction"] = Origin(layer + "mlp.gate.e_score_correction_bias")
        return table

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


_LINEAR = ("gate", "up", "down")


def _sizes(hf: Any) -> dict[str, Any]:
    """Returns the fields of the experts that both have."""
    if hf.hidden_act != "silu":
        raise ConfigError(f"{hf.model_type} with hidden_act {hf.hidden_act!r} is not supported; it must be 'silu'")
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
    sparse = tuple(range(min(hf.first_k_dense_replace or 0, hf.num_hidden_layers), hf.num_hidden_layers))
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
        variants=(Variant(name="sparse", layers=sparse, experts=experts),) if sparse else (),
        **changes,
    )


def _split(path: str, names: tuple[str, str], sizes: tuple[int, int], module: str, *, bias: bool) -> dict[str, Origin]:
    """Returns the origins of two linear layers that are stored one after the other in one of [out, in]."""
    table = {}
    for name, start, size in zip(names, (0, sizes[0]), sizes, strict=True):
        part = Part(0, start, start + size)
        table[f"{path}/{name}/kernel"] = Origin(f"{module}.weight", transpose=True, take=part)
        if bias:
            table[f"{path}/{name}/bias"] = Origin(f"{module}.bias", take=part)
    return table


def _by_head(
    path: str, names: tuple[str, str], sizes: tuple[int, int], module: str, config: DecoderConfig
) -> dict[str, Origin]:
    """Returns the origins of two linear layers that are stored one after the other within each head."""
    assert config.latent is not None
    view = config.heads, sum(sizes), config.latent.rank
    return {
        f"{path}/{name}/kernel": Origin(
            f"{module}.weight", transpose=True, view=view, take=Part(1, start, start + size)
        )
        for name, start, size in zip(names, (0, sizes[0]), sizes, strict=True)
    }
