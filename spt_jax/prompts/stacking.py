"""Stacks several soft prompts, for calls whose rows have different prompts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.errors import ConfigError
from spt_jax.models.attention import GatedPrefix
from spt_jax.prompts.virtual import Head, KeysValues, VirtualPrompt


def stack_prompts(prompts: Sequence[VirtualPrompt]) -> VirtualPrompt:
    """Stacks S prompts, of any methods and lengths, along a new leading S axis.

    A part that only some of the prompts have is padded for the others: with token rows that no template uses, with an
    empty prefix, or with a gate of 0.

    Args:
      prompts: prompts of one frozen base.

    Raises:
      ConfigError: there are no prompts; only some have a head, or their heads have different numbers of classes; gated
        prefixes differ in length; or the prompts are for bases of different sizes.
    """
    if not prompts:
        raise ConfigError("there are no prompts to stack")
    sizes = {a.shape[-1] for p in prompts for a in (p.tokens, p.head and p.head.kernel.T) if a is not None}
    if len(sizes) > 1:
        raise ConfigError(f"these prompts are for bases of different width: {sorted(sizes)}")
    return VirtualPrompt(
        tokens=_stacked([p.tokens for p in prompts], axis=0),
        shift=_stacked([p.shift for p in prompts], axis=0),
        prefix=_stacked_prefix([p.prefix for p in prompts]),
        gated=_stacked_gated([p.gated for p in prompts]),
        head=_stacked_head([p.head for p in prompts]),
    )


def _stacked(arrays: Sequence[Any], axis: int, *, at_end: bool = True) -> Any:
    """Stacks arrays, padded with zeros to the longest along `axis`. An absent one becomes zeros; None if all are."""
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
        raise ConfigError(f"these prompts are not compatible: their arrays have the shapes {shapes}") from error


def _stacked_prefix(parts: Sequence[KeysValues | None]) -> KeysValues | None:
    if not any(parts):
        return None
    lengths = [0 if part is None else part.keys.shape[1] for part in parts]
    keys, values = (_stacked([part and getattr(part, name) for part in parts], axis=1) for name in ("keys", "values"))
    return KeysValues(keys, values, jnp.asarray(lengths, jnp.int32))


def _stacked_gated(parts: Sequence[GatedPrefix | None]) -> GatedPrefix | None:
    if not any(parts):
        return None
    # Gated prefixes end at the last layer, so missing layers are padded at the front. `rows` is only used in files.
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
        raise ConfigError("some of these prompts have a head and others do not; evaluate them separately")
    return Head(*(_stacked([part and getattr(part, name) for part in parts], axis=0) for name in ("kernel", "bias")))
