"""Rotary embeddings of transformers' configs."""

import math
from collections.abc import Mapping
from typing import Any

from spt_jax.errors import ConfigError
from spt_jax.models.rope import RopeConfig

_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")


def rope_config(
    hf: Any, max_length: int | None, *, layer_type: str | None = None, interleaved: bool = False
) -> RopeConfig:
    """The rotary embedding of a config, from `rope_parameters`.

    Args:
      hf: a transformers config.
      max_length: the longest sequence of the run.
      layer_type: key of `rope_parameters`, if these differ between types of layers.
      interleaved: whether the family rotates pairs of neighbours.

    Raises:
      ConfigError: for a kind of scaling, or an option of one, that the decoder does not have.
    """
    rope = dict(hf.rope_parameters[layer_type] if layer_type else hf.rope_parameters)
    kind = rope.get("rope_type", "default")
    if kind not in _KINDS:
        raise ConfigError(f"RoPE scaling {kind!r} is not supported; supported: {', '.join(_KINDS)}")
    for name in _NEEDED.get(kind, ()):
        if rope.get(name) is None:
            raise ConfigError(f"rope_parameters: RoPE scaling {kind!r} needs {name!r}")
    query_beta = float(rope.get("llama_4_scaling_beta") or 0.0)
    original = hf.max_position_embeddings
    if kind in ("yarn", "llama3", "longrope") or query_beta:
        original = rope.get("original_max_position_embeddings") or original
    factor = float(rope.get("factor") or (hf.max_position_embeddings / original if kind in ("yarn", "longrope") else 1))
    return RopeConfig(
        kind=kind,
        theta=float(rope["rope_theta"]),
        factor=factor,
        original_max_positions=original,
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=_attention_factor(kind, rope, factor, original),
        dynamic_length=_dynamic_length(kind, max_length, original),
        fraction=float(rope.get("partial_rotary_factor") or 1.0),
        interleaved=interleaved,
        short_factors=_factors(rope, "short_factor") if kind == "longrope" else (),
        long_factors=_factors(rope, "long_factor") if kind == "longrope" else (),
        query_beta=query_beta,
    )


def _dynamic_length(kind: str, max_length: int | None, original: int) -> int:
    """Returns the length that the frequencies depend on; 0 if they do not."""
    if kind == "longrope":  # They depend only on whether the original length is exceeded.
        return min(max(max_length or 0, original), original + 1)
    return max(max_length or 0, original) if kind == "dynamic" else 0


def _factors(rope: Mapping[str, Any], name: str) -> tuple[float, ...]:
    factors = rope[name]
    if not isinstance(factors, list | tuple) or not all(isinstance(factor, int | float) for factor in factors):
        raise ConfigError(f"rope_parameters: {name!r} must be a list of numbers")
    return tuple(float(factor) for factor in factors)


def _attention_factor(kind: str, rope: Mapping[str, Any], factor: float, original: int) -> float:
    """Returns the factor of cosines and sines."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if kind == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)
