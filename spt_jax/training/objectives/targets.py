"""Values that objectives prepared for the target tokens of scored sequences, at the targets of packed rows."""

import jax.numpy as jnp
from jaxtyping import Array

from spt_jax.data.batches import Rows


def of_targets(values: Array, rows: Rows) -> Array:
    """Returns the values [B, M, K] at the targets of the rows, from those [B, S, N, K] of the targets of S sequences.

    The targets of a sequence are next to each other and in its order. Those of padding have any value.

    Args:
      values: the values of the first N targets of each group of `Rows.target_groups`.
      rows: the rows.
    """
    groups = rows.target_groups
    first = jnp.argmax(groups[:, :, None] == groups[:, None, :], axis=-1)
    count = values.shape[2]
    own = jnp.minimum(jnp.arange(groups.shape[1])[None] - first, count - 1)
    flat = values.reshape(values.shape[0], -1, values.shape[-1])
    return jnp.take_along_axis(flat, (groups * count + own)[:, :, None], axis=1)
