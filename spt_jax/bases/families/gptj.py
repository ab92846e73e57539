"""GPT-J."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, activation, projections
from spt_jax.bases.families.gpt import GptLike, gpt_config, norms, output
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.rope import RopeConfig


class GPTJ(GptLike):
    """GPT-J (Wang & Komatsuzaki 2021): attention and MLP read one norm, and RoPE rotates a part of each head."""

    model_type: ClassVar[str] = "gptj"
    architecture: ClassVar[str] = "GPTJForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        head_size = hf.n_embd // hf.n_head
        return gpt_config(
            hf,
            mlp_width=hf.n_inner or 4 * hf.n_embd,
            norm_epsilon=float(hf.layer_norm_epsilon),
            parallel=True,
            shared_norm=True,
            activation=activation(hf.activation_function),
            logit_bias=True,
            rope=RopeConfig(fraction=_fraction(hf.rotary_dim, head_size), interleaved=True),
            qkv_bias=False,
            output_bias=False,
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        layer = "transformer.h.{i}."
        linear = [
            ("layers/attention/query", "attn.q_proj", False),
            ("layers/attention/key", "attn.k_proj", False),
            ("layers/attention/value", "attn.v_proj", False),
            ("layers/attention/output", "attn.out_proj", False),
            ("layers/mlp/up", "mlp.fc_in", True),
            ("layers/mlp/down", "mlp.fc_out", True),
        ]
        return {
            "embedding": Origin("transformer.wte.weight"),
            **norms(config, [("layers/attention_norm", layer + "ln_1"), ("final_norm", "transformer.ln_f")]),
            **projections(linear, layer),
            **output(config),
        }

    def tiny(self) -> Mapping[str, Any]:
        return {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 128, "n_inner": 64, "rotary_dim": 6}


def _fraction(rotary_dim: int | None, head_size: int) -> float:
    """Returns the part of a head that is rotated, such that `RopeConfig.rotated_size` is `rotary_dim`."""
    if not rotary_dim or rotary_dim > head_size:
        raise ConfigError(f"GPT-J with rotary_dim {rotary_dim} and heads of size {head_size} is not supported")
    return math.nextafter(rotary_dim / head_size, 1.0)
