"""Logits and scores of hidden states by the output matrix."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spt_jax.models.attention import soft_capped
from spt_jax.models.layers import dense, table_rows
from spt_jax.models.model import TargetScores
from spt_jax.models.quantized import TableArray
from spt_jax.models.vocabulary import log_sum_exp


def matrix_products(
    hidden: Float[Array, "*B D"], matrix: Float[Array, "..."] | TableArray, *, by_token: bool
) -> Float[Array, "*B V"]:
    """Returns the products of hidden states with the output matrix, float32.

    Args:
      hidden: the hidden states.
      matrix: the matrix.
      by_token: whether it is [V, D], as an embedding table, and not [D, V]. A `TableArray` is [V, D] in both cases.
    """
    if isinstance(matrix, TableArray):
        return matrix.products(hidden)
    kernel = matrix.T if by_token else matrix
    return jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def matrix_rows(
    matrix: Float[Array, "..."] | TableArray, ids: Int[Array, "*B"], *, by_token: bool
) -> Float[Array, "*B D"]:
    """Returns the rows of tokens of the output matrix, without a transposed copy of it.

    Args:
      matrix: the matrix.
      ids: the tokens.
      by_token: as in `matrix_products`.
    """
    if by_token or isinstance(matrix, TableArray):
        return table_rows(matrix, ids)
    return jnp.moveaxis(jnp.take(matrix, ids, axis=1), 0, -1)


def target_scores(
    states: Float[Array, "B Q D"],
    at: Int[Array, "B M"],
    ids: Int[Array, "B M K"],
    matrix: Float[Array, "V D"] | TableArray,
    rows_of: Callable[[Int[Array, "B M K"]], Float[Array, "B M K D"]],
    *,
    cap: float | None = None,
    bias: Float[Array, " V"] | None = None,
) -> TargetScores:
    """Returns the scores of K ids per target, by a chunked log-sum-exp over the vocabulary.

    Args:
      states: hidden states at Q positions, with the scale of the logits.
      at: for each of M targets, the index of its state.
      ids: for each target, the ids to score.
      matrix: the output matrix, whose gradient is not computed.
      rows_of: returns its rows by token.
      cap: soft cap of the logits.
      bias: bias of the logits.
    """
    matrix = jax.lax.stop_gradient(matrix)
    matrix = matrix if isinstance(matrix, TableArray) else matrix.astype(states.dtype)
    targets = jax.lax.stop_gradient(rows_of(ids)).astype(states.dtype)
    at_targets = functools.partial(jnp.take_along_axis, indices=at, axis=1)
    log_sums = at_targets(log_sum_exp(states, matrix, cap, bias))
    states_at_targets = jnp.take_along_axis(states, at[:, :, None], axis=1)
    chosen = jnp.einsum("bmd,bmkd->bmk", states_at_targets, targets, preferred_element_type=jnp.float32)
    chosen = chosen if bias is None else chosen + jnp.take(bias, ids)
    log_probabilities = soft_capped(chosen, cap) - log_sums[:, :, None]
    if cap is not None:
        return TargetScores(log_probabilities, None)
    means = at_targets(
        jnp.dot(states, dense(matrix).mean(axis=0).astype(states.dtype), preferred_element_type=jnp.float32)
    )
    means = means if bias is None else means + bias.mean()
    return TargetScores(log_probabilities, means - log_sums)
