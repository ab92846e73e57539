"""Qwen3-Next, and what Qwen 3.5 shares with it: recurrent layers, gated attention, and experts."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.experts import WithExperts
from spt_jax.bases.families.family import Origin, Part
from spt_jax.bases.families.llama import TINY, layers_of_type, llama_config
from spt_jax.bases.families.recurrent import convolution_origins
from spt_jax.bases.families.rope import rope_config
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.delta_net_config import DeltaNetConfig
from spt_jax.models.experts_config import ExpertsConfig
from spt_jax.models.variant import Variant

LAYER = "model.layers.{i}."

TINY_HYBRID: Mapping[str, Any] = {
    **TINY,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    # A norm of small numbers would magnify rounding errors.
    "rms_norm_eps": 0.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
TINY_EXPERTS: Mapping[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}


class HybridQwen(WithExperts, abc.ABC):
    """Base class of Qwens in which most layers are recurrent, and the output of attention is multiplied by a gate."""

    def layer_origins(self, config: DecoderConfig) -> dict[str, Origin]:
        table = super().layer_origins(config)
        if config.delta_net is None:
            return table | _gated_queries(config)
        maps = self.delta_net_maps(config.width, config.delta_net) | _rest_of_delta_net(config)
        kept = {path: origin for path, origin in table.items() if not path.startswith("attention/")}
        return kept | {f"delta_net/{path}": origin for path, origin in maps.items()}

    @abc.abstractmethod
    def delta_net_maps(self, width: int, sizes: DeltaNetConfig) -> dict[str, Origin]:
        """Returns where the linear maps of the input of a recurrent layer are stored."""


class Qwen3Next(HybridQwen):
    """Qwen3-Next 80B-A3B: a mixture of experts in each layer, or in some."""

    model_type: ClassVar[str] = "qwen3_next"
    architecture: ClassVar[str] = "Qwen3NextForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        layers = range(hf.num_hidden_layers)
        sparse = tuple(
            i
            for i in layers
            if i not in hf.mlp_only_layers and hf.num_experts and (i + 1) % hf.decoder_sparse_step == 0
        )
        experts = experts_config(hf, renormalize=bool(hf.norm_topk_prob)) if sparse else None
        if len(sparse) == len(layers):
            return hybrid_config(hf, max_length, experts=experts)
        return hybrid_config(hf, max_length, Variant(name="experts", layers=sparse, experts=experts))

    def canonical(self, name: str, config: DecoderConfig) -> str | None:
        """Returns the name in the table of a stored tensor; None for a tensor that predicts several tokens at once."""
        if name.startswith("mtp."):
            return None
        return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"

    def delta_net_maps(self, width: int, sizes: DeltaNetConfig) -> dict[str, Origin]:
        repeats = sizes.value_heads // sizes.key_heads
        values = repeats * sizes.value_size
        by_key_head = {"query": sizes.key_size, "key": sizes.key_size, "value": values, "gate": values}
        return {
            **_by_key_head("in_proj_qkvz", sizes.key_heads, width, by_key_head),
            **_by_key_head("in_proj_ba", sizes.key_heads, width, {"beta": repeats, "decay": repeats}),
        }

    def tiny(self) -> Mapping[str, Any]:
        return {**TINY_HYBRID, **TINY_EXPERTS, "intermediate_size": 32, "mlp_only_layers": [1], "norm_topk_prob": False}


def hybrid_config(hf: Any, max_length: int | None, *variants: Variant, **changes: Any) -> DecoderConfig:
    """Returns the decoder of a config with `layer_types` and the sizes of recurrent layers.

    Args:
      hf: the transformers config.
      max_length: the longest sequence of the run.
      *variants: kinds of layers beside the recurrent ones.
      **changes: fields in which the family differs.

    Raises:
      ConfigError: for an option that the decoder does not have.
    """
    unknown = sorted(set(hf.layer_types) - {"full_attention", "linear_attention"})
    if unknown:
        raise ConfigError(f"layer types {unknown} are not supported for {hf.model_type}")
    if len(hf.layer_types) != hf.num_hidden_layers:
        raise ConfigError(f"layer_types has {len(hf.layer_types)} layers; num_hidden_layers is {hf.num_hidden_layers}")
    if hf.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {hf.hidden_act!r} is not supported for {hf.model_type}; only 'silu' is")
    recurrent = layers_of_type(hf, "linear_attention")
    if recurrent:
        delta_net = DeltaNetConfig(
            key_heads=hf.linear_num_key_heads,
            value_heads=hf.linear_num_value_heads,
            key_size=hf.linear_key_head_dim,
            value_size=hf.linear_value_head_dim,
            convolution_width=hf.linear_conv_kernel_dim,
            norm_epsilon=float(hf.rms_norm_eps),
        )
        variants = Variant(name="linear", layers=recurrent, delta_net=delta_net), *variants
    return llama_config(
        hf,
        max_length,
        qkv_bias=bool(hf.attention_bias),
        output_bias=bool(hf.attention_bias),
        norm_offset=1.0,
        qk_norm="head",
        attention_gate=True,
        rope=rope_config(hf, max_length),
        variants=tuple(variants),
        **changes,
    )


def experts_config(hf: Any, *, renormalize: bool) -> ExpertsConfig:
    """Returns the experts of a config with Qwen's field names."""
    return ExpertsConfig(
        experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        expert_width=hf.moe_intermediate_size,
        shared_width=hf.shared_expert_intermediate_size,
        shared_gate=True,
        renormalize=renormalize,
    )


