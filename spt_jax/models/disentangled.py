"""Disentangled attention (DeBERTa, He et al. 2021, arXiv 2006.03654): terms of scores that depend on distances."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spt_jax.models.disentangled_config import DisentangledConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distances:
    """The distances between the tokens of each row.

    Attributes:
      embeddings: embeddings of distances, R of them.
      rows: for each query and key of a row, the index of the embedding of their distance.
    """

    embeddings: Float[Array, "R D"]
    rows: Int[Array, "B T T"]


@functools.lru_cache(maxsize=16)
def row_by_distance(config: DisentangledConfig, reach: int) -> np.ndarray:
    """Returns the index of the embedding of each distance, int32 [2 reach + 1], for distances from -reach to reach.

    The distance is the position of the query minus that of the key. Logarithms are those of float32, as in
    transformers' `make_log_bucket_position`.

    Args:
      config: of the attention.
      reach: the largest distance.
    """
    distances = np.arange(-reach, reach + 1)
    if not config.logarithmic:
        return np.clip(distances + config.span, 0, 2 * config.span - 1).astype(np.int32)
    half = config.span // 2
    apart = np.maximum(np.abs(distances), half)
    ratio = np.log(apart.astype(np.float32) / np.float32(half)) / np.log(np.float32((config.max_distance - 1) / half))
    far = np.ceil(ratio * np.float32(half - 1)) + half
    bucket = np.where(np.abs(distances) <= half, distances, far * np.sign(distances))
    return np.clip(bucket.astype(np.int64) + config.span, 0, 2 * config.span - 1).astype(np.int32)


def occurring(config: DisentangledConfig, length: int) -> range:
    """Returns the indices of the embeddings of the distances in rows of this many tokens.

    Args:
      config: of the attention.
      length: the number of tokens.
    """
    by_distance = row_by_distance(config, max(length - 1, 0))
    return range(int(by_distance.min()), int(by_distance.max()) + 1)


def distances_of(
    config: DisentangledConfig, embeddings: Float[Array, "E D"], positions: Int[Array, "B T"]
) -> Distances:
    """Returns the distances between the tokens of each row, and the embeddings of those that can occur.

    Args:
      config: of the attention.
      embeddings: the embeddings of all distances.
      positions: the positions of the tokens of each row; those of an example are consecutive.
    """
    reach, used = positions.shape[1] - 1, occurring(config, positions.shape[1])
    distances = positions[:, :, None] - positions[:, None, :]
    # Tokens of different examples may be further apart, but do not see each other.
    rows = jnp.take(jnp.asarray(row_by_distance(config, reach)), distances + reach, mode="clip") - used.start
    return Distances(embeddings[used.start : used.stop], rows)


def distance_terms(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T N H"],
    rows: Int[Array, "B T T"],
    *,
    key: Float[Array, "R N H"] | None,
    query: Float[Array, "R N H"] | None,
    scale: float,
) -> Float[Array, "B N T T"]:
    """Returns the sum of the terms of scores that depend on distances, float32.

    Each product is computed for every distance and then picked, so that no array has both tokens and H.

    Args:
      queries: the queries of tokens.
      keys: the keys of tokens.
      rows: the index of the distance of each query and key.
      key: the keys of distances, for products with queries; None for no such term.
      query: the queries of distances, for products with keys; None for no such term.
      scale: factor of the products.
    """
    found = jnp.zeros((), jnp.float32)
    if key is not None:
        products = jnp.einsum("btnh,rnh->bntr", queries, key, preferred_element_type=jnp.float32)
        found = found + jnp.take_along_axis(products, rows[:, None], axis=-1)
    if query is not None:
        products = jnp.einsum("bsnh,rnh->bnsr", keys, query, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(products, rows.swapaxes(1, 2)[:, None], axis=-1)
        found = found + picked.swapaxes(2, 3)
    return found * scale
