"""What families with recurrent layers share: where convolutions and Mamba-2 layers are stored."""

import math
from collections.abc import Iterable
from typing import Any

from spt_jax.bases.families.family import Origin, Part, joined_projection, projections
from spt_jax.errors import ConfigError
from spt_jax.models.mamba_config import MambaConfig


def convolution_origins(
    parts: Iterable[tuple[str, int]], module: str, width: int, *, bias: bool = False
) -> dict[str, Origin]:
    """Returns the origins of causal depthwise convolutions that one tensor [channels, 1, width] holds.

    Args:
      parts: path in the layer and channels of each, in their stored order.
      module: name of the module that holds them.
      width: tokens that they read.
      bias: whether they have a bias.
    """
    sizes = list(parts)
    shape = sum(size for _, size in sizes), 1, width
    table, start = {}, 0
    for name, size in sizes:
        part = Part(0, start, start + size)
        table[name] = Origin(f"{module}.weight", transpose=True, view=shape, take=part, shape=shape)
        if bias:
            table[f"{name}_bias"] = Origin(f"{module}.bias", take=part)
        start += size
    return table


def mamba_config(hf: Any, width: int, **changes: Any) -> MambaConfig:
    """Returns the Mamba-2 layers of a config.

    Args:
      hf: the transformers config.
      width: size of the values of all heads.
      **changes: fields in which the family differs.

    Raises:
      ConfigError: for an option that the layer does not have, and for sizes that contradict each other.
    """
    if hf.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {hf.hidden_act!r} is not supported for {hf.model_type}; only 'silu' is")
    low, high = hf.time_step_limit if hf.time_step_limit is not None else (0.0, math.inf)
    if low > 0 or high < math.inf:
        raise ConfigError(f"time_step_limit {hf.time_step_limit} is not supported for {hf.model_type}")
    if hf.mamba_n_heads * hf.mamba_d_head != width:
        raise ConfigError(
            f"{hf.mamba_n_heads} heads (mamba_n_heads) of {hf.mamba_d_head} numbers (mamba_d_head) are not the"
            f" {width} numbers of a Mamba layer"
        )
    fields = {
        "heads": hf.mamba_n_heads,
        "groups": hf.mamba_n_groups,
        "head_size": hf.mamba_d_head,
        "state_size": hf.mamba_d_state,
        "convolution_width": hf.mamba_d_conv,
        "convolution_bias": bool(hf.mamba_conv_bias),
        "input_bias": bool(hf.mamba_proj_bias),
        "output_bias": bool(hf.mamba_proj_bias),
        "norm_epsilon": float(hf.rms_norm_eps),
    }
    return MambaConfig(**{**fields, **changes})


def mamba_origins(sizes: MambaConfig, module: str) -> dict[str, Origin]:
    """Returns where the parameters of a Mamba-2 layer are stored, by their paths in it.

    Args:
      sizes: of the layer.
      module: what the names start with.
    """
    values, keys = sizes.value_width, sizes.key_width
    maps = [("gate", values), ("value", values), ("key", keys), ("query", keys), ("step", sizes.heads)]
    convolved = [(f"{name}_convolution", size) for name, size in maps[1:4]]
    width, bias = sizes.convolution_width, sizes.convolution_bias
    table = {
        **joined_projection(maps, f"{module}in_proj", sizes.input_bias),
        **convolution_origins(convolved, f"{module}conv1d", width, bias=bias),
        **projections([("output", "out_proj", sizes.output_bias)], module),
        **{ours: Origin(f"{module}{theirs}") for ours, theirs in _OTHERS.items()},
    }
    return table if sizes.norm == "none" else table | {"norm/scale": Origin(f"{module}norm.weight")}


_OTHERS = {"a_log": "A_log", "dt_bias": "dt_bias", "skip": "D"}
