"""Attention over several sources of keys at once, and who may see whom.

A query attends to a list of sources (a shared prefix, a cache, its own row) under **one** softmax. Nothing is merged by
log-sum-exp, whose gradient JAX's own attention stops, and a shared prefix is never copied to every row.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from spt_jax.models.kernels import Kernel, attend_fused

# A place in the sequence that no query reaches, which hides the padding of a prefix.
NEVER = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """Where each token of some rows stands.

    positions: place in its own example, which RoPE and causality read.
    segments: which example of the row it belongs to, from 1; 0 marks padding.
    parents: the segment whose tokens it sees besides its own (a verbalizer sees its example); 0 for none.
    prompt_index: which of S prompts each row has, where a call carries several; None where all rows share one.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    parents: Int[Array, "B T"]
    prompt_index: Int[Array, " B"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys (after RoPE) and values that every row sees, for all layers, at most one per position.

    They stay float32 and are cast where they are used, so that cotangents of many rows add up in float32. With an S
    axis they are those of several prompts, of which each row sees its `Stream.prompt_index`; what pads a shorter one
    stands at NEVER.
    """

    keys: Float[Array, "*S L P K H"]
    values: Float[Array, "*S L P K H"]
    positions: Int[Array, "*S P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedPrefix:
    """Keys and values of the last G layers, attended to under a softmax of their own whose result is scaled by a gate.

    LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199). Every token sees all of it, wherever it stands.

    rows: what keys and values were made from; no layer reads them, other libraries' files hold them.
    """

    keys: Float[Array, "*S G P K H"]
    values: Float[Array, "*S G P K H"]
    gates: Float[Array, "*S G"]
    rows: Float[Array, "*S G P D"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of earlier tokens of each row. Slots that hold nothing yet have segment 0.

    There may be more of them than positions, C > S: what lies beyond is not read. They lie in the order in which the
    products of attention read them, which saves every step of decoding a copy of them all.
    """

    keys: Float[Array, "L B K H C"]
    values: Float[Array, "L B K C H"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]


def to_cache(
    keys: Float[Array, "*N C K H"], values: Float[Array, "*N C K H"]
) -> tuple[Float[Array, "*N K H C"], Float[Array, "*N K C H"]]:
    """Keys and values in the order of a `Cache`."""
    return jnp.moveaxis(keys, -3, -1), jnp.swapaxes(values, -3, -2)


def from_cache(
    keys: Float[Array, "*N K H C"], values: Float[Array, "*N K C H"]
) -> tuple[Float[Array, "*N C K H"], Float[Array, "*N C K H"]]:
    """The inverse of `to_cache`."""
    return jnp.moveaxis(keys, -1, -3), jnp.swapaxes(values, -3, -2)


def visible(
    queries: Stream, key_positions: Int[Array, "B S"], key_segments: Int[Array, "B S"] | None
) -> Bool[Array, "B T S"]:
    """True where a query sees a key: related and not later.

    A key is related when its segment is the query's own or the query's parent. `key_segments=None` relates every key
    to every query, as a prefix is.
    """
    causal = key_positions[:, None, :] <= queries.positions[:, :, None]
    if key_segments is None:
        return causal
    own = key_segments[:, None, :] == queries.segments[:, :, None]
    parent = (key_segments[:, None, :] == queries.parents[:, :, None]) & (queries.parents[:, :, None] > 0)
    return (own | parent) & causal


def within_window(queries: Stream, key_positions: Int[Array, "B S"], window: int) -> Bool[Array, "B T S"]:
    """True where the key is one of the last `window` positions up to the query's own."""
    return queries.positions[:, :, None] - key_positions[:, None, :] < window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """Keys and values of one layer that queries may attend to. Those without a B dimension are shared by all rows."""

    keys: Float[Array, "*B S K H"]
    values: Float[Array, "*B S K H"]
    mask: Bool[Array, "B T S"]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How the product of a query and a key becomes a score.

    scale: what it is multiplied with.
    cap: the score then becomes cap tanh(score / cap) (Gemma 2, Riviere et al. 2024, arXiv 2408.00118); None for no cap.
    """

    scale: float
    cap: float | None = None


@jax.named_scope("attention")
def attend(
    queries: Float[Array, "B T N H"],
    sources: Sequence[Source],
    scoring: Scoring | None = None,
    *,
    kernel: Kernel = "xla",
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention over all sources together, with grouped queries; scores are scaled by H^-0.5 unless told.

    kernel: "xla" runs anywhere; the fused ones must pass `kernels.check_kernel`, and lie on the mesh by themselves.

    Scores and softmax are float32; the result has the queries' dtype. A query that sees nothing (padding) gets a mean
    of values instead of NaN.
    """
    scoring = scoring or Scoring(queries.shape[-1] ** -0.5)
    if kernel != "xla":
        one = _as_one(sources)
        return attend_fused(kernel, mesh, queries, one.keys, one.values, one.mask, scale=scoring.scale, cap=scoring.cap)
    grouped = grouped_heads(queries, sources[0].keys.shape[-2])
    scores = [scores_of(grouped, source, scoring) for source in sources]
    highest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [s.max(-1, keepdims=True) for s in scores]))
    weights = [jnp.exp(score - highest) for score in scores]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    mixed = [mix(w.astype(queries.dtype), source) for w, source in zip(weights, sources, strict=True)]
    return ungrouped_heads((sum(mixed[1:], mixed[0]) / total).astype(queries.dtype), queries.shape)


