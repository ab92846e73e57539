"""Ring attention, for rows whose tokens are split over devices (Liu et al. 2023, arXiv 2310.01889).

Queries stay in place; keys and values rotate around the devices of the "sequence" axis, so that no device ever holds a
full row. The backward pass rotates them once more, and recomputes the weights from the normalizer of each query.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from spt_jax.models.attention import (
    Scoring,
    Source,
    Stream,
    grouped_heads,
    mix,
    scores_of,
    soft_cap_slope,
    ungrouped_heads,
    visible,
    within_window,
)
from spt_jax.models.memory import KeysValues
from spt_jax.runtime.sharding import ROWS, row_shards

AXIS = "sequence"


def splits(mesh: Mesh | None, stream: Stream) -> bool:
    """Returns whether ring attention is used: the mesh splits tokens, and divides rows and tokens evenly."""
    rows, length = stream.positions.shape
    return mesh is not None and mesh.shape[AXIS] > 1 and length % mesh.shape[AXIS] == 0 and rows % row_shards(mesh) == 0


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Static arguments: mesh, scoring, window (0 for none), and whether each row has a separate prefix."""

    mesh: Mesh
    scoring: Scoring
    window: int
    separate_prefixes: bool

    def map(self, function: Any, inputs: Any, outputs: Any) -> Any:
        return jax.shard_map(
            functools.partial(function, self), mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    @property
    def tokens(self) -> P:
        return P(ROWS, AXIS)

    @property
    def heads(self) -> P:
        return P(ROWS, AXIS, "tensor")

    @property
    def normalizers(self) -> P:
        """[B, K, G T, 1], where the entries of each device are contiguous."""
        return P(ROWS, "tensor", AXIS)

    @property
    def arrays(self) -> tuple[P, P, P]:
        prefix = P(ROWS, None, "tensor") if self.separate_prefixes else P(None, "tensor")
        return self.heads, self.heads, prefix

    @property
    def places(self) -> tuple[P, P, P]:
        return self.tokens, P(ROWS) if self.separate_prefixes else P(), P()

    def next(self, tree: Any) -> Any:
        """Returns the arrays of the previous device."""
        count = self.mesh.shape[AXIS]
        return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % count) for i in range(count)])


def ring_attend(
    mesh: Mesh,
    queries: Float[Array, "B T N H"],
    own: KeysValues,
    stream: Stream,
    prefix: KeysValues | None = None,
    prefix_positions: Array | None = None,
    prefix_pinned: Array | None = None,
    *,
    window: int = 0,
    windowed: Bool[Array, ""] | None = None,
    scoring: Scoring | None = None,
) -> Float[Array, "B T N Hv"]:
    """Computes `attention.attend` over a prefix and the rows, with T split over the "sequence" axis of the mesh.

    Args:
      mesh: `splits` must be true for it.
      queries: queries of the rows.
      own: keys and values of the rows.
      stream: positions and segments of the tokens.
      prefix: keys and values, [P, K, H] for all rows or [B, P, K, H] for each row.
      prefix_positions: positions of the prefix, [P] or [B, P].
      prefix_pinned: the positions of the prefix that a window never hides, likewise; None for none.
      window: width of the sliding window; 0 for none.
      windowed: whether this layer uses the window; None for always.
      scoring: as for `attend`.
    """
    scoring = scoring or Scoring(queries.shape[-1] ** -0.5)
    if prefix is not None and not prefix.keys.shape[-3]:
        prefix = prefix_positions = prefix_pinned = None
    ring = _Ring(mesh, scoring, window, prefix is not None and prefix.keys.ndim == 4)
    tokens = (stream.positions, stream.segments, stream.parents, stream.pinned)
    windowed = jnp.asarray(window > 0) if windowed is None else windowed
    return _ring_attend(ring, (queries, own, prefix), (tokens, (prefix_positions, prefix_pinned), windowed))


def take_tokens(mesh: Mesh, x: Float[Array, "B T D"], places: Int[Array, "B Q"]) -> Float[Array, "B Q D"]:
    """Computes `jnp.take_along_axis(x, places[:, :, None], axis=1)` for T split over a mesh (see `splits`)."""

    def of_device(x: Array, places: Array) -> Array:
        local = places - jax.lax.axis_index(AXIS) * x.shape[1]
        inside = (local >= 0) & (local < x.shape[1])
        rows = jnp.take_along_axis(x, jnp.where(inside, local, 0)[:, :, None], axis=1)
        return jax.lax.psum(jnp.where(inside[:, :, None], rows, 0), AXIS)

    return jax.shard_map(of_device, mesh=mesh, in_specs=(P(ROWS, AXIS), P(ROWS)), out_specs=P(ROWS))(x, places)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attend(ring: _Ring, arrays: Any, places: Any) -> Array:
    return _forward(ring, arrays, places)[0]


def _forward(ring: _Ring, arrays: Any, places: Any) -> tuple[Array, Any]:
    outputs = (ring.heads, ring.normalizers, ring.normalizers)
    out, highest, total = ring.map(_device_forward, (ring.arrays, ring.places), outputs)(arrays, places)
    return out, (arrays, places, out, highest, total)


def _backward(ring: _Ring, saved: Any, cotangent: Array) -> tuple[Any, None]:
    arrays, places, *rest = saved
    inputs = (ring.arrays, ring.places, ring.heads, ring.normalizers, ring.normalizers, ring.heads)
    return ring.map(_device_backward, inputs, ring.arrays)(arrays, places, *rest, cotangent), None


