"""Relative position biases in logarithmic buckets (T5, Raffel et al. 2020, arXiv 1910.10683)."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def position_bucket(
    distances: Int[Array, "*B"], *, bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "*B"]:
    """Returns the bucket of each distance from query to key, as in Mesh TensorFlow's T5.

    Half of the buckets are for one distance each, the others for logarithmic ranges up to `max_distance`.

    Args:
      distances: position of the key minus position of the query.
      bidirectional: whether later keys have buckets of their own, the second half; otherwise they have that of
        distance 0.
      buckets: the number of buckets.
      max_distance: the distance from which on all are in the last bucket.
    """
    count = buckets // 2 if bidirectional else buckets
    offset = jnp.where(distances > 0, count, 0) if bidirectional else 0
    apart = jnp.abs(distances) if bidirectional else jnp.maximum(-distances, 0)
    exact = count // 2
    ratio = jnp.log(jnp.maximum(apart, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (count - exact)).astype(jnp.int32)
    return offset + jnp.where(apart < exact, apart, jnp.minimum(far, count - 1))


def bias_of(table: Float[Array, "buckets N"], buckets: Int[Array, "B T S"]) -> Float[Array, "B N T S"]:
    """Returns the bias of each head, float32.

    Args:
      table: the bias of each bucket and head.
      buckets: the bucket of each query and key.
    """
    return jnp.moveaxis(jnp.take(table.astype(jnp.float32), buckets, axis=0), -1, 1)
