"""Falcon."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, activation, projections
from spt_jax.bases.families.gpt import GptLike, fused_attention, gpt_config, norms, output, whole_head_rope
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig


class Falcon(GptLike):
    """Falcon (Almazrouei et al. 2023, arXiv 2311.16867).

    7B has one key/value head and one norm for attention and MLP; 40B, 180B and 11B (`new_decoder_architecture`) have
    several key/value heads, and a norm for each or one for both; RW-1B is sequential, with ALiBi and biases.
    """

    model_type: ClassVar[str] = "falcon"
    architecture: ClassVar[str] = "FalconForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        head_size, bias = hf.hidden_size // hf.num_attention_heads, bool(hf.bias)
        rope = None if hf.alibi else whole_head_rope(hf, max_length)
        return gpt_config(
            hf,
            kv_heads=_kv_heads(hf),
            mlp_width=hf.ffn_hidden_size,
            norm_epsilon=float(hf.layer_norm_epsilon),
            parallel=bool(hf.parallel_attn),
            shared_norm=_shares_norm(hf),
            activation=activation(hf.activation),
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=bias,
            rope=rope,
            positions="alibi" if hf.alibi else "learned",
            alibi_scale=head_size**-0.5 if hf.alibi else 1.0,
            alibi_rounded=bool(hf.alibi),
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        layer = "transformer.h.{i}."
        linear = [
            ("layers/attention/output", "self_attention.dense", config.output_bias),
            ("layers/mlp/up", "mlp.dense_h_to_4h", config.mlp_bias),
            ("layers/mlp/down", "mlp.dense_4h_to_h", config.mlp_bias),
        ]
        first, second = ("ln_attn", "ln_mlp") if config.parallel else ("input_layernorm", "post_attention_layernorm")
        normed = [("final_norm", "transformer.ln_f")]
        if config.shared_norm:
            normed.append(("layers/attention_norm", layer + "input_layernorm"))
        else:
            normed += [("layers/attention_norm", layer + first), ("layers/mlp_norm", layer + second)]
        return {
            "embedding": Origin("transformer.word_embeddings.weight"),
            **norms(config, normed),
            **fused_attention(config, layer + "self_attention.query_key_value"),
            **projections(linear, layer),
            **output(config),
        }

    def tiny(self) -> Mapping[str, Any]:
        return {
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "max_position_embeddings": 128,
            "new_decoder_architecture": True,
            "bias": True,
        }


def _kv_heads(hf: Any) -> int:
    """Returns the number of key/value heads, which the config names only for some architectures."""
    if hf.new_decoder_architecture:
        return hf.num_kv_heads
    if hf.multi_query:
        return 1
    if hf.num_kv_heads != hf.num_attention_heads:
        raise ConfigError(
            f"Falcon without multi_query and new_decoder_architecture has one key/value head per head, but num_kv_heads"
            f" is {hf.num_kv_heads} and num_attention_heads {hf.num_attention_heads}"
        )
    return hf.num_attention_heads


def _shares_norm(hf: Any) -> bool:
    """Returns whether attention and MLP are parallel and read the output of one norm."""
    count = hf.num_ln_in_parallel_attn
    if not hf.new_decoder_architecture:
        if hf.parallel_attn and count == 2:
            raise ConfigError("Falcon with num_ln_in_parallel_attn 2 needs new_decoder_architecture")
        return bool(hf.parallel_attn)
    if not hf.parallel_attn:
        raise ConfigError("Falcon with new_decoder_architecture and without parallel_attn is not supported")
    if count not in (None, 1, 2):
        raise ConfigError(f"Falcon with num_ln_in_parallel_attn {count} is not supported; it must be 1 or 2")
    return count == 1
