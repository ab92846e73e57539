"""Several soft prompts as one, for calls whose rows have different prompts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.errors import ConfigError
from spt_jax.models.attention import GatedPrefix
from spt_jax.prompts.virtual import Head, KeysValues, VirtualPrompt


def stack_prompts(prompts: Sequence[VirtualPrompt]) -> VirtualPrompt:
    """S prompts, of any methods and lengths, with an S axis in front of every part.

    A part that only some of them have is filled up where it is missing: with token rows that no template names, with no
    positions of a prefix, with a gate of 0.

    Args:
      prompts: of one base.

    Raises:
      ConfigError: no prompts; heads of some but not of all, or of unequal numbers of classes; gated prefixes of unequal
        length; prompts of bases of unequal size.
    """
    if not prompts:
        raise ConfigError("there are no prompts to stack")
    sizes = {a.shape[-1] for p in prompts for a in (p.tokens, p.head and p.head.kernel.T) if a is not None}
    if len(sizes) > 1:
        raise ConfigError(f"these prompts are for bases of unequal width: {sorted(sizes)}")
    return VirtualPrompt(
        tokens=_stacked([p.tokens for p in prompts], axis=0),
        shift=_stacked([p.shift for p in prompts], axis=0),
        prefix=_stacked_prefix([p.prefix for p in prompts]),
        gated=_stacked_gated([p.gated for p in prompts]),
        head=_stacked_head([p.head for p in prompts]),
    )


def _stacked(arrays: Sequence[Any], axis: int, *, at_end: bool = True) -> Any:
    """Arrays padded with zeros to the longest along `axis`, an absent one with zeros alone; None if all are absent."""
    like = next((array for array in arrays if array is not None), None)
    if like is None:
        return None
    longest = max(array.shape[axis] for array in arrays if array is not None)
    empty = np.zeros([0 if i == axis else n for i, n in enumerate(like.shape)], np.float32)

    def padded(array: Any) -> jax.Array:
        array = jnp.asarray(empty if array is None else array)
        missing = longest - array.shape[axis]
        pads = [((0, missing) if at_end else (missing, 0)) if i == axis else (0, 0) for i in range(array.ndim)]
        return jnp.pad(array, pads)

    try:
        return jnp.stack([padded(array) for array in arrays])
    except ValueError as error:
        shapes = sorted({array.shape for array in arrays if array is not None})
        raise ConfigError(f"these prompts do not go together: their arrays have the shapes {shapes}") from error


def _stacked_prefix(parts: Sequence[KeysValues | None]) -> KeysValues | None:
    if not any(parts):
        return None
    lengths = [0 if part is None else part.keys.shape[1] for part in parts]
    keys, values = (_stacked([part and getattr(part, name) for part in parts], axis=1) for name in ("keys", "values"))
    return KeysValues(keys, values, jnp.asarray(lengths, jnp.int32))


def _stacked_gated(parts: Sequence[GatedPrefix | None]) -> GatedPrefix | None:
    if not any(parts):
        return None
    # The last layers are those that all have, so that missing ones stand in front. Rows are for files alone.
    return GatedPrefix(
        *(
            _stacked([part and getattr(part, name) for part in parts], axis=0, at_end=False)
            for name in ("keys", "values", "gates")
        )
    )


def _stacked_head(parts: Sequence[Head | None]) -> Head | None:
    if not any(parts):
        return None
    if not all(parts):
        raise ConfigError("some of these prompts have a head and some have not; evaluate them apart")
    return Head(*(_stacked([part and getattr(part, name) for part in parts], axis=0) for name in ("kernel", "bias")))
