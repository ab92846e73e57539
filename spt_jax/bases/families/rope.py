"""Rotary embeddings of transformers' configs."""

import math
from typing import Any

from spt_jax.errors import ConfigError
from spt_jax.models.config import RopeConfig

_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def rope_config(hf: Any, max_length: int | None) -> RopeConfig:
    """The rotary embedding of a config, from `rope_parameters`.

    Raises:
      ConfigError: for a kind of scaling, or an option of one, that the decoder does not have.
    """
    rope = dict(hf.rope_parameters)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise ConfigError(f"RoPE scaling {kind!r} is not supported; supported: default, linear, dynamic, yarn, llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial rotary embeddings are not supported")
    for name in _NEEDED.get(kind, ()):
        if rope.get(name) is None:
            raise ConfigError(f"rope_parameters: RoPE scaling {kind!r} needs {name!r}")
    original = hf.max_position_embeddings
    if kind in ("yarn", "llama3"):
        original = rope.get("original_max_position_embeddings") or original
    factor = float(rope.get("factor") or (hf.max_position_embeddings / original if kind == "yarn" else 1.0))
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
        attention_factor=_yarn_attention_factor(rope, factor) if kind == "yarn" else 1.0,
        dynamic_length=max(max_length or 0, original) if kind == "dynamic" else 0,
    )


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)
