"""Chunked log-sum-exp over a large vocabulary."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spt_jax.models.attention import soft_cap_slope, soft_capped
from spt_jax.models.quantized.table import TableArray, strided

# Maximum number of logits per chunk; but a chunk has at least CHUNK_ROWS rows, for efficient matrix products.
CHUNK_LOGITS = 2**24
CHUNK_ROWS = 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def log_sum_exp(
    states: Float[Array, "B Q D"],
    matrix: Float[Array, "V D"] | TableArray,
    cap: float | None = None,
    bias: Float[Array, " V"] | None = None,
) -> Float[Array, "B Q"]:
    """Returns log(sum_v exp(states . matrix[v] + bias[v])), float32, with a gradient only for the states.

    The gradient is the mean of the rows of the matrix under the softmax, each row times the slope of its soft cap. When
    differentiated, the forward pass stores that mean, [B, Q, D]. So neither pass holds more than one chunk of the
    [B, Q, V] logits, and no logits are computed twice.

    Args:
      states: hidden states.
      matrix: the output matrix, with a row per token of the vocabulary. Of a quantized one, only a chunk is dense at a
        time.
      cap: soft cap of the logits, as for `soft_capped`.
      bias: bias of the logits; None for none.
    """

    def log_sums(chunk: Array) -> Array:
        if isinstance(matrix, TableArray):
            return _over_table(chunk, matrix, cap, bias)[0]
        return _log_sums(chunk, matrix, cap, bias)[0]

    return by_chunks(log_sums, states, matrix.shape[0])


def _forward(states: Array, matrix: Array | TableArray, cap: float | None, bias: Array | None) -> tuple[Array, Array]:
    def sums_and_means(chunk: Array) -> tuple[Array, Array]:
        if isinstance(matrix, TableArray):
            return _over_table(chunk, matrix, cap, bias)
        log_sums, logits = _log_sums(chunk, matrix, cap, bias)
        weights = (jnp.exp(logits - log_sums[..., None]) * soft_cap_slope(logits, cap)).astype(matrix.dtype)
        return log_sums, jnp.dot(weights, matrix, preferred_element_type=jnp.float32).astype(chunk.dtype)

    return by_chunks(sums_and_means, states, matrix.shape[0])


def _backward(cap: float | None, means: Array, cotangent: Array) -> tuple[Array, None, None]:
    return (cotangent[..., None] * means).astype(means.dtype), None, None


log_sum_exp.defvjp(_forward, _backward)


def _log_sums(states: Array, matrix: Array, cap: float | None, bias: Array | None) -> tuple[Array, Array]:
    logits = jnp.dot(states, matrix.T, preferred_element_type=jnp.float32)
    logits = soft_capped(logits if bias is None else logits + bias[None, None], cap)
    return jax.nn.logsumexp(logits, axis=-1), logits


def _over_table(states: Array, table: TableArray, cap: float | None, bias: Array | None) -> tuple[Array, Array]:
    """Returns the log-sum-exp and the mean row, with sums that are rescaled when a chunk has a higher logit."""
    count = table.chunk_count
    offsets = jnp.zeros(table.shape[0]) if bias is None else bias

    def add(sums: tuple[Array, Array, Array], index: Array) -> tuple[tuple[Array, Array, Array], None]:
        highest, total, mean = sums
        rows = table.chunk(index).astype(states.dtype)
        logits = jnp.dot(states, rows.T, preferred_element_type=jnp.float32)
        logits = soft_capped(logits + strided(offsets, count, index)[None, None], cap)
        new_highest = jnp.maximum(highest, logits.max(axis=-1))
        kept, weights = jnp.exp(highest - new_highest), jnp.exp(logits - new_highest[..., None])
        sloped = (weights * soft_cap_slope(logits, cap)).astype(rows.dtype)
        mean = mean * kept[..., None] + jnp.dot(sloped, rows, preferred_element_type=jnp.float32)
        return (new_highest, total * kept + weights.sum(axis=-1), mean), None

    shape = states.shape[:-1]
    zeros = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(states.shape))
    (highest, total, mean), _ = jax.lax.scan(add, zeros, jnp.arange(count))
    return highest + jnp.log(total), (mean / total[..., None]).astype(states.dtype)


def by_chunks(function: Any, states: Array, vocabulary: int) -> Any:
    """Applies a function to chunks [B, q, D] of states [B, Q, D], one after another. Rows stay on their devices.

    Args:
      function: a function of a chunk, whose results begin with the axes B and q.
      states: the states.
      vocabulary: the number of logits that the function computes for each state.
    """
    batch, outputs, width = states.shape
    rows = max(CHUNK_ROWS, CHUNK_LOGITS // vocabulary)
    count = max(1, math.ceil(batch * outputs / rows))
    if count == 1:
        return function(states)
    size = math.ceil(outputs / count)
    padded = jnp.pad(states, ((0, 0), (0, count * size - outputs), (0, 0)))
    chunks = padded.reshape(batch, count, size, width).swapaxes(0, 1)
    results = jax.lax.map(function, chunks)
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(batch, count * size, *a.shape[3:])[:, :outputs], results)
