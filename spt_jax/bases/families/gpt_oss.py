"""gpt-oss."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.experts import WithExperts
from spt_jax.bases.families.family import Origin, Part, projections
from spt_jax.bases.families.llama import TINY, llama_config, windows
from spt_jax.models.config import DecoderConfig
from spt_jax.models.experts_config import ExpertsConfig


class GptOss(WithExperts):
    """gpt-oss (OpenAI 2025, arXiv 2508.10925): sinks, a window in every second layer, and biases everywhere.

    The experts of OpenAI's checkpoints are MXFP4. They have an activation function of their own, so that `hidden_act`
    has no effect.
    """

    model_type: ClassVar[str] = "gpt_oss"
    architecture: ClassVar[str] = "GptOssForCausalLM"
    router: ClassVar[str] = "mlp.router"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        bias = bool(hf.attention_bias)
        return llama_config(
            hf,
            max_length,
            activation="silu",
            qkv_bias=bias,
            output_bias=bias,
            sinks=True,
            experts=ExpertsConfig(
                experts=hf.num_local_experts,
                top_k=hf.num_experts_per_tok,
                expert_width=hf.intermediate_size,
                scoring="softmax_of_chosen",
                router_bias=True,
                bias=True,
                gate="clamped_swiglu",
                gate_limit=float(hf.swiglu_limit),
                gate_slope=float(hf.swiglu_alpha),
            ),
            **windows(hf),
        )

    def layer_origins(self, config: DecoderConfig) -> dict[str, Origin]:
        table, layer = super().layer_origins(config), "model.layers.{i}."
        assert config.experts is not None
        count, hidden, experts = config.experts.experts, config.experts.expert_width, layer + "mlp.experts."
        for at, name in enumerate(("gate", "up")):  # Their columns alternate.
            take = Part(-1, at, at + 1)
            key, rows = experts + "gate_up_proj", (count, config.width)
            columns = Origin(key, take=take, view=(*rows, hidden, 2), shape=(*rows, 2 * hidden))
            biases = Origin(key + "_bias", take=take, view=(count, hidden, 2), shape=(count, 2 * hidden))
            table |= {f"mlp/experts/{name}/kernel": columns, f"mlp/experts/{name}/bias": biases}
        table["mlp/experts/down/kernel"] = Origin(experts + "down_proj")
        table["mlp/experts/down/bias"] = Origin(experts + "down_proj_bias")
        return table | {"attention/sinks": Origin(layer + "self_attn.sinks")}

    def experts_origins(self, experts: ExpertsConfig, layer: str) -> dict[str, Origin]:
        return projections([("mlp/router", self.router, True)], layer)

    def tiny(self) -> Mapping[str, Any]:
        yarn = {"factor": 4.0, "original_max_position_embeddings": 32, "truncate": False}
        return {
            **TINY,
            "num_hidden_layers": 2,
            "head_dim": 12,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "intermediate_size": 8,
            "sliding_window": 9,
            "swiglu_limit": 0.7,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, **yarn},
        }