_ring_attend.defvjp(_forward, _backward)


def _sources(ring: _Ring, prefix: Any, places: Any) -> tuple[Source | None, Any]:
    """Returns the prefix as a source (None without one), and a function that makes a source of rotating arrays."""
    (positions, segments, parents, _), of_prefix, windowed = places
    stream = Stream(positions, segments, parents)

    def source(pair: KeysValues, key_positions: Array, key_segments: Array | None, key_pinned: Array | None) -> Source:
        mask = visible(stream, key_positions, key_segments)
        if ring.window:
            mask &= ~windowed | within_window(stream, key_positions, ring.window, key_pinned)
        return Source(pair.keys, pair.values, mask)

    if prefix is None:
        return None, source
    shape = (positions.shape[0], of_prefix[0].shape[-1])
    prefix_positions, prefix_pinned = jax.tree.map(lambda a: jnp.broadcast_to(a, shape), of_prefix)
    return source(prefix, prefix_positions, None, prefix_pinned), source


def _device_forward(ring: _Ring, arrays: Any, places: Any) -> tuple[Array, Array, Array]:
    """Returns output, maximum score and sum of weights of the queries of this device.

    Keys and values make a full rotation, so that all steps share one loop body.
    """
    queries, own, prefix = arrays
    positions, segments, _, pinned = places[0]
    grouped = grouped_heads(queries, own.keys.shape[2])
    prefix_source, source = _sources(ring, prefix, places)

    def update(state: Any, source: Source) -> Any:
        highest, total, mixed = state
        scores = scores_of(grouped, source, ring.scoring)
        higher = jnp.maximum(highest, scores.max(-1, keepdims=True))
        weights, correction = jnp.exp(scores - higher), jnp.exp(highest - higher)
        mixed = correction * mixed + mix(weights.astype(queries.dtype), source)
        return higher, correction * total + weights.sum(-1, keepdims=True), mixed

    def step(carry: Any, _: None) -> tuple[Any, None]:
        state, rotating = carry
        return (update(state, source(*rotating)), ring.next(rotating)), None

    zeros = jnp.zeros((*grouped.shape[:3], 1), jnp.float32)
    state = (zeros - jnp.inf, zeros, jnp.zeros((*grouped.shape[:3], own.values.shape[3]), jnp.float32))
    if prefix_source is not None:
        state = update(state, prefix_source)
    carry = (state, (own, positions, segments, pinned))
    ((highest, total, mixed), _), _ = jax.lax.scan(step, carry, length=ring.mesh.shape[AXIS])
    return ungrouped_heads((mixed / total).astype(queries.dtype), queries.shape), highest, total


def _device_backward(
    ring: _Ring, arrays: Any, places: Any, out: Array, highest: Array, total: Array, cotangent: Array
) -> tuple[Array, KeysValues, KeysValues | None]:
    """Returns cotangents of the queries, keys and values of this device, and of the full prefix."""
    queries, own, prefix = arrays
    positions, segments, _, pinned = places[0]
    kv_heads, dtype = own.keys.shape[2], queries.dtype
    grouped, d_out = grouped_heads(queries, kv_heads), grouped_heads(cotangent, kv_heads)
    product = (d_out.astype(jnp.float32) * grouped_heads(out, kv_heads)).sum(-1, keepdims=True)
    prefix_source, source = _sources(ring, prefix, places)

    def of_source(source: Source) -> tuple[Array, KeysValues]:
        """Returns the cotangents of the queries, and of the keys and values of one source; float32."""
        scores = scores_of(grouped, source, ring.scoring)
        weights = jnp.exp(scores - highest) / total
        rows = "b" if source.keys.ndim == 4 else ""
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_values = einsum(f"bkqs,bkqh->{rows}skh", weights.astype(dtype), d_out)
        d_weights = einsum(f"bkqh,{rows}skh->bkqs", d_out, source.values)
        slopes = ring.scoring.scale * soft_cap_slope(scores, ring.scoring.cap)
        d_scores = (weights * (d_weights - product) * slopes).astype(dtype)
        d_keys = einsum(f"bkqs,bkqh->{rows}skh", d_scores, grouped)
        return mix(d_scores, dataclasses.replace(source, values=source.keys)), KeysValues(d_keys, d_values)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        d_queries, rotating, d_pair = carry
        d_more, d_source = of_source(source(*rotating))
        d_pair = jax.tree.map(jnp.add, d_pair, d_source)
        return (d_queries + d_more, *ring.next((rotating, d_pair))), None

    d_prefix, d_queries = None, jnp.zeros(grouped.shape, jnp.float32)
    if prefix_source is not None:
        d_queries, d_source = of_source(prefix_source)
        axes = (AXIS,) if ring.separate_prefixes else (AXIS, *ROWS)
        d_prefix = jax.tree.map(lambda a, like: jax.lax.psum(a, axes).astype(like.dtype), d_source, prefix)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), own)
    carry = (d_queries, (own, positions, segments, pinned), zeros)
    (d_queries, _, d_pair), _ = jax.lax.scan(step, carry, length=ring.mesh.shape[AXIS])
    d_own = jax.tree.map(lambda a: a.astype(dtype), d_pair)
    return ungrouped_heads(d_queries.astype(dtype), queries.shape), d_own, d_prefix
