"""Attention over several sources of keys at once, and attention masks.

A query attends to a list of sources (a shared prefix, a cache, its own row) under **one** softmax. Results are not
merged by log-sum-exp, because JAX's attention stops its gradient, and a shared prefix is not copied to every row.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from spt_jax.models.kernels import Kernel, attend_fused
from spt_jax.models.memory import Memory

# A position after all queries, which hides the padding of a prefix.
NEVER = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """Positions and segments of the tokens of a batch of rows.

    Attributes:
      positions: position of each token in its example, for RoPE and causality.
      segments: index of the example in its row, from 1; 0 marks padding.
      parents: a second segment whose tokens are visible (a verbalizer sees its example); 0 for none.
      prompt_index: which of S stacked prompts each row uses; None if all rows share one prompt.
      ids: id of each token; from V on, it is virtual. Only bases with embeddings by layer read them, and need them.
      pinned: the tokens that a sliding window never hides from later ones; None for none.
      decoder: of an encoder-decoder, the indices in the row of the tokens that its decoder reads, with T for padding;
        None if there are none. Their positions count from 0 again.
      types: the token type of each token, in models that have some; None if all have the first.
      inputs: the tokens that virtual tokens of the same example depend on, for prompts with `VirtualPrompt.instance`;
        None for all of its real tokens.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    parents: Int[Array, "B T"]
    prompt_index: Int[Array, " B"] | None = None
    ids: Int[Array, "B T"] | None = None
    pinned: Bool[Array, "B T"] | None = None
    decoder: Int[Array, "B U"] | None = None
    types: Int[Array, "B T"] | None = None
    inputs: Bool[Array, "B T"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """What all layers remember of earlier tokens that every row follows.

    It is float32 and cast where it is used, so that the cotangents of many rows are summed in float32. With an S axis
    it belongs to S stacked prompts, and each row uses the one of its `Stream.prompt_index`; the padding of shorter
    ones has the position NEVER.

    Attributes:
      memory: keys (after RoPE) and values [*S L P K H], or states [*S L ...].
      positions: the position of each key.
      pinned: the positions that a sliding window never hides; None for none.
      segments: of a prefix that holds several prompts in place of an S axis, the segment of each key: a query sees
        those of its own segment and of its parent. The axes of its memory are those of a `Cache` without rows,
        [L K H P] and [L K P H]. None if all rows follow the whole prefix.
    """

    memory: Memory
    positions: Int[Array, "*S P"]
    pinned: Bool[Array, "*S P"] | None = None
    segments: Int[Array, " P"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedPrefix:
    """Keys and values of the last G layers, with a separate softmax and a gate that scales its result.

    LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199). Every token attends to all of them, at any position.

    Attributes:
      memory: keys without RoPE, and values; a group has those of its layers that are among the last G.
      gates: one gate per layer.
      rows: the rows that keys and values were computed from. No layer uses them; they are stored in files of other
        libraries.
    """

    memory: Memory
    gates: Float[Array, "*S G"]
    rows: Float[Array, "*S G P D"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearMemory:
    """A linear map of each layer that adds a term to the attention output outside the softmax.

    Prefix-Tuning+ (Wang et al. 2025, arXiv 2506.13674): the output of a query head for the query q is that of attention
    plus elu(q) M, where M is the map of its key/value head. No number of keys dilutes the term, and no position or mask
    changes it. The query is that of the attention scores, after RoPE.

    Attributes:
      maps: the maps of the layers of each group, float32; Hv is the size of a value.
    """

    maps: Mapping[str, Float[Array, "*S L K H Hv"]]


def linear_term(queries: Float[Array, "B T N H"], maps: Float[Array, "*B K H Hv"]) -> Float[Array, "B T N Hv"]:
    """Returns the term that a `LinearMemory` adds to the attention output of one layer.

    Args:
      queries: the queries of the attention scores.
      maps: the layer's map of each key/value head, which all rows share or with a B axis.
    """
    features = jax.nn.elu(grouped_heads(queries, maps.shape[-3]))
    # Cast here, so that the cotangents of all rows are summed in float32.
    product = jnp.matmul(features, maps.astype(queries.dtype), preferred_element_type=jnp.float32)
    return ungrouped_heads(product.astype(queries.dtype), queries.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What all layers remember of earlier tokens of each row. Empty slots have segment 0.

    The capacity C may exceed the number of positions S; slots from S on are not read. Of an encoder-decoder, the first
    slots are the encoder's tokens, and only cross-attention has keys and values for them; the others are the decoder's,
    and only its self-attention has keys and values for those.

    Attributes:
      memory: keys [L B K H C] and values [L B K C H], or states [L B ...]. The axes are in the order in which the
        matrix products of attention read them, which avoids a copy of the cache in every decoding step.
      positions: the position of each slot's token.
      segments: the segment of each slot's token.
      pinned: the slots that a sliding window never hides; None for none.
    """

    memory: Memory
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    pinned: Bool[Array, "B S"] | None = None


def visible(
    queries: Stream, key_positions: Int[Array, "B S"], key_segments: Int[Array, "B S"] | None, *, causal: bool = True
) -> Bool[Array, "B T S"]:
    """Returns a mask that is True where a query may attend to a key: related and, if `causal`, not later.

    A key is related if its segment is the segment or the parent of the query. With `key_segments=None`, as for a
    prefix, all keys are related to all queries.
    """
    last = queries.positions if causal else jnp.full_like(queries.positions, NEVER - 1)
    seen = key_positions[:, None, :] <= last[:, :, None]
    if key_segments is None:
        return seen
    return related(queries, key_segments) & seen


def related(queries: Stream, key_segments: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Returns a mask that is True where the segment of a key is the segment or the parent of the query."""
    same = key_segments[:, None, :] == queries.segments[:, :, None]
    parent = (key_segments[:, None, :] == queries.parents[:, :, None]) & (queries.parents[:, :, None] > 0)
    return same | parent


def within_window(
    queries: Stream,
    key_positions: Int[Array, "B S"],
    window: int,
    pinned: Bool[Array, "B S"] | None = None,
    *,
    causal: bool = True,
) -> Bool[Array, "B T S"]:
    """Returns a mask that is True where the key is among the last `window` positions up to that of the query.

    It is also True for keys that are pinned and, unless `causal`, for the first `window` positions from the query's on.
    """
    before = queries.positions[:, :, None] - key_positions[:, None, :]
    near = before < window if causal else jnp.abs(before) < window
    return near if pinned is None else near | pinned[:, None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """Keys and values of one layer to attend to, with their mask. Without a B axis, all rows share them.

    Attributes:
      bias: is added to the scaled scores; axes of size 1 are broadcast.
    """

    keys: Float[Array, "*B S K H"]
    values: Float[Array, "*B S K Hv"]
    mask: Bool[Array, "B T S"]
    bias: Float[Array, "#B N #T S"] | None = None


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How attention scores are computed from the product of query and key.

    Attributes:
      scale: factor of the product.
      cap: soft cap of the scaled score, cap tanh(score / cap) (Gemma 2, Riviere et al. 2024, arXiv 2408.00118); None
        for no cap.
    """

    scale: float
    cap: float | None = None


@jax.named_scope("attention")
def attend(
    queries: Float[Array, "B T N H"],
    sources: Sequence[Source],
    scoring: Scoring | None = None,
    *,
    sinks: Float[Array, " N"] | None = None,
    kernel: Kernel = "xla",
    mesh: Mesh | None = None,
) -> Float[Array, "B T N Hv"]:
    """Computes grouped-query attention with one softmax over all sources.

    Scores and softmax are float32. A query whose keys are all masked (padding) gets a mean of values instead of NaN.
    A source may have no positions, as the prefix of a prompt that has only recurrent states.

    Args:
      queries: queries, after RoPE.
      sources: keys and values to attend to.
      scoring: scale and soft cap of scores; default a scale of H^-0.5.
      sinks: a score of each head that takes part in the softmax and has the value 0 (Xiao et al. 2023, arXiv
        2309.17453, as learned by gpt-oss).
      kernel: "xla" runs anywhere; fused ones must pass `kernels.check_kernel`, and take neither biases nor sinks.
      mesh: the mesh that fused kernels are sharded over.

    Returns:
      Mixed values in the dtype of the queries.
    """
    scoring = scoring or Scoring(queries.shape[-1] ** -0.5)
    sources = [source for source in sources if source.mask.shape[-1]]
    if kernel != "xla":
        one = _as_one(sources)
        return attend_fused(kernel, mesh, queries, one.keys, one.values, one.mask, scale=scoring.scale, cap=scoring.cap)
    grouped = grouped_heads(queries, sources[0].keys.shape[-2])
    scores = [scores_of(grouped, source, scoring) for source in sources]
    maxima = [s.max(-1, keepdims=True) for s in scores]
    if sinks is not None:
        maxima.append(_by_row(sinks, queries.shape, sources[0].keys.shape[-2]))
    highest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, maxima))
    weights = [jnp.exp(score - highest) for score in scores]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    if sinks is not None:
        total = total + jnp.exp(maxima[-1] - highest)
    mixed = [mix(w.astype(queries.dtype), source) for w, source in zip(weights, sources, strict=True)]
    return ungrouped_heads((sum(mixed[1:], mixed[0]) / total).astype(queries.dtype), queries.shape)


def _by_row(sinks: Float[Array, " N"], shape: tuple[int, ...], kv_heads: int) -> Float[Array, "1 K GT 1"]:
    """Returns the sink of each query in the order of `grouped_heads`; `shape` is that of the queries, [B, T, N, H]."""
    by_group = sinks.astype(jnp.float32).reshape(1, kv_heads, shape[2] // kv_heads, 1)
    return jnp.broadcast_to(by_group, (*by_group.shape[:3], shape[1])).reshape(1, kv_heads, -1, 1)


def attention_weights(
    queries: Float[Array, "B T N H"],
    sources: Sequence[Source],
    scoring: Scoring,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T S"]:
    """Returns the attention weights over the keys of all sources, averaged over heads, float32."""
    sources = [source for source in sources if source.mask.shape[-1]]
    kv_heads = sources[0].keys.shape[-2]
    grouped = grouped_heads(queries, kv_heads)
    scores = jnp.concatenate([scores_of(grouped, source, scoring) for source in sources], axis=-1)
    if sinks is not None:
        own = jnp.broadcast_to(_by_row(sinks, queries.shape, kv_heads), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, own], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = weights if sinks is None else weights[..., :-1]
    return weights.reshape(weights.shape[0], -1, queries.shape[1], weights.shape[-1]).mean(axis=1)


def _as_one(sources: Sequence[Source]) -> Source:
    """Concatenates all sources into one with a B axis."""
    rows = sources[0].mask.shape[0]

    def of_row(array: Array) -> Array:
        if array.ndim == 4:
            return array
        # Broadcast in float32, so that the cotangents of all rows are summed in float32.
        return jnp.broadcast_to(array.astype(jnp.float32)[None], (rows, *array.shape)).astype(array.dtype)

    keys, values = (
        jnp.concatenate([of_row(getattr(source, name)) for source in sources], axis=1) for name in ("keys", "values")
    )
    return Source(keys, values, jnp.concatenate([source.mask for source in sources], axis=2))


def grouped_heads(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K GT H"]:
    """Groups queries by their key/value head, N = K G.

    Batched matrix products over [B, K] with contiguous operands are twice as fast on CPU as a layout chosen by XLA.
    """
    batch, length, heads, size = x.shape
    groups = heads // kv_heads
    x = x.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    return x.reshape(batch, kv_heads, groups * length, size)


def ungrouped_heads(x: Float[Array, "B K GT Hv"], shape: tuple[int, ...]) -> Float[Array, "B T N Hv"]:
    """The inverse of `grouped_heads`; `shape` is that of the queries, [B, T, N, H]."""
    batch, length, heads, _ = shape
    kv_heads, size = x.shape[1], x.shape[3]
    x = x.reshape(batch, kv_heads, heads // kv_heads, length, size).transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, length, heads, size)


def scores_of(queries: Float[Array, "B K GT H"], source: Source, scoring: Scoring) -> Float[Array, "B K GT S"]:
    """Returns scores in float32, with the lowest finite number where the mask is False."""
    batch, kv_heads, rows, _ = queries.shape
    if source.keys.ndim == 4:
        keys = source.keys.transpose(0, 2, 3, 1)
        scores = jnp.matmul(queries, keys, preferred_element_type=jnp.float32)
    else:
        scores = _of_all_rows(queries, source.keys.transpose(1, 2, 0))
    scores = soft_capped(scores * scoring.scale, scoring.cap)
    length = source.mask.shape[1]
    by_query = scores.reshape(batch, kv_heads, rows // length, length, -1)
    if source.bias is not None:
        by_query = by_query + source.bias.reshape(-1, kv_heads, rows // length, *source.bias.shape[2:])
    masked = jnp.where(source.mask[:, None, None], by_query, jnp.finfo(jnp.float32).min)
    return masked.reshape(scores.shape)


def alibi_slopes(heads: int) -> np.ndarray:
    """Returns the slope of each head, float32 [N] (Press et al. 2022, arXiv 2108.12409).

    They are a geometric sequence for a power of two of heads; for other numbers, every second of the sequence for the
    next power of two follows.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return np.asarray(slopes, np.float32)


def soft_capped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Returns cap tanh(x / cap), or x if cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def soft_cap_slope(capped: Float[Array, "..."], cap: float | None) -> Float[Array, "..."] | float:
    """Returns the derivative of `soft_capped`, given its result; 0 beyond the cap, as for the score of a masked key."""
    return 1.0 if cap is None else 1.0 - jnp.square(jnp.clip(capped / cap, -1.0, 1.0))


def mix(weights: Float[Array, "B K GT S"], source: Source) -> Float[Array, "B K GT Hv"]:
    """Returns the sums of values with these weights, float32."""
    if source.values.ndim == 4:
        values = source.values.transpose(0, 2, 1, 3)
        return jnp.matmul(weights, values, preferred_element_type=jnp.float32)
    return _of_all_rows(weights, source.values.transpose(1, 0, 2))


def _of_all_rows(rows: Float[Array, "B K Q M"], matrix: Float[Array, "K M N"]) -> Float[Array, "B K Q N"]:
    """Returns the products of all rows with the same matrices, float32: one product for each key/value head."""
    batch, heads, count, _ = rows.shape
    flat = jnp.swapaxes(rows, 0, 1).reshape(heads, batch * count, -1)
    products = jnp.matmul(flat, matrix, preferred_element_type=jnp.float32)
    return jnp.swapaxes(products.reshape(heads, batch, count, -1), 0, 1)
