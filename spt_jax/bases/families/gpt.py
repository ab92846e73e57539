"""What GPT-like families share: LayerNorms with biases, and queries, keys and values in one tensor."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

from spt_jax.bases.families.family import OUTPUT_BIAS_KEY, OUTPUT_KEY, Origin, Part
from spt_jax.bases.families.rope import rope_config
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.rope import RopeConfig


class GptLike:
    """Base class of families whose tensors' names start with "transformer.", in some files without it."""

    prefix: ClassVar[str] = "transformer."


def gpt_config(hf: Any, **changes: Any) -> DecoderConfig:
    """The decoder of a config, with LayerNorms, biases and an MLP without a gate.

    Args:
      hf: a transformers config, by the names that transformers gives to the sizes of all models.
      **changes: fields in which the family differs; among them `mlp_width`, `norm_epsilon` and `activation`.
    """
    rope = changes.get("rope")
    fields = {
        "family": hf.model_type,
        "vocab_size": hf.vocab_size,
        "width": hf.hidden_size,
        "layers": hf.num_hidden_layers,
        "heads": hf.num_attention_heads,
        "kv_heads": hf.num_attention_heads,
        "head_size": hf.hidden_size // hf.num_attention_heads,
        "norm": "layer",
        "gated_mlp": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "tied": bool(hf.tie_word_embeddings),
    }
    if "max_positions" not in changes:
        fields["max_positions"] = max(hf.max_position_embeddings, rope.dynamic_length if rope else 0)
    return DecoderConfig(**{**fields, **changes})


def norms(config: DecoderConfig, table: Iterable[tuple[str, str]]) -> dict[str, Origin]:
    """Returns the origins of the scales and biases that the config's LayerNorms have.

    Args:
      config: of the decoder or of a layer.
      table: path of the norm and name of its module.
    """
    found = {}
    for ours, theirs in table:
        if config.norm_scale:
            found[f"{ours}/scale"] = Origin(f"{theirs}.weight")
        if config.norm_bias:
            found[f"{ours}/bias"] = Origin(f"{theirs}.bias")
    return found


def fused_attention(config: DecoderConfig, module: str, layers: str = "layers/") -> dict[str, Origin]:
    """Returns the origins of queries, keys and values that one tensor holds in groups.

    The rows of a group are those of the queries that share a key/value head, of their keys and of their values. With as
    many key/value heads as heads they are the query, key and value of one head; with one, all heads come first.

    Args:
      config: of the decoder.
      module: name of the linear layer, whose weight is stored as [out, in].
      layers: what the paths of the parameters start with.
    """
    queries = config.heads // config.kv_heads
    view = (config.kv_heads, queries + 2, config.head_size)
    rows = math.prod(view)
    parts = {"query": (0, queries), "key": (queries, queries + 1), "value": (queries + 1, queries + 2)}
    found = {}
    for name, (start, stop) in parts.items():
        path, part = f"{layers}attention/{name}", Part(1, start, stop)
        found[f"{path}/kernel"] = Origin(
            f"{module}.weight", transpose=True, view=(*view, config.width), take=part, shape=(rows, config.width)
        )
        if config.qkv_bias:
            found[f"{path}/bias"] = Origin(f"{module}.bias", view=view, take=part, shape=(rows,))
    return found


def output(config: DecoderConfig) -> dict[str, Origin]:
    """Returns the origins of an untied output matrix and of the logits' bias."""
    found = {} if config.tied else {"output": Origin(OUTPUT_KEY, transpose=True)}
    return {**found, "logit_bias": Origin(OUTPUT_BIAS_KEY)} if config.logit_bias else found


def whole_head_rope(hf: Any, max_length: int | None) -> RopeConfig:
    """The rotary embedding of a family that always rotates whole heads.

    Raises:
      ConfigError: for a part of a head, which transformers ignores or fails for, and for what `rope_config` refuses.
    """
    rope = rope_config(hf, max_length)
    if rope.fraction != 1:
        raise ConfigError(f"{hf.model_type} with partial_rotary_factor {rope.fraction} is not supported")
    return rope