def experts_together(sizes: ExpertsConfig) -> dict[str, Origin]:
    """Returns the origins of experts that share two tensors: [E, 2 F, D] for gate and up, and [E, D, F] for down."""
    both, width = f"{LAYER}mlp.experts.gate_up_proj", sizes.expert_width
    return {
        "mlp/experts/gate/kernel": Origin(both, transpose=True, take=Part(1, 0, width)),
        "mlp/experts/up/kernel": Origin(both, transpose=True, take=Part(1, width, 2 * width)),
        "mlp/experts/down/kernel": Origin(f"{LAYER}mlp.experts.down_proj", transpose=True),
    }


def _gated_queries(config: DecoderConfig) -> dict[str, Origin]:
    """Returns the origins of queries and gates, which one tensor holds head by head."""
    heads, size, width = config.heads, config.head_size, config.width
    rows, key = heads * 2 * size, f"{LAYER}self_attn.q_proj"
    found = {}
    for at, name in enumerate(("query", "gate")):
        part = Part(1, at, at + 1)
        found[f"attention/{name}/kernel"] = Origin(
            f"{key}.weight", transpose=True, view=(heads, 2, size, width), shape=(rows, width), take=part
        )
        if config.qkv_bias:
            found[f"attention/{name}/bias"] = Origin(f"{key}.bias", view=(heads, 2, size), shape=(rows,), take=part)
    return found


def _by_key_head(module: str, heads: int, width: int, sizes: Mapping[str, int]) -> dict[str, Origin]:
    """Returns the origins of linear maps that one tensor holds by key head; `sizes` are those of one head."""
    total, found, start = sum(sizes.values()), {}, 0
    for name, size in sizes.items():
        found[f"{name}/kernel"] = Origin(
            f"{LAYER}linear_attn.{module}.weight",
            transpose=True,
            view=(heads, total, width),
            shape=(heads * total, width),
            take=Part(1, start, start + size),
        )
        start += size
    return found


def _rest_of_delta_net(config: DecoderConfig) -> dict[str, Origin]:
    sizes, module = config.delta_net, f"{LAYER}linear_attn."
    assert sizes is not None
    parts = [("query", sizes.key_width), ("key", sizes.key_width), ("value", sizes.value_width)]
    convolved = [(f"{name}_convolution", size) for name, size in parts]
    return {
        **convolution_origins(convolved, f"{module}conv1d", sizes.convolution_width),
        "a_log": Origin(f"{module}A_log"),
        "dt_bias": Origin(f"{module}dt_bias"),
        "norm/scale": Origin(f"{module}norm.weight"),
        "output/kernel": Origin(f"{module}out_proj.weight", transpose=True),
    }