def attention_weights(
    queries: Float[Array, "B T N H"], sources: Sequence[Source], scoring: Scoring
) -> Float[Array, "B T S"]:
    """The weights by which `attend` mixes the values of all sources together, means over heads, float32."""
    grouped = grouped_heads(queries, sources[0].keys.shape[-2])
    scores = jnp.concatenate([scores_of(grouped, source, scoring) for source in sources], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)
    return weights.reshape(weights.shape[0], -1, queries.shape[1], weights.shape[-1]).mean(axis=1)


def _as_one(sources: Sequence[Source]) -> Source:
    """All keys of a row behind each other."""
    rows = sources[0].mask.shape[0]

    def of_row(array: Array) -> Array:
        if array.ndim == 4:
            return array
        # Copied in float32, so that the cotangents of all rows add up in it.
        return jnp.broadcast_to(array.astype(jnp.float32)[None], (rows, *array.shape)).astype(array.dtype)

    keys, values = (
        jnp.concatenate([of_row(getattr(source, name)) for source in sources], axis=1) for name in ("keys", "values")
    )
    return Source(keys, values, jnp.concatenate([source.mask for source in sources], axis=2))


def grouped_heads(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K GT H"]:
    """Queries by the key/value head that they read: N = K G.

    Batched matrix products over [B, K] with contiguous operands are twice as fast on CPU as letting XLA find a layout.
    """
    batch, length, heads, size = x.shape
    groups = heads // kv_heads
    x = x.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    return x.reshape(batch, kv_heads, groups * length, size)


def ungrouped_heads(x: Float[Array, "B K GT H"], shape: tuple[int, ...]) -> Float[Array, "B T N H"]:
    """Back to `shape`, [B, T, N, H]."""
    batch, length, heads, size = shape
    kv_heads = x.shape[1]
    return x.reshape(batch, kv_heads, heads // kv_heads, length, size).transpose(0, 3, 1, 2, 4).reshape(shape)


def scores_of(queries: Float[Array, "B K GT H"], source: Source, scoring: Scoring) -> Float[Array, "B K GT S"]:
    """Scores in float32, with the lowest finite number where the mask hides a key."""
    batch, kv_heads, rows, _ = queries.shape
    if source.keys.ndim == 4:
        keys = source.keys.transpose(0, 2, 3, 1)
        scores = jnp.matmul(queries, keys, preferred_element_type=jnp.float32)
    else:
        scores = jnp.einsum("bkqh,skh->bkqs", queries, source.keys, preferred_element_type=jnp.float32)
    scores = soft_capped(scores * scoring.scale, scoring.cap)
    length = source.mask.shape[1]
    by_query = scores.reshape(batch, kv_heads, rows // length, length, -1)
    masked = jnp.where(source.mask[:, None, None], by_query, jnp.finfo(jnp.float32).min)
    return masked.reshape(scores.shape)


def soft_capped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap tanh(x / cap): nearly x where x is small, and never beyond the cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def soft_cap_slope(capped: Float[Array, "..."], cap: float | None) -> Float[Array, "..."] | float:
    """The derivative of `soft_capped` by what it gave; 0 for what lies beyond the cap, as a hidden key's score does."""
    return 1.0 if cap is None else 1.0 - jnp.square(jnp.clip(capped / cap, -1.0, 1.0))


def mix(weights: Float[Array, "B K GT S"], source: Source) -> Float[Array, "B K GT H"]:
    """Sums of values by their weights, float32."""
    if source.values.ndim == 4:
        values = source.values.transpose(0, 2, 1, 3)
        return jnp.matmul(weights, values, preferred_element_type=jnp.float32)
    return jnp.einsum("bkqs,skh->bkqh", weights, source.values, preferred_element_type=jnp.float32)
